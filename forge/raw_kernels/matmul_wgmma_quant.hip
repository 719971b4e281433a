// Products of rows of x, TOKENS for each block, with a quantized matrix, as matmul.hip, by NVIDIA's wgmma, which takes weights
// from registers and x from LDS.
// Uses: quant_blocks, tile, tile_mma, tile_lines, matmul_epilogue, tile_wgmma, tile_bits, quant_lines
// Target: sm_90a
//
// A stage is a line of 256 weights of each row of the block. Its planes go to LDS by asynchronous copies of whole lines, STAGES - 1
// stages ahead, so that memory never waits for arithmetic. Each wave reads only rows that its own lanes have copied: 16 of each of its
// TILES tiles. A lane makes float16 of a part, 64 of the 256 weights, of two rows of a tile, in the registers that wgmma takes them
// from. All waves need x, which goes through registers into the order of the lanes' parts: a step of 16 numbers is four of each part,
// the first and the third as a pair, then the second and the fourth, because so codes come out of their words.
// The inner dimension is a multiple of 256.
// -D FORMAT=ggml's number of the type; STAGES in LDS; LDS_BYTES=their size and that of x; TOKENS, TILES, BLOCK of matmul_epilogue; no MORE_TOKENS.

#define X_TASKS (QUARTERS * 4 * TOKENS)        // a task is a step: 4 numbers of each part
#define X_EACH ((X_TASKS + BLOCK - 1) / BLOCK) // tasks of a thread

struct Memory {
    GroupRows<TOKENS> x[2][QUARTERS];
    WaveStage stages[STAGES][WAVES];
};
static_assert(sizeof(Memory) == LDS_BYTES, "another size than the host takes");

// A task's x, in registers until the next line's are stored.
struct XTask {
    u32x2 numbers[PARTS];
};
struct XPlace {
    u32 quarter, token, step; // of the quarter's four
};
DEVICE XPlace x_place(u32 n) { return XPlace{n / 8 % QUARTERS, n / 8 / QUARTERS * 2 + n / 4 % 2, n % 4}; }
DEVICE void load_x(XTask (&tasks)[X_EACH], const f16 *x, u32 line, u32 rows, u32 inner) {
    UNROLL for (u32 e = 0; e < X_EACH; ++e) {
        XPlace p = x_place(e * BLOCK + THREAD);
        Quarter q = quarter_of(p.quarter);
        bool there = (X_TASKS % BLOCK == 0 || e * BLOCK + THREAD < X_TASKS) && p.token < rows;
        UNROLL for (u32 c = 0; c < PARTS; ++c) {
            u32 start = FORMAT == Q6_K ? c / 2 * 128 + c % 2 * 32 + q.group * 64 : c * 64 + q.group * 32;
            u32x2 numbers = {};
            if (there) numbers = *(const u32x2 *)(x + p.token * inner + line * LINE_WEIGHTS + start + q.half * 16 + p.step * 4);
            tasks[e].numbers[c] = numbers;
        }
    }
}
DEVICE void store_x(GroupRows<TOKENS> (&to)[QUARTERS], const XTask (&tasks)[X_EACH]) {
    UNROLL for (u32 e = 0; e < X_EACH; ++e) {
        if (X_TASKS % BLOCK && e * BLOCK + THREAD >= X_TASKS) continue;
        XPlace p = x_place(e * BLOCK + THREAD);
        UNROLL for (u32 j = 0; j < 2; ++j) {
            u32x4 words;
            UNROLL for (u32 c = 0; c < PARTS; ++c)
                words.v[c] = byte_perm(tasks[e].numbers[c].v[1], tasks[e].numbers[c].v[0], j ? 0x07060302u : 0x05040100u);
            to[p.quarter].v[p.token][line_place(p.token, p.step * 2 + j)] = words;
        }
    }
}

KERNEL(BLOCK) matmul_wgmma_quant(
    const f16 *x,     // (M, K)
    const u8 *weight, // the planes of (N, K), see quant_blocks.hip; with a gate N / 2 gates, then ups
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
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
    DYNAMIC_SHARED(Memory, memory, 1);
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    Planes planes{weight, high, scales, deltas};
    u32 wave = THREAD / TILE_WAVE, lines = inner / LINE_WEIGHTS, share = (lines + splits - 1) / splits;
    u32 begin = BLOCK_Y * share < lines ? BLOCK_Y * share : lines, end = begin + share < lines ? begin + share : lines;
    const OwnPlace own = own_place();
    LineCopies copies;
    prepare_line(copies, product, lines);
    u32 own_rows[TILES][TILE_LANE_ROWS];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) own_rows[t][r] = matrix_row(product, t, tile_row(r));

    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
        if (begin + s < end) copy_weights(memory[0].stages[s][wave], copies, planes, begin + s);
        commit_copies();
    }
    Rests rests, next_rests;
    if (begin < end) load_rests(rests, planes, own_rows, lines, begin);
    grid_dependency_sync();
    XTask tasks[X_EACH];
    if (begin < end) {
        load_x(tasks, x, begin, rows, inner);
        store_x(memory[0].x[0], tasks);
    }
    Sums sum;
    clear_sums(sum);
    const Masks masks = masks_of();
    u32 weights[2][4][4]; // of the quarter that is multiplied, and of the next
    u32 at = 0, x_at = 0; // the stage's place in LDS, and that of x
    ROLLED for (u32 line = begin; line < end; ++line) {
        wait_copies<STAGES - 2>();
        wave_sync();
        const WaveStage &stage = memory[0].stages[at][wave];
        Codes codes[TILES][TILE_LANE_ROWS];
        Factors factors[TILES][TILE_LANE_ROWS];
        UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
        group_landed();
        lds_barrier(); // x is there, and everything of the line before was read
        u32 last = at == 0 ? STAGES - 1 : at - 1, next = line + STAGES - 1;
        if (line + 1 < end) load_x(tasks, x, line + 1, rows, inner);
        if (next < end) copy_weights(memory[0].stages[last][wave], copies, planes, next);
        commit_copies();
        if (line + 1 < end) load_rests(next_rests, planes, own_rows, lines, line + 1);
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 n = 0; n < QUARTERS; ++n) {
                const u32 since = t * QUARTERS + n; // products since all were awaited
                Quarter q = quarter_of(n);
                if (since >= 2) group_await_but<1>(); // what was in these registers has been multiplied
                u32(&fresh)[4][4] = weights[since % 2];
                UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
                    u32 row = t * 16 + 8 * r, pairs[4][2];
                    if (FORMAT == Q8_0 || n % 2 == 0) read_codes(codes[t][r], stage, own, row, q);
                    if (HALVES == 2 || !IS_K ? n % 2 == 0 : n == 0) factors[t][r] = factors_of(stage, rests[t][r], own, row, q);
                    dequantize_quarter(codes[t][r], q, factors[t][r], masks, pairs);
                    UNROLL for (u32 i = 0; i < 4; ++i)
                        UNROLL for (u32 j = 0; j < 2; ++j) fresh[i][2 * j + r] = pairs[i][j];
                }
                group_multiply(sum[t], fresh, memory[0].x[x_at][n]);
            }
        if (line + 1 < end) store_x(memory[0].x[x_at ^ 1], tasks);
        x_at ^= 1;
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) rests[t][r] = next_rests[t][r];
        at = at + 1 == STAGES ? 0 : at + 1;
    }
    UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
    store_sums(product, sum, 0);
}
