// Clusters of NVIDIA's Hopper: CLUSTER blocks that lie beside each other in the grid's x, run at the same time and write to each
// other's LDS. The grid's x is a multiple of CLUSTER.
//
//   cluster_rank()  The block's number in its cluster.
//   cluster_sync()  Barrier of all threads of the cluster. Before it nobody may write to a block's LDS, or arrive at a barrier there,
//                   that is set up only then; behind the last a block may end.
//   copy_box_to_all(to, map, column, head, slot, b, rank)  A copy_box to the same place in each block of the cluster, whose bytes
//                   arrive at each block's b. All blocks call it, and that of `rank` copies.
//   phase_arrive_at_all(b)  One arrival at the b of each block.
//
// Source: the PTX ISA on clusters, cp.async.bulk.tensor and mapa.

#if defined(FORGE_HARNESS) // a block alone, which gets what the others would bring
DEVICE u32 cluster_rank() { return BLOCK_X % CLUSTER; }
DEVICE void cluster_sync() { barrier(); }
DEVICE void copy_box_to_all(u32x4 *to, const u64 *map, u32 column, u32 head, u32 slot, PhaseBarrier &b, u32) { copy_box(to, map, column, head, slot, b); }
DEVICE void phase_arrive_at_all(PhaseBarrier &b) {
    for (u32 i = 0; i < CLUSTER; ++i) phase_arrive(b);
}
#elif CLUSTER == 1
DEVICE u32 cluster_rank() { return 0; }
DEVICE void cluster_sync() { barrier(); }
DEVICE void copy_box_to_all(u32x4 *to, const u64 *map, u32 column, u32 head, u32 slot, PhaseBarrier &b, u32) { copy_box(to, map, column, head, slot, b); }
DEVICE void phase_arrive_at_all(PhaseBarrier &b) { phase_arrive(b); }
#else
#undef KERNEL
#define KERNEL(threads) extern "C" __global__ __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(threads, MIN_BLOCKS) void
DEVICE u32 cluster_rank() { return BLOCK_X % CLUSTER; }
DEVICE void cluster_sync() {
    asm volatile("fence.mbarrier_init.release.cluster;\nbarrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" : : : "memory");
}
DEVICE void copy_box_to_all(u32x4 *to, const u64 *map, u32 column, u32 head, u32 slot, PhaseBarrier &b, u32 rank) {
    if (rank != cluster_rank()) return;
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;"
        : : "r"((u32)__cvta_generic_to_shared(to)), "l"(map), "r"(column), "r"(head), "r"(slot), "r"(phase_address(b)), "h"((u16)((1 << CLUSTER) - 1)) : "memory");
}
DEVICE void phase_arrive_at_all(PhaseBarrier &b) {
    UNROLL for (u32 rank = 0; rank < CLUSTER; ++rank)
        asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\nmbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}"
            : : "r"(phase_address(b)), "r"(rank) : "memory");
}
#endif
