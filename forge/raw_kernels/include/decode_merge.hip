// Decode attention: states of several waves or splits are merged by their running maximum and sum (arXiv:2311.01282).

#define WAVES (THREADS / TILE_WAVE)
#define THREAD_OUTPUTS ((PACKED * HEAD_DIM + THREADS - 1) / THREADS) // of the block's results
#define MAX_SPLITS 128
#define SPLITS_AT_ONCE (THREAD_OUTPUTS <= 4 ? 16 : 8) // loads in flight while splits are merged

// The states of a block's waves, by head, in LDS. Arrays of their own there, as one struct takes more instructions for addresses.
struct WaveStates {
    Rows (&acc)[WAVES][PACKED];
    float (&m)[WAVES][PACKED], (&l)[WAVES][PACKED];
};
DEVICE void store_state(State &s, const WaveStates &to, u32 wave) {
    UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
        u32 h = tile_sum_token(n);
        s.l[n] = over_rows(s.l[n], true, TILE_ROW_LANES);
        if (h >= PACKED) continue;
        if (LANE_HAS_FIRST_ROW) to.m[wave][h] = s.m[n], to.l[wave][h] = s.l[n];
        UNROLL for (u32 p = 0; p < PASSES; ++p)
            UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
                UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS)
                    to.acc[wave][h].v[dim_of(p, t, tile_sum_row(i))] = s.acc[p][t][i];
    }
}

// The state of a split in device memory: of each head acc (D,) and (m, l).
struct SplitState {
    float *acc, *ml;
};

// What an attention sink adds to the sum of a head's weights: a score that has no value (arXiv:2309.17453).
DEVICE float sink_weight(const float *sinks, u32 h, float m) { return sinks ? fast_exp2(sinks[h] * LOG2E - m) : 0.0f; }

// Merges the states of the waves. The result is the output, where there is one split, or the split's state.
DEVICE void merge_waves(const WaveStates &from, const float *sinks, u32 splits, u32 outputs, f16 *out, const SplitState &to) {
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n) {
        u32 at = THREAD + n * THREADS, h = at / HEAD_DIM, d = at % HEAD_DIM;
        if (at >= outputs) continue;
        float m = LEAST, l = 0, acc = 0;
        for (u32 w = 0; w < WAVES; ++w) m = larger(m, from.m[w][h]);
        for (u32 w = 0; w < WAVES; ++w) {
            float keep = fast_exp2(from.m[w][h] - m);
            l += from.l[w][h] * keep;
            acc += from.acc[w][h].v[d] * keep;
        }
        if (splits == 1) {
            out[at] = to_f16(fast_divide(acc, l + sink_weight(sinks, h, m)));
        } else {
            to.acc[at] = acc;
            if (d == 0) to.ml[2 * h] = m, to.ml[2 * h + 1] = l;
        }
    }
}

// The share that each split has of each head: 2**(m - the greatest m) / the sum of all l.
DEVICE void compute_shares(const float *ml, const float *sinks, u32 splits, u32 last_head, float (&share)[PACKED][MAX_SPLITS]) {
    for (u32 h = THREAD / WAVE; h < PACKED; h += THREADS / WAVE) {
        float split_m[MAX_SPLITS / 32], split_l[MAX_SPLITS / 32];
        float m = LEAST, l = 0;
        UNROLL for (u32 i = 0; i * WAVE < MAX_SPLITS; ++i) {
            u32 s = LANE + i * WAVE;
            bool there = s < splits && h <= last_head;
            f32x2 found = there ? load<2>(ml + (s * PACKED + h) * 2) : f32x2{MISSING, 0.0f};
            split_m[i] = found.v[0], split_l[i] = found.v[1];
            m = larger(m, split_m[i]);
        }
        m = wave_max(m);
        UNROLL for (u32 i = 0; i * WAVE < MAX_SPLITS; ++i) {
            split_m[i] = fast_exp2(split_m[i] - m);
            l += split_m[i] * split_l[i];
        }
        l = wave_sum(l);
        if (h <= last_head) l += sink_weight(sinks, h, m);
        UNROLL for (u32 i = 0; i * WAVE < MAX_SPLITS; ++i) share[h][LANE + i * WAVE] = fast_divide(split_m[i], l);
    }
}

// A thread's numbers of some splits. Where there is none it is another's, whose share is 0.
DEVICE void load_splits(const float *acc, u32 start, u32 splits, u32 outputs, float (&to)[THREAD_OUTPUTS][SPLITS_AT_ONCE]) {
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n)
        UNROLL for (u32 s = 0; s < SPLITS_AT_ONCE; ++s) {
            u32 split = start + s < splits ? start + s : splits - 1, at = THREAD + n * THREADS;
            to[n][s] = acc[split * PACKED * HEAD_DIM + (at < outputs ? at : outputs - 1)];
        }
}

// Merges the states of all splits, in their order, which `all` begins with.
DEVICE void merge_splits(const SplitState &all, const float *sinks, u32 splits, u32 last_head, u32 outputs, float (&share)[PACKED][MAX_SPLITS], f16 *out) {
    float part[THREAD_OUTPUTS][SPLITS_AT_ONCE], merged[THREAD_OUTPUTS];
    load_splits(all.acc, 0, splits, outputs, part);
    compute_shares(all.ml, sinks, splits, last_head, share);
    barrier();
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n) merged[n] = 0;
    for (u32 start = 0; start < splits; start += SPLITS_AT_ONCE) {
        UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n) {
            u32 at = THREAD + n * THREADS;
            UNROLL for (u32 s = 0; s < SPLITS_AT_ONCE; ++s)
                merged[n] += part[n][s] * share[at < PACKED * HEAD_DIM ? at / HEAD_DIM : 0][start + s];
        }
        load_splits(all.acc, start + SPLITS_AT_ONCE, splits, outputs, part);
    }
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n)
        if (THREAD + n * THREADS < outputs) out[THREAD + n * THREADS] = to_f16(merged[n]);
}

// The states of all splits in device memory, and how many blocks of each place have stored theirs.
struct Splits {
    float *acc, *ml; // (B, blocks of a row, splits, PACKED, D) and (..., 2), or null for one split
    u32 *arrived;    // (B, blocks of a row) zeros, or null for one split
    const float *sinks; // of the block's heads, or null
    u32 count, used;
};

// Merges the states of the block's waves, and the block that ends last those of the splits. `place` is the block's row and heads.
DEVICE void merge(
    const WaveStates &states, const Splits &s, u32 split, u32 place, u32 last_head, f16 *out, float (&share)[PACKED][MAX_SPLITS], u32 &before
) {
    u64 number = (u64)place * s.count + split; // of the split's state
    SplitState own{s.acc + number * PACKED * HEAD_DIM, s.ml + number * PACKED * 2};
    u32 outputs = (last_head + 1 < PACKED ? last_head + 1 : PACKED) * HEAD_DIM;
    merge_waves(states, s.sinks, s.used, outputs, out, own);
    if (s.used == 1) return;
    fence_device();
    barrier();
    if (THREAD == 0) before = atomic_add(&s.arrived[place], 1u);
    barrier();
    if (before != s.used - 1) return;
    fence_device();
    if (THREAD == 0) s.arrived[place] = 0; // for the next launch
    SplitState all{own.acc - (u64)split * PACKED * HEAD_DIM, own.ml - (u64)split * PACKED * 2};
    merge_splits(all, s.sinks, s.used, last_head, outputs, share, out);
}
