// Barriers in LDS that threads arrive at and wait for apart, copies of boxes that arrive there, barriers of some waves of a block,
// and registers that waves hand to others, of NVIDIA's Hopper. For blocks whose waves have roles: some copy (producers), some compute (consumers).
//
//   PhaseBarrier    A barrier in LDS. Its phases end when so many arrivals were counted; they alternate between parity 0 and 1.
//   phase_init(b, arrivals)  By one thread, before a barrier of the block.
//   phase_arrive(b)          One arrival. What the thread did before it is seen behind a wait for the phase.
//   phase_arrive_copied(b)   One arrival, when all that the thread's copy_async brings has landed.
//   phase_wait(b, parity)    Until the phase of this parity has ended. That of parity 1 has, before the first.
//   phase_expect(b, bytes)   The phase also waits for so many bytes, by a thread that arrives later.
//   map_ready(map)           Before a thread's first copy_box by a map, which is `device.tensor_map` of an array (slots, heads, D).
//   copy_box(to, map, column, head, slot, b)  Starts a copy to lines, by one thread: 64 columns from `column` on, zeros behind the
//                   last, of one head of as many slots as the map says. Its bytes, 128 for each slot, arrive at b.
//   copy_bulk(to, from, bytes, b)  Starts a copy of so many bytes, a multiple of 16, by one thread. They arrive at b.
//   RingPlace<N>             The stage of a ring of N whose turn it is, and the parity of the phase that its barriers are in;
//                   advance(place) goes on to the next.
//   named_arrive(id, threads), named_wait(id, threads)  A barrier of whole waves: it opens when `threads` threads have come to one of
//                   the two. Only those of named_wait are held up. Number 0 is the block's own.
//   take_registers<N>(), give_registers<N>()  Registers of a thread from here on, by all waves of a group. A launch has what the
//                   bounds of the kernel leave; a group that takes waits until others have given.
//   PRODUCER_REGISTERS, consumer_registers(consumers, producers, blocks)  What each thread has where so many threads give and others
//                   take all that there is, in so many blocks of a multiprocessor.
//
// Source: the PTX ISA on mbarrier, barrier, setmaxnreg, cp.async.mbarrier.arrive and cp.async.bulk.tensor.

#define PRODUCER_REGISTERS 24
DEVICE constexpr u32 consumer_registers(u32 consumers, u32 producers, u32 blocks) {
    u32 threads = consumers + producers, at_launch = 65536 / (blocks * threads) / 8 * 8;
    u32 freed = (at_launch * threads - PRODUCER_REGISTERS * producers) / consumers / 8 * 8;
    return freed < 240 ? freed : 240;
}
struct alignas(8) PhaseBarrier {
    u64 bits;
};
template <u32 N> struct RingPlace {
    u32 stage, parity;
};
template <u32 N> DEVICE void advance(RingPlace<N> &place) {
    place.stage = place.stage + 1 == N ? 0 : place.stage + 1;
    place.parity ^= place.stage == 0;
}

#if defined(FORGE_HARNESS)
extern "C" {
void forge_phase_init(u64 *at, u32 arrivals);
void forge_phase_arrive(u64 *at);
void forge_phase_wait(const u64 *at, u32 parity);
void forge_phase_expect(u64 *at, u32 bytes);
void forge_named_barrier(u32 id, u32 threads, u32 waits);
}
DEVICE void phase_init(PhaseBarrier &b, u32 arrivals) { forge_phase_init(&b.bits, arrivals); }
DEVICE void phase_arrive(PhaseBarrier &b) { forge_phase_arrive(&b.bits); }
DEVICE void phase_arrive_copied(PhaseBarrier &b) { forge_phase_arrive(&b.bits); }
DEVICE void phase_wait(PhaseBarrier &b, u32 parity) { forge_phase_wait(&b.bits, parity); }
DEVICE void phase_expect(PhaseBarrier &b, u32 bytes) { forge_phase_expect(&b.bits, bytes); }
DEVICE void map_ready(const u64 *) {}
DEVICE void copy_box(u32x4 *to, const u64 *map, u32 column, u32 head, u32 slot, PhaseBarrier &b) {
    const f16 *from = (const f16 *)map[0];
    u64 slots = map[1], heads = map[2], dim = map[3], box = map[4];
    for (u32 row = 0; row < box; ++row)
        for (u32 c = 0; c < 64; ++c) {
            u64 at = (u64)to + row * 128 + c * 2;
            bool there = column + c < dim && slot + row < slots;
            *(f16 *)(at ^ at >> 3 & 0x70) = there ? from[((slot + row) * heads + head) * dim + column + c] : f16{0};
        }
    forge_phase_expect(&b.bits, (u32)-128 * box);
}
DEVICE void copy_bulk(void *to, const void *from, u32 bytes, PhaseBarrier &b) {
    for (u32 i = 0; i < bytes / 16; ++i) ((u32x4 *)to)[i] = ((const u32x4 *)from)[i];
    forge_phase_expect(&b.bits, 0 - bytes);
}
DEVICE void named_arrive(u32 id, u32 threads) { forge_named_barrier(id, threads, 0); }
DEVICE void named_wait(u32 id, u32 threads) { forge_named_barrier(id, threads, 1); }
template <u32 N> DEVICE void take_registers() {}
template <u32 N> DEVICE void give_registers() {}
#else
DEVICE u32 phase_address(PhaseBarrier &b) { return (u32)__cvta_generic_to_shared(&b); }
DEVICE void phase_init(PhaseBarrier &b, u32 arrivals) { asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(phase_address(b)), "r"(arrivals) : "memory"); }
DEVICE void phase_arrive(PhaseBarrier &b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(phase_address(b)) : "memory"); }
DEVICE void phase_arrive_copied(PhaseBarrier &b) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" : : "r"(phase_address(b)) : "memory"); }
DEVICE void phase_wait(PhaseBarrier &b, u32 parity) {
    asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" : : "r"(phase_address(b)), "r"(parity) : "memory");
}
DEVICE void phase_expect(PhaseBarrier &b, u32 bytes) { asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" : : "r"(phase_address(b)), "r"(bytes) : "memory"); }
DEVICE void map_ready(const u64 *map) { asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" : : "l"(map) : "memory"); }
DEVICE void copy_box(u32x4 *to, const u64 *map, u32 column, u32 head, u32 slot, PhaseBarrier &b) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        : : "r"((u32)__cvta_generic_to_shared(to)), "l"(map), "r"(column), "r"(head), "r"(slot), "r"(phase_address(b)) : "memory");
}
DEVICE void copy_bulk(void *to, const void *from, u32 bytes, PhaseBarrier &b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
        : : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "r"(phase_address(b)) : "memory");
}
DEVICE void named_arrive(u32 id, u32 threads) { asm volatile("barrier.cta.arrive.aligned %0, %1;" : : "r"(id), "r"(threads) : "memory"); }
DEVICE void named_wait(u32 id, u32 threads) { asm volatile("barrier.cta.sync.aligned %0, %1;" : : "r"(id), "r"(threads) : "memory"); }
template <u32 N> DEVICE void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(N)); }
template <u32 N> DEVICE void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(N)); }
#endif
