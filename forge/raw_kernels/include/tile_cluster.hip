// Clusters of NVIDIA's Hopper: CLUSTER blocks whose ROW_BLOCK (matmul_epilogue) follow each other, which run at the same time and write
// to each other's LDS. The number of those is a multiple of CLUSTER.
//
//   cluster_arrive(), cluster_wait()  A barrier of all threads of the cluster, of which both are called by turns. Before the first
//                   nobody may write to another block's LDS, or arrive at a barrier there, which one thread has set up; behind the
//                   last a block may end. It orders no other accesses to memory: that would wait for all that was stored.
//   copy_share_to_all(to, from, bytes, b)  A copy_bulk to the same place in each block of the cluster, whose bytes arrive at each
//                   block's b. All blocks call it, and each brings its share of the bytes.
//   phase_arrive_at_all(b)  One arrival at the b of each block, behind what the thread read. What it stored the others may not see:
//                   a release to the cluster takes a microsecond.
//
// Source: the PTX ISA on clusters, cp.async.bulk and mapa.

#if defined(FORGE_HARNESS) // a block alone, which gets what the others would bring
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() { barrier(); }
DEVICE void copy_share_to_all(void *to, const void *from, u32 bytes, PhaseBarrier &b) { copy_bulk(to, from, bytes, b); }
DEVICE void phase_arrive_at_all(PhaseBarrier &b) {
    for (u32 i = 0; i < CLUSTER; ++i) phase_arrive(b);
}
#elif CLUSTER == 1
DEVICE void cluster_arrive() {}
DEVICE void cluster_wait() { barrier(); }
DEVICE void copy_share_to_all(void *to, const void *from, u32 bytes, PhaseBarrier &b) { copy_bulk(to, from, bytes, b); }
DEVICE void phase_arrive_at_all(PhaseBarrier &b) { phase_arrive(b); }
#else
#undef KERNEL
#ifdef MORE_TOKENS
#define KERNEL(threads) extern "C" __global__ __cluster_dims__(1, 1, CLUSTER) __launch_bounds__(threads, MIN_BLOCKS) void
#else
#define KERNEL(threads) extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(threads, MIN_BLOCKS) void
#endif
DEVICE void cluster_arrive() { asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.relaxed.aligned;" : : : "memory"); }
DEVICE void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" : : : "memory"); }
DEVICE void copy_share_to_all(void *to, const void *from, u32 bytes, PhaseBarrier &b) {
    u32 share = bytes / CLUSTER, at = ROW_BLOCK % CLUSTER * share;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], %4;"
        : : "r"((u32)__cvta_generic_to_shared(to) + at), "l"((const char *)from + at), "r"(share), "r"(phase_address(b)), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
DEVICE void phase_arrive_at_all(PhaseBarrier &b) {
    UNROLL for (u32 rank = 0; rank < CLUSTER; ++rank)
        asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.shared::cluster.b64 _, [there];\n}"
            : : "r"(phase_address(b)), "r"(rank) : "memory");
}
#endif
