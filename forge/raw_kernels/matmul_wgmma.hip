// Products of 2 to 64 rows of x with a float16 matrix, as in matmul, by matrix instructions that read LDS.
// Uses: tile, tile_mma, matmul_epilogue, tile_wgmma
// Target: sm_90a
//
// Weights go from memory to LDS past the registers, as x does: asked for whole lines of a row at a time, as many stages ahead as
// there is LDS for, and read there by none but the matrix cores. A group of four waves takes TILES tiles of 64 rows, of each of
// which a wave brings 16.
// -D STAGES that lie in LDS, and LDS_BYTES=their size; those of matmul_epilogue. A step is a line of 64 numbers of each row, a
// stage STAGE_STEPS of them.

struct Step {
    GroupRows<TOKENS> x;
    GroupRows<64> weights[WAVES / GROUP_WAVES][TILES];
};
struct Stage {
    Step steps[STAGE_STEPS];
};
static_assert(sizeof(Stage) * STAGES == LDS_BYTES, "another size than the host takes");
#define LANE_PIECES (16 * LINE / TILE_WAVE) // that a lane brings of its wave's rows of a tile
#define X_PIECES (STAGE_STEPS * TOKENS * LINE)

// Where the rows begin that a lane brings pieces of.
typedef const f16 *Rows[TILES][LANE_PIECES];
DEVICE void bring_weights(const Rows &rows, u32 stage, u32 inner, Stage &to) {
    u32 wave = THREAD / TILE_WAVE, piece = LANE % LINE;
    UNROLL for (u32 s = 0; s < STAGE_STEPS; ++s)
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 e = 0; e < LANE_PIECES; ++e) {
                u32 row = wave % GROUP_WAVES * 16 + (e * TILE_WAVE + LANE) / LINE, k = ((stage * STAGE_STEPS + s) * LINE + piece) * 8;
                bool there = k < inner;
                copy_async(&to.steps[s].weights[wave / GROUP_WAVES][t].v[row][line_place(row, piece)], (const u32x4 *)(rows[t][e] + (there ? k : 0)), there);
            }
}
DEVICE void bring_x(const f16 *x, u32 stage, u32 rows, u32 inner, Stage &to) {
    UNROLL for (u32 e = 0; e < (X_PIECES + BLOCK - 1) / BLOCK; ++e) {
        u32 n = e * BLOCK + THREAD, piece = n % LINE, token = n / LINE % TOKENS, s = n / LINE / TOKENS;
        if (X_PIECES % BLOCK && n >= X_PIECES) continue;
        u32 k = ((stage * STAGE_STEPS + s) * LINE + piece) * 8;
        bool there = k < inner && token < rows;
        copy_async(&to.steps[s].x.v[token][line_place(token, piece)], (const u32x4 *)(x + (there ? token * inner + k : 0)), there);
    }
}

KERNEL(BLOCK) matmul_wgmma(const f16 *x, const f16 *weight, const float *bias, float *y, f16 *gated, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate, u32 gelu, u32 slices) {
    DYNAMIC_SHARED(Stage, stages, STAGES);
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    Rows own_rows;
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 e = 0; e < LANE_PIECES; ++e) own_rows[t][e] = weight + (u64)matrix_row(product, t, (e * TILE_WAVE + LANE) / LINE) * inner;
    // Slices are whole stages.
    const u32 stage_weights = STAGE_STEPS * LINE * 8;
    u32 all = (inner + stage_weights - 1) / stage_weights, share = (all + slices - 1) / slices;
    u32 begin = BLOCK_Y * share < all ? BLOCK_Y * share : all, end = begin + share < all ? begin + share : all;

    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s)
        if (begin + s < end) bring_weights(own_rows, begin + s, inner, stages[s]);
    grid_dependency_sync();
    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
        if (begin + s < end) bring_x(x, begin + s, rows, inner, stages[s]);
        end_copies();
    }
    Sums sum;
    clear_sums(sum);
    u32 at = 0; // where the stage lies
    ROLLED for (u32 stage = begin; stage < end; ++stage) {
        u32 last = at == 0 ? STAGES - 1 : at - 1, next = stage + STAGES - 1;
        await_copies<STAGES - 2>();
        UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
        group_landed();
        lds_barrier(); // the stage is there, and of the one before everything was read
        UNROLL for (u32 s = 0; s < STAGE_STEPS; ++s)
            UNROLL for (u32 t = 0; t < TILES; ++t)
                group_multiply(sum[t], stages[at].steps[s].weights[THREAD / TILE_WAVE / GROUP_WAVES][t], stages[at].steps[s].x);
        if (next < end) {
            bring_weights(own_rows, next, inner, stages[last]);
            bring_x(x, next, rows, inner, stages[last]);
        }
        end_copies();
        at = at + 1 == STAGES ? 0 : at + 1;
    }
    UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
    store_sums(product, sum, 0);
}
