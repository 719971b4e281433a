// Products of a mixture of experts with few rows of x for each, grouped by expert, with quantized matrices, by NVIDIA's mma.m16n8k16.
// Uses: quant_blocks, tile, tile_mma, tile_bits, matmul_epilogue, mma_quant, expert_activation
// Target: sm_90a
//
// A block multiplies one tile of group_experts, TOKENS pairs of a row and one of its experts at most, with ROUNDS times as many rows of
// the expert's matrix as its waves take together. A wave's lines of weights are on their way from one round to the next.
// FIRST=1: the first product, behind the launch that made the list; the second reads the list and weights before the first is done.
// -D as mma_quant; FIRST; ROUNDS; GATED=1: an expert's rows are gates, then ups, and results are activations.

#define GATED_ROWS (GATED ? 8 : 16) // outputs of a tile

struct Results {
    const float *weights, *bias; // (P,), (X * N,)
    float *y;                    // (U, M, N)
    f16 *h;                      // (P, N / 2) or (P, N)
    u32 rows, used;              // M, U
};
// Stores the sums of a wave's tiles, whose outputs begin with `first`.
DEVICE void store_results(
    const Results &to, const Sums &sum, const u32 (&pairs)[TOKENS], u32 count, u32 matrix, u32 outputs, u32 first, u32 activation
) {
    UNROLL for (u32 m = 0; m < OCTETS; ++m)
        UNROLL for (u32 j = 0; j < TILE_LANE_TOKENS; ++j) {
            u32 token = m * TILE_TOKENS + tile_sum_token(j);
            if (token >= count) continue;
            u32 pair = pairs[token];
            float factor = to.weights ? to.weights[pair] : 1.0f;
            UNROLL for (u32 t = 0; t < TILES; ++t)
                UNROLL for (u32 i = j; i < (GATED ? TILE_VALUES / 2 : TILE_VALUES); i += TILE_LANE_TOKENS) {
                    u32 n = first + t * GATED_ROWS + (GATED ? place_in_half(tile_sum_row(i)) : tile_sum_row(i));
                    if (n >= outputs) continue;
                    float value = sum[t][m][i], other = sum[t][m][(i + TILE_VALUES / 2) % TILE_VALUES];
                    float more = to.bias ? to.bias[matrix + n] : 0.0f, more_up = GATED && to.bias ? to.bias[matrix + outputs + n] : 0.0f;
                    if (to.h)
                        to.h[(u64)pair * outputs + n] =
                            to_f16(expert_activate(value * factor + more, other * factor + more_up, GATED ? activation : RELU2));
                    else
                        to.y[((u64)(pair % to.used) * to.rows + pair / to.used) * outputs + n] = (value + more) * factor;
                }
        }
}

