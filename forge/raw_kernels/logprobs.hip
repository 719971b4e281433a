// Log probabilities of ids of each row under its logits as they are. A block per row.

#define THREADS 1024

struct Distribution {
    float greatest, log_sum;
    bool exists; // the greatest logit is finite
};

DEVICE Distribution distribution(const float *z, u32 vocabulary, float (&scratch)[MAX_WAVES(THREADS)]) {
    float most = NEG_INFINITY;
    u32 nans = 0;
    for (u32 i = THREAD; i < vocabulary; i += THREADS) {
        most = larger(most, z[i]);
        nans += z[i] != z[i];
    }
    most = block_max(most, scratch);
    float all_nans = block_sum((float)nans, scratch);
    bool exists = all_nans == 0.0f && most > NEG_INFINITY && most < -NEG_INFINITY;
    float sum = 0;
    for (u32 i = THREAD; i < vocabulary; i += THREADS) sum += exists ? fast_exp(z[i] - most) : 0.0f;
    sum = block_sum(sum, scratch);
    return Distribution{most, fast_log(sum), exists};
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
    const float *z = logits + (u64)BLOCK_X * vocabulary;
    Distribution d = distribution(z, vocabulary, scratch);
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
    SHARED u32 best_key[MAX_WAVES(THREADS)];
    SHARED u32 best_id[MAX_WAVES(THREADS)];
    const float *z = logits + (u64)BLOCK_X * vocabulary;
    Distribution d = distribution(z, vocabulary, scratch);
    u32 last = 0, last_id = 0;
    for (u32 place = 0; place < n; ++place) {
        u32 most = 0, id = 0xffffffffu;
        for (u32 i = THREAD; i < vocabulary; i += THREADS) {
            u32 key = ordered_key(z[i]);
            bool taken = place > 0 && (key > last || (key == last && i <= last_id));
            if (!taken && (key > most || id == 0xffffffffu)) most = key, id = i;
        }
        for (u32 i = WAVE / 2; i > 0; i /= 2) {
            u32 other = shfl_xor(most, i), other_id = shfl_xor(id, i);
            if (other > most || (other == most && other_id < id)) most = other, id = other_id;
        }
        if (LANE == 0) best_key[THREAD / WAVE] = most, best_id[THREAD / WAVE] = id;
        barrier();
        for (u32 w = 0; w < THREADS / WAVE; ++w)
            if (best_key[w] > most || (best_key[w] == most && best_id[w] < id)) most = best_key[w], id = best_id[w];
        barrier();
        last = most;
        last_id = id;
        if (THREAD == 0) {
            u64 at = (u64)BLOCK_X * n + place;
            ids[at] = (i32)(d.exists ? id : place);
            values[at] = logprob(d, logit_of(most));
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
