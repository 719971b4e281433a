// Router of a mixture of experts: logits in float32, and the choice of each row's best experts with their weights.
//
// A wave computes the logits of EACH experts for ROWS rows, which it normalizes as it reads them. The block of these rows that ends
// last chooses, a wave for each row at a time.
// Uses: router_weights
// -D ROWS=rows of a block; EACH=experts of a wave; VECTOR=4 where rows are multiples of 4 numbers, else 1.

#define THREADS 128
#define MAX_EXPERTS 512

// What a wave chooses from: an order for each expert, the larger the better, and 0 for one that was chosen. Of equal ranks the lower
// index is the better one.
DEVICE u64 order_of_expert(float rank, u32 expert) { return (u64)ordered_key(rank) << 32 | (u32)~expert; }
DEVICE u32 expert_of_order(u64 order) { return ~(u32)order; }

// The best of a wave's orders, which is then out.
DEVICE u64 take_best(u64 (&orders)[MAX_EXPERTS], u32 experts) {
    u64 best = 0;
    for (u32 e = LANE; e < experts; e += WAVE) best = larger(best, orders[e]);
    best = wave_max(best);
    if (LANE == 0) orders[expert_of_order(best)] = 0;
    wave_sync();
    return best;
}

// Ranks of -infinity for experts outside the groups with the largest sums of their two best ranks. Groups are at most 32.
DEVICE void keep_best_groups(u64 (&orders)[MAX_EXPERTS], u32 experts, u32 groups, u32 used_groups) {
    u32 size = experts / groups;
    float first = NEG_INFINITY, second = NEG_INFINITY;
    for (u32 e = LANE * size; LANE < groups && e < (LANE + 1) * size; ++e) {
        float rank = logit_of((u32)(orders[e] >> 32));
        if (rank > first)
            second = first, first = rank;
        else if (rank > second)
            second = rank;
    }
    u64 own = LANE < groups ? order_of_expert(first + second, LANE) : 0;
    bool kept = false;
    for (u32 place = 0; place < used_groups; ++place)
        if (wave_max(own) == own && own) kept = true, own = 0;
    u64 all = wave_ballot(kept);
    for (u32 e = LANE; e < experts; e += WAVE)
        if (!(all >> e / size & 1)) orders[e] = order_of_expert(NEG_INFINITY, e);
    wave_sync();
}

KERNEL(THREADS) route(
    const float *x,              // (M, K)
    const float *norm,           // (K,) weights of the RMS norm of x
    const float *weight,         // (X, K)
    const float *bias,           // (X,) added to the logits, or null
    const float *selection_bias, // (X,) added to the scores for the choice, or null
    const float *expert_scale,   // (X,) factors of the weights, or null
    float *logits,               // (M, X)
    u32 *arrived,                // (M / ROWS,) zeros
    i32 *chosen,                 // (M, U) best first
    float *weights,              // (M, U)
    float eps,                   // of the norm
    float factor,                // of the weights
    u32 rows,                    // M
    u32 inner,                   // K
    u32 experts,                 // X
    u32 used,                    // U, at most 32
    u32 groups,                  // of experts
    u32 used_groups,             // of which experts are chosen
    u32 is_sigmoid,              // 0 or 1: scores are sigmoids, else a softmax
    u32 renormalizes,            // 0 or 1: weights are divided by their sum
    u32 blocks                   // of the same rows
) {
    SHARED u64 orders[MAX_WAVES(THREADS)][MAX_EXPERTS];
    SHARED u32 before;
    grid_dependency_sync();
    u32 wave = THREAD / WAVE, base = BLOCK_Y * ROWS, first = (BLOCK_X * (THREADS / WAVE) + wave) * EACH;
    float sum[EACH][ROWS], squares[ROWS];
    UNROLL for (u32 r = 0; r < ROWS; ++r) {
        squares[r] = 0;
        UNROLL for (u32 e = 0; e < EACH; ++e) sum[e][r] = 0;
    }
    for (u32 k = LANE * VECTOR; k < inner; k += WAVE * VECTOR) {
        Vec<float, VECTOR> scale = load<VECTOR>(norm + k), own[EACH];
        UNROLL for (u32 e = 0; e < EACH; ++e) {
            own[e] = load<VECTOR>(weight + (u64)smaller(first + e, experts - 1) * inner + k);
            UNROLL for (u32 i = 0; i < VECTOR; ++i) own[e].v[i] *= scale.v[i];
        }
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            Vec<float, VECTOR> row = load<VECTOR>(x + (u64)smaller(base + r, rows - 1) * inner + k);
            UNROLL for (u32 i = 0; i < VECTOR; ++i) {
                squares[r] += row.v[i] * row.v[i];
                UNROLL for (u32 e = 0; e < EACH; ++e) sum[e][r] += row.v[i] * own[e].v[i];
            }
        }
    }
    UNROLL for (u32 r = 0; r < ROWS; ++r) {
        float scale = rms_scale(fast_divide(wave_sum(squares[r]), (float)inner), eps);
        UNROLL for (u32 e = 0; e < EACH; ++e) {
            float total = wave_sum(sum[e][r]) * scale;
            u32 expert = first + e;
            if (LANE == 0 && expert < experts && base + r < rows)
                logits[(u64)(base + r) * experts + expert] = total + (bias ? bias[expert] : 0.0f);
        }
    }
    fence_device();
    barrier();
    if (THREAD == 0) before = atomic_add(&arrived[BLOCK_Y], 1u);
    barrier();
    if (before != blocks - 1) return;
    fence_device();
    if (THREAD == 0) arrived[BLOCK_Y] = 0; // for the next launch

    u64(&own)[MAX_EXPERTS] = orders[wave];
    bool by_scores = selection_bias || groups > 1;
    for (u32 row = base + wave; row < base + ROWS && row < rows; row += THREADS / WAVE) {
        const float *z = logits + (u64)row * experts;
        Scores scores = is_sigmoid ? Scores{true} : softmax_scores(z, experts);
        for (u32 e = LANE; e < experts; e += WAVE) {
            float rank = by_scores ? score_of(scores, z[e]) + (selection_bias ? selection_bias[e] : 0.0f) : z[e];
            own[e] = order_of_expert(rank, e);
        }
        wave_sync();
        if (groups > 1) keep_best_groups(own, experts, groups, used_groups);
        u32 expert = 0; // the one in the place of this lane
        for (u32 place = 0; place < used; ++place) {
            u64 best = take_best(own, experts);
            if (LANE == place) expert = expert_of_order(best);
        }
        u64 at = (u64)row * used;
        store_choice(chosen + at, weights + at, LANE < used, expert, z[expert], scores, renormalizes, factor, expert_scale);
    }
}
