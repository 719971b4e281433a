// Log probabilities of ids of each row under its logits as they are. A block per row.
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

KERNEL(THREADS) logprobs(
    const float *logits, // (R, V)
    const i32 *ids,      // (R,) -1 counts as 0
    float *values,       // (R,)
    u32 vocabulary       // V
) {
    grid_dependency_sync();
    SHARED float scratch[MAX_WAVES(THREADS)];
    SHARED u64 keys[MAX_WAVES(THREADS)];
    const float *z = logits + (u64)BLOCK_X * vocabulary;
    Distribution d = distribution(z, vocabulary, scratch, keys);
    if (THREAD == 0) values[BLOCK_X] = logprob(d, z[larger(ids[BLOCK_X], 0)]);
}

// The first n ids by (logit descending, id ascending), one after the other: n is small, and this is asked for rarely.
KERNEL(THREADS) top_logprobs(
    const float *logits, // (R, V)
    i32 *ids,            // (R, n)
    float *values,       // (R, n)
    u32 vocabulary,      // V
    u32 n
) {
    grid_dependency_sync();
    SHARED float scratch[MAX_WAVES(THREADS)];
    SHARED u64 keys[MAX_WAVES(THREADS)];
    const float *z = logits + (u64)BLOCK_X * vocabulary;
    Distribution d = distribution(z, vocabulary, scratch, keys);
    u64 last = ~0ull; // `order_of` the id before
    for (u32 place = 0; place < n; ++place) {
        u64 next = 0;
        for (u32 i = THREAD; i < vocabulary; i += THREADS) {
            u64 order = order_of(ordered_key(z[i]), i);
            if (order < last && order > next) next = order;
        }
        last = block_most(next, keys);
        if (THREAD == 0) {
            u64 at = (u64)BLOCK_X * n + place;
            ids[at] = (i32)(d.exists ? id_in(last) : place);
            values[at] = logprob(d, logit_of(key_in(last)));
        }
    }
}

// What the host reads of a step, as words: ids of the row, then bits of their values.
KERNEL(64) pack_logprobs(
    const i32 *ids,          // (R,)
    const float *values,     // (R,)
    const i32 *top_ids,      // (R, n)
    const float *top_values, // (R, n)
    i32 *packed,             // (R, 2, n + 1)
    u32 n
) {
    grid_dependency_sync();
    u64 row = BLOCK_X;
    i32 *out = packed + row * 2 * (n + 1);
    for (u32 i = THREAD; i <= n; i += 64) {
        out[i] = i ? top_ids[row * n + i - 1] : ids[row];
        out[n + 1 + i] = (i32)as_u32(i ? top_values[row * n + i - 1] : values[row]);
    }
}