KERNEL(BLOCK) expert_mma_quant(
    const f16 *x,         // (M, K), or (P, K)
    const i32 *tiles,     // (tiles, 4) see expert_groups
    const i32 *pairs,     // (P,)
    const float *weights, // (P,) factors of the products where h is written, of the results where y is; or null
    const u8 *weight,     // the planes of (X * N, K), see quant_blocks
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // (X * N,) or null
    float *y,          // (U, M, N) results, or null
    f16 *h,            // (P, N / 2) with GATED, else (P, N): activations; or null
    u32 of_x,          // pairs of a row of x
    u32 rows,          // M
    u32 used,          // U
    u32 inner,         // K
    u32 outer,         // N
    u32 activation     // see expert_activation
) {
    DYNAMIC_SHARED(Memory, memory, 1);
    SHARED u32 own_pairs[TOKENS];
    if (FIRST) late_grid_dependency_sync();
    else if (HAS_PDL && HAS_REST) fence_device(); // scales of experts that were fetched for this layer, not those of a layer before
    const i32 *tile = tiles + 4 * BLOCK_X;
    u32 expert = (u32)load_l2(tile), first_pair = (u32)load_l2(tile + 1), count = (u32)load_l2(tile + 2);
    if (count == 0) return;
    const u32 lines = (inner + LINE_WEIGHTS - 1) / LINE_WEIGHTS, pieces = inner / 32, outputs = GATED ? outer / 2 : outer;
    const u32 groups = (outputs + TILES * GATED_ROWS - 1) / (TILES * GATED_ROWS), own = BLOCK_Y * ROUNDS * WAVES + THREAD / TILE_WAVE;
    const u32 rounds = own < groups ? smaller((groups - own + WAVES - 1) / WAVES, (u32)ROUNDS) : 0, total = rounds * lines;
    const u32 matrix = expert * outer;
    Planes planes{weight, high, scales, deltas};
    const Results results{weights, bias, y, h, rows, used};
    auto output_of = [&](u32 round, u32 tile) { return ((own + round * WAVES) * TILES + tile) * GATED_ROWS; };
    auto row_in = [&](u32 round, u32 tile, u32 row) {
        u32 n = output_of(round, tile) + (GATED ? place_in_half(row) : row);
        return matrix + (n < outputs ? n : outputs - 1) + (GATED && half_of(row) ? outputs : 0);
    };
    LineCopies copies;
    u32 ahead = 0, line_ahead = 0, round_ahead = 0; // lines copied, and the next one
    auto copy_next = [&](WaveStage &to) {
        if (ahead < total) {
            if (line_ahead == 0) prepare_line(copies, [&](u32 tile, u32 row) { return row_in(round_ahead, tile, row); }, planes, lines, 0, pieces);
            copy_weights(to, copies, smaller((pieces - line_ahead * LINE_GROUPS) * (QUANT_PIECES / 8), (u32)QUANT_PIECES));
            ++ahead;
            if (++line_ahead == lines) line_ahead = 0, ++round_ahead;
        }
        commit_copies();
    };
    u32 wave = THREAD / TILE_WAVE;
    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) copy_next(memory[0].stages[s][wave]);
    if (THREAD < TOKENS) own_pairs[THREAD] = THREAD < count ? (u32)load_l2(pairs + first_pair + THREAD) : 0;
    Rest rests[TILES][TILE_LANE_ROWS] = {};
    auto load_rests = [&](u32 round, u32 line) {
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
                u32 row = row_in(round, t, tile_row(r));
#if HAS_TAIL
                rests[t][r] = load_some_rest(deltas, row * pieces + line * LINE_GROUPS, pieces - line * LINE_GROUPS);
#else
                rests[t][r] = load_rest(deltas, row * lines + line);
#endif
            }
    };
    if (HAS_REST && rounds) load_rests(0, 0);
    if (!FIRST) grid_dependency_sync();
    lds_barrier();
    auto row_of_x = [&](u32 token) { return own_pairs[token] / of_x; };
    const Masks masks = masks_of((rows >> 31) * THREAD << 20);
    const Places places = places_of_codes();
    u32 at = 0; // the stage's place in LDS
    ROLLED for (u32 round = 0; round < ROUNDS; ++round) {
        Sums sum, minima;
        clear_sums(sum);
        clear_sums(minima);
        ROLLED for (u32 first = 0; first < lines; first += X_LINES) {
            if (round == 0) { // there are others where all of x is in LDS
                if (first) lds_barrier(); // the x before was read
                place_x(memory[0].x, x, row_of_x, first, lines, count, inner);
                lds_barrier();
            }
            u32 last = round < rounds ? smaller(first + X_LINES, lines) : first;
            ROLLED for (u32 line = first; line < last; ++line) {
                wait_copies<STAGES - 2>();
                wave_sync();
                copy_next(memory[0].stages[at == 0 ? STAGES - 1 : at - 1][wave]);
                const WaveStage &stage = memory[0].stages[at][wave];
                const XLine *own_x = &memory[0].x[(line - first) * OCTETS];
                WaveScales own_scales;
                UNROLL for (u32 t = 0; t < TILES; ++t)
                    UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) own_scales[t][r] = read_scales(stage, t * 16 + tile_row(r), rests[t][r]);
                if (HAS_REST) {
                    bool is_last = line + 1 == lines;
                    if (!is_last || round + 1 < rounds) load_rests(is_last ? round + 1 : round, is_last ? 0 : line + 1);
                }
                multiply_line(sum, minima, stage, own_x, own_scales, places, masks);
                at = at + 1 == STAGES ? 0 : at + 1;
            }
        }
        if (round >= rounds) continue;
        finish_sums(sum, minima);
        store_results(results, sum, own_pairs, count, matrix, outputs, output_of(round, 0), activation);
    }
}
