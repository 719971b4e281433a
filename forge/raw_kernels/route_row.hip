// Router of a mixture of experts without groups, for few rows: as route.hip, by a block for each row and expert.
// Uses: router_weights
//
// Weights are on their way before the row is there. The block of a row that ends last chooses: an expert's place is the number of those
// that are better.
// -D BLOCK=threads; PIECES=vectors that a thread takes; VECTOR of route.hip.

#define MAX_EXPERTS 512

KERNEL(BLOCK) route_row(
    const float *x,              // (M, K)
    const float *norm,           // (K,) weights of the RMS norm of x
    const float *weight,         // (X, K)
    const float *bias,           // (X,) added to the logits, or null
    const float *selection_bias, // (X,) added to the scores for the choice, or null
    const float *expert_scale,   // (X,) factors of the weights, or null
    float *logits,               // (M, X)
    u32 *arrived,                // (M,) zeros
    i32 *chosen,                 // (M, U) best first
    float *weights,              // (M, U)
    float eps,                   // of the norm
    float factor,                // of the weights
    u32 inner,                   // K
    u32 experts,                 // X
    u32 used,                    // U, at most 32
    u32 is_sigmoid,              // 0 or 1: scores are sigmoids, else a softmax
    u32 renormalizes             // 0 or 1: weights are divided by their sum
) {
    SHARED float parts[2][MAX_WAVES(BLOCK)], z[MAX_EXPERTS];
    SHARED u32x4 ranks[MAX_EXPERTS / 4];
    SHARED u32 before, places[32];
    u32 wave = THREAD / WAVE;
    x += BLOCK_Y * inner, weight += (u64)BLOCK_X * inner, logits += BLOCK_Y * experts;
    Vec<float, VECTOR> own[PIECES], scale[PIECES];
    UNROLL for (u32 p = 0; p < PIECES; ++p) {
        u32 k = (p * BLOCK + THREAD) * VECTOR;
        own[p] = k < inner ? load<VECTOR>(weight + k) : Vec<float, VECTOR>{};
        scale[p] = k < inner ? load<VECTOR>(norm + k) : Vec<float, VECTOR>{};
    }
    float more = bias ? bias[BLOCK_X] : 0.0f;
    grid_dependency_sync();
    float sum = 0, squares = 0;
    Vec<float, VECTOR> row[PIECES];
    UNROLL for (u32 p = 0; p < PIECES; ++p) {
        u32 k = (p * BLOCK + THREAD) * VECTOR;
        row[p] = k < inner ? load<VECTOR>(x + k) : Vec<float, VECTOR>{};
    }
    UNROLL for (u32 p = 0; p < PIECES; ++p)
        UNROLL for (u32 i = 0; i < VECTOR; ++i) {
            squares += row[p].v[i] * row[p].v[i];
            sum += row[p].v[i] * (own[p].v[i] * scale[p].v[i]);
        }
    sum = wave_sum(sum), squares = wave_sum(squares);
    if (LANE == 0) parts[0][wave] = sum, parts[1][wave] = squares;
    lds_barrier();
    if (THREAD == 0) {
        for (u32 w = 1; w < BLOCK / WAVE; ++w) sum += parts[0][w], squares += parts[1][w];
        logits[BLOCK_X] = sum * rms_scale(fast_divide(squares, (float)inner), eps) + more;
    }
    fence_device();
    barrier();
    if (THREAD == 0) before = atomic_add(&arrived[BLOCK_Y], 1u);
    barrier();
    if (before != experts - 1) return;
    fence_device();
    if (THREAD == 0) arrived[BLOCK_Y] = 0; // for the next launch

    if (THREAD < used) places[THREAD] = THREAD; // experts, though ranks be NaN
    for (u32 e = THREAD; e < experts; e += BLOCK) z[e] = logits[e];
    lds_barrier();
    Scores scores{is_sigmoid != 0, 0.0f, 1.0f};
    if (!is_sigmoid && (selection_bias || !renormalizes)) scores = softmax_scores(z, experts);
    for (u32 e = THREAD; e < (experts + 3) / 4 * 4; e += BLOCK) {
        float rank = e >= experts || !selection_bias ? z[e] : score_of(scores, z[e]) + selection_bias[e];
        ((u32 *)ranks)[e] = e < experts ? smaller(ordered_key(rank), 0xfffffffeu) : 0; // the last is worse than all; a NaN is not beyond `rank + 1`
    }
    lds_barrier();
    for (u32 e = THREAD; e < experts; e += BLOCK) {
        u32 rank = ((const u32 *)ranks)[e], quad = e / 4, place = 0;
        for (u32 q = 0; q < (experts + 3) / 4; ++q) {
            u32x4 four = ranks[q];
            u32 least = q < quad ? rank : rank + 1; // of equal ones the lower index is better
            UNROLL for (u32 i = 0; i < 4; ++i) place += four.v[i] >= least;
        }
        for (u32 other = quad * 4; other < e; ++other) place += ((const u32 *)ranks)[other] == rank;
        if (place < used) places[place] = e;
    }
    lds_barrier();
    if (wave) return;
    u32 expert = places[LANE < used ? LANE : 0], first = BLOCK_Y * used;
    store_choice(chosen + first, weights + first, LANE < used, expert, z[expert], scores, renormalizes, factor, expert_scale);
}
