// Log probabilities of each row's id and of its most probable ids, under its logits as they are. A block per row.
// Uses: sample_math, sample_bins

#define THREADS 1024

struct Distribution {
    float greatest, log_sum;
    bool exists; // the greatest logit is finite
};

DEVICE Distribution distribution(
    const float *z, u32 vocabulary, float (&scratch)[MAX_WAVES(THREADS)], u64 (&keys)[MAX_WAVES(THREADS)]
) {
    u32 most = 0;
    for (u32 i = THREAD; i < vocabulary; i += THREADS) most = larger(most, key_or_nan(z[i]));
    most = (u32)block_most(most, keys);
    float greatest = logit_of(most), sum = 0;
    bool exists = is_finite(most);
    for (u32 i = THREAD; i < vocabulary; i += THREADS) sum += exists ? fast_exp(z[i] - greatest) : 0.0f;
    return Distribution{greatest, fast_log(block_sum(sum, scratch)), exists};
}

DEVICE float logprob(const Distribution &d, float z) {
    return d.exists ? (z - d.greatest) - d.log_sum : as_float(0x7fc00000u);
}

// The first n ids by (logit descending, id ascending), one after the other: n is small, and this is asked for rarely.
KERNEL(THREADS) logprobs(
    const float *logits, // (R, V)
    const i32 *ids,      // (R,) for its log probability -1 counts as 0
    i32 *top_ids,        // (R, n + 1) the row's id, then its first n
    float *values,       // (R, n + 1) their log probabilities
    u32 vocabulary,      // V
    u32 n
) {
    grid_dependency_sync();
    SHARED float scratch[MAX_WAVES(THREADS)];
    SHARED u64 keys[MAX_WAVES(THREADS)];
    const float *z = logits + (u64)BLOCK_X * vocabulary;
    i32 id = ids[BLOCK_X];
    u64 at = (u64)BLOCK_X * (n + 1);
    Distribution d = distribution(z, vocabulary, scratch, keys);
    if (THREAD == 0) top_ids[at] = id, values[at] = logprob(d, z[larger(id, 0)]);
    u64 last = ~0ull; // `order_of` the id before
    for (u32 place = 0; place < n; ++place) {
        u64 next = 0;
        for (u32 i = THREAD; i < vocabulary; i += THREADS) {
            u64 order = order_of(ordered_key(z[i]), i);
            if (order < last && order > next) next = order;
        }
        last = block_most(next, keys);
        if (THREAD == 0) {
            top_ids[at + 1 + place] = (i32)(d.exists ? id_in(last) : place);
            values[at + 1 + place] = logprob(d, logit_of(key_in(last)));
        }
    }
}

// What the host reads of a step, as words: ids of the row, then bits of their values.
KERNEL(64) pack_logprobs(
    const i32 *ids,      // (R, N)
    const float *values, // (R, N)
    i32 *packed,         // (R, 2, N)
    u32 count            // N
) {
    grid_dependency_sync();
    u64 row = (u64)BLOCK_X * count;
    for (u32 i = THREAD; i < count; i += 64) {
        packed[2 * row + i] = ids[row + i];
        packed[2 * row + count + i] = (i32)as_u32(values[row + i]);
    }
}
