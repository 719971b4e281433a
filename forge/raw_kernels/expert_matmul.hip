// Products of a mixture of experts on the matrix cores: rows of x, grouped by expert, with float16 or quantized matrices.
// Uses: quant_blocks, codebooks, tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, matmul_epilogue, matmul_loop, expert_activation
//
// A block multiplies one tile of group_experts, TOKENS pairs of a row and one of its experts at most. Their rows of x may lie apart.
// Tiles of an expert lie beside each other in the grid, so that they find its weights in a cache.
// -D as matmul_loop, with MORE_TOKENS=1; GATED=1: an expert's rows are gates, then ups, and results are activations.

KERNEL(BLOCK) expert_matmul(
    const f16 *x,         // (M, K), or (P, K)
    const i32 *tiles,     // (tiles, 4) see expert_groups
    const i32 *pairs,     // (P,)
    const float *weights, // (P,) factors of the products, or null
    const float *shares,  // (P,) factors of the results in y, or null
    const WEIGHT *weight, // (X * N, K) or its first plane, see quant_blocks
    const u8 *high,       // the other planes, or null
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // (X * N,) or null
    float *y,          // (U, M, stride), or (1, P, stride): results in the columns from `column` on, or null
    f16 *h,            // (P, N / 2) with GATED, else (P, N): activations; or null
    u32 of_x,          // pairs of a row of x
    u32 used,          // places of y: U, or 1
    u32 rows_of_y,     // M, or P
    u32 inner,         // K
    u32 outer,         // N
    u32 stride,        // numbers from one row of y to the next
    u32 column,
    u32 activation // see expert_activation
) {
    SHARED u32x4 stages[STAGES][STAGE_PIECES];
    load_codebook<BLOCK>(); // the first stage's barrier is behind it
    grid_dependency_sync();
    u32 expert = (u32)tiles[4 * BLOCK_X], first = (u32)tiles[4 * BLOCK_X + 1], rows = (u32)tiles[4 * BLOCK_X + 2];
    if (rows == 0) return;
    Product product{nullptr, y, GATED ? h : nullptr, rows, outer, stride, column, 0, 0};
    Planes planes{(const u8 *)weight, high, scales, deltas};
    u32 row[TILES][TILE_LANE_ROWS], matrix = expert * outer;
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) row[t][r] = matrix + matrix_row(product, t, tile_row(r));
    u32 end = (inner + TURN_WEIGHTS - 1) / TURN_WEIGHTS, outputs = GATED ? outer / 2 : outer;
    u32 own = (ROW_BLOCK * WAVES + THREAD / TILE_WAVE) * TILES * (GATED ? 8 : 16);
    Turn held[PREFETCH + 1];
    ROLLED for (u32 base = 0; base < rows; base += TOGETHER) {
        Sums sum;
        clear_sums(sum);
        if (base) lds_barrier(); // everything of the tokens before was read
        u32 row_of_x[EACH];
        UNROLL for (u32 e = 0; e < EACH; ++e) {
            u32 m = base + copied_row(e);
            row_of_x[e] = m < rows ? (u32)pairs[first + m] / of_x : 0;
        }
        if (PREFETCH || HAS_PDL) load_turn(held[0], weight, planes, row, 0, end, inner);
        auto at_row = [&](u32 e, u32) { return row_of_x[e]; };
        multiply_turns(sum, stages, held, x, at_row, weight, planes, row, base, rows, inner, 0, end);
        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
            UNROLL for (u32 j = 0; j < TILE_LANE_TOKENS; ++j) {
                u32 token = base + m * TILE_TOKENS + tile_sum_token(j);
                if (token >= rows) continue;
                u32 pair = (u32)pairs[first + token];
                float factor = weights ? weights[pair] : 1.0f, share = shares ? shares[pair] : 1.0f;
                u64 at = (u64)(pair % used) * rows_of_y + pair / used;
                UNROLL for (u32 t = 0; t < TILES; ++t)
                    UNROLL for (u32 i = j; i < (GATED ? TILE_VALUES / 2 : TILE_VALUES); i += TILE_LANE_TOKENS) {
                        u32 n = own + t * (GATED ? 8 : 16) + (GATED ? place_in_half(tile_sum_row(i)) : tile_sum_row(i));
                        if (n >= outputs) continue;
                        float value = sum[t][m][i] * factor + (bias ? bias[matrix + n] : 0.0f), other = 0;
                        if (GATED) other = sum[t][m][(i + TILE_VALUES / 2) % TILE_VALUES] * factor + (bias ? bias[matrix + outputs + n] : 0.0f);
                        if (GATED || h)
                            h[(u64)pair * outputs + n] = to_f16(expert_activate(value, other, GATED ? activation : RELU2));
                        else
                            y[at * stride + column + n] = value * share;
                    }
            }
    }
}
