// Sampling: the bins that hold the limits of top_k and top_p.

struct Limits {
    u64 before_first, before_k, through_k;
    u32 first, last, k_bin, k_left;
};

// Finds the bins that hold the limits of top_k and top_p. The limit of top_p depends on how much weight top_k keeps of its bin. It lies
// between the bin for no such weight and the bin for all of it.
DEVICE void find_limits(
    const Row &row, bool by_count, u32 k, bool by_weight, float p, Limits &limits, u64 (&scratch)[MAX_WAVES(THREADS)]
) {
    const u32 run = BINS / THREADS;
    u64 sums[run], count = 0, sum = 0, all, weight;
    u32 counts[run];
    UNROLL for (u32 j = 0; j < run; ++j) {
        counts[j] = row.counts[THREAD * run + j];
        sums[j] = row.sums[THREAD * run + j];
        count += counts[j];
        sum += sums[j];
    }
    count = block_before(count, scratch, all);
    sum = block_before(sum, scratch, weight);
    if (THREAD == 0) limits = Limits{weight, weight, weight, NONE, NONE, NONE, 0};
    barrier();
    if (by_count && k < all) {
        u64 reached = sum;
        UNROLL for (u32 j = 0; j < run; ++j) {
            if (count < k && k <= count + counts[j]) {
                limits.k_bin = limits.first = limits.last = THREAD * run + j;
                limits.k_left = k - (u32)count;
                limits.before_first = limits.before_k = reached;
                limits.through_k = reached + sums[j];
            }
            count += counts[j];
            reached += sums[j];
        }
    }
    barrier();
    if (!by_weight) return;
    u64 least = share(p, limits.before_k), most = share(p, limits.through_k);
    least = least < 1 ? 1 : least;
    barrier();
    UNROLL for (u32 j = 0; j < run; ++j) {
        if (sum < least && least <= sum + sums[j]) limits.first = THREAD * run + j, limits.before_first = sum;
        if (sum < most && most <= sum + sums[j]) limits.last = THREAD * run + j;
        sum += sums[j];
    }
    barrier();
}
