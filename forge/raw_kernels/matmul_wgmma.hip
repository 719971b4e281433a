// Products of rows of x, TOKENS for each block, with a float16 matrix, as matmul.hip, by NVIDIA's wgmma, which reads LDS.
// Uses: tile, tile_mma, tile_lines, matmul_epilogue, tile_wgmma
// Target: sm_90a
//
// Weights and x go from memory to LDS by asynchronous copies of whole lines, STAGES - 1 stages ahead. Only the matrix cores read them
// there. A group of four waves (warpgroup) takes TILES tiles of 64 rows; each wave copies 16 rows of a tile. A step is a line of 64
// numbers of each row, a stage STAGE_STEPS steps.
// -D STAGES in LDS; LDS_BYTES=their size; STAGE_STEPS; TOKENS, TILES, BLOCK of matmul_epilogue.

struct Step {
    GroupRows<TOKENS> x;
    GroupRows<64> weights[WAVES / GROUP_WAVES][TILES];
};
struct Stage {
    Step steps[STAGE_STEPS];
};
static_assert(sizeof(Stage) * STAGES == LDS_BYTES, "another size than the host takes");
#define LANE_PIECES (16 * LINE / TILE_WAVE) // pieces of a tile that a lane copies
#define X_PIECES (STAGE_STEPS * TOKENS * LINE)

// The rows that a lane copies pieces of.
typedef const f16 *Rows[TILES][LANE_PIECES];
DEVICE void copy_weights(const Rows &rows, u32 stage, u32 inner, Stage &to) {
    u32 wave = THREAD / TILE_WAVE, piece = LANE % LINE;
    UNROLL for (u32 s = 0; s < STAGE_STEPS; ++s)
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 e = 0; e < LANE_PIECES; ++e) {
                u32 row = wave % GROUP_WAVES * 16 + (e * TILE_WAVE + LANE) / LINE, k = ((stage * STAGE_STEPS + s) * LINE + piece) * 8;
                bool there = k < inner;
                copy_async(&to.steps[s].weights[wave / GROUP_WAVES][t].v[row][line_place(row, piece)], (const u32x4 *)(rows[t][e] + (there ? k : 0)), there);
            }
}
DEVICE void copy_x(const f16 *x, u32 stage, u32 rows, u32 inner, Stage &to) {
    UNROLL for (u32 e = 0; e < (X_PIECES + BLOCK - 1) / BLOCK; ++e) {
        u32 n = e * BLOCK + THREAD, piece = n % LINE, row = n / LINE % TOKENS, s = n / LINE / TOKENS;
        if (X_PIECES % BLOCK && n >= X_PIECES) continue;
        u32 k = ((stage * STAGE_STEPS + s) * LINE + piece) * 8, token = FIRST_TOKEN + row;
        bool there = k < inner && token < rows;
        copy_async(&to.steps[s].x.v[row][line_place(row, piece)], (const u32x4 *)(x + (there ? token * inner + k : 0)), there);
    }
}

KERNEL(BLOCK) matmul_wgmma(
    const f16 *x,      // (M, K)
    const f16 *weight, // (N, K); with a gate N / 2 gates, then ups
    const float *bias, // (N,) or null
    float *y,          // (splits, M, stride) x @ weight.T + bias in the columns from `column` on
    f16 *gated,        // (M, N / 2) activation(gate) * up, or null; then y is not used
    u32 rows,          // M
    u32 inner,         // K
    u32 outer,         // N
    u32 stride,        // numbers from one row of y to the next
    u32 column,
    u32 accumulate, // 0 or 1: y is added to
    u32 gelu,       // 0 or 1: the activation is GELU, else SiLU
    u32 splits      // of the inner dimension
) {
    DYNAMIC_SHARED(Stage, stages, STAGES);
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    Rows own_rows;
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 e = 0; e < LANE_PIECES; ++e) own_rows[t][e] = weight + (u64)matrix_row(product, t, (e * TILE_WAVE + LANE) / LINE) * inner;
    // A split is whole stages.
    const u32 stage_weights = STAGE_STEPS * LINE * 8;
    u32 all = (inner + stage_weights - 1) / stage_weights, share = (all + splits - 1) / splits;
    u32 begin = BLOCK_Y * share < all ? BLOCK_Y * share : all, end = begin + share < all ? begin + share : all;

    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s)
        if (begin + s < end) copy_weights(own_rows, begin + s, inner, stages[s]);
    grid_dependency_sync();
    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
        if (begin + s < end) copy_x(x, begin + s, rows, inner, stages[s]);
        commit_copies();
    }
    Sums sum;
    clear_sums(sum);
    u32 at = 0; // the stage's place in LDS
    ROLLED for (u32 stage = begin; stage < end; ++stage) {
        u32 last = at == 0 ? STAGES - 1 : at - 1, next = stage + STAGES - 1;
        wait_copies<STAGES - 2>();
        UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
        group_landed();
        lds_barrier(); // the stage is there, and everything of the stage before was read
        UNROLL for (u32 s = 0; s < STAGE_STEPS; ++s)
            UNROLL for (u32 t = 0; t < TILES; ++t)
                group_multiply(sum[t], stages[at].steps[s].weights[THREAD / TILE_WAVE / GROUP_WAVES][t], stages[at].steps[s].x);
        if (next < end) {
            copy_weights(own_rows, next, inner, stages[last]);
            copy_x(x, next, rows, inner, stages[last]);
        }
        commit_copies();
        at = at + 1 == STAGES ? 0 : at + 1;
    }
    UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
    store_sums(product, sum, FIRST_TOKEN);
}
