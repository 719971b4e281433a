// Products of rows of x, TOKENS for each block, with a float16 or quantized matrix, on the matrix cores.
// Uses: quant_blocks, tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, matmul_epilogue
//
// A wave takes TILES tiles of 16 rows of the matrix, for all rows of x. Weights go from memory straight to the registers that the
// matrix cores read, each once, and become float16 there. All waves of a block need the same x, which goes through LDS in stages,
// pipelined. Split-K: where the rows of the matrix give few blocks, several share the inner dimension, and each stores partial sums
// for split_k_reduce or the kernel that reads y.
// -D FORMAT=ggml's number of the type; WEIGHT=type of its first plane; PREFETCH=1: the weights of the next turn are loaded while one
// is computed; STAGE_STEPS; TOKENS, TILES, BLOCK of matmul_epilogue.

#define STAGES (HAS_COPY_ASYNC ? 3 : 2)

// A lane's weights of a row for one turn of the main loop: groups of 32 numbers, each two steps of two pieces of 8.
#if FORMAT == F16
#define GROUPS 1
struct RowWeights {
    u32x4 pieces[4];
};
#else
#define IS_SIGNED (FORMAT == Q8_0 || NONLINEAR)
typedef Unit RowWeights;
#endif
#define TURN_WEIGHTS (32 * GROUPS * TILE_PARTS)
#define STEPS (2 * GROUPS) // of a turn; a step is 16 numbers of each part
#if GROUPS > 2
#define EACH_GROUP ROLLED // unrolled they take too many registers
#else
#define EACH_GROUP UNROLL
#endif

// A stage of x in LDS is STAGE_STEPS steps, in the order in which lanes read it: the pieces of a wave's readers lie beside each other.
#define READERS (TILE_PARTS * TILE_TOKENS)
#define STEP_PIECES (TOKEN_TILES * 2 * READERS)
#define STAGE_PIECES (STAGE_STEPS * STEP_PIECES)
#define EACH ((STAGE_PIECES + BLOCK - 1) / BLOCK) // pieces that a thread copies

// Where in a row the i-th piece of a group begins, in a part of a turn.
DEVICE u32 piece_start(u32 turn, u32 part, u32 group, u32 i) {
#if FORMAT == F16
    return turn * TURN_WEIGHTS + (i * TILE_PARTS + part) * 8;
#else
    return group_start(turn * TILE_PARTS + part, group) + i * 8;
#endif
}

// Which piece of a stage the n-th copy is. Except with F16 the two pieces of a part are neighbours in x, and neighbouring threads copy
// them.
struct Place {
    u32 step, tile, i, reader;
};
DEVICE Place place_of(u32 n) {
    const bool paired = FORMAT != F16;
    return Place{n / STEP_PIECES, n / READERS / 2 % TOKEN_TILES, (paired ? n : n / READERS) % 2, (paired ? n / 2 : n) % READERS};
}
DEVICE u32 in_stage(const Place &p) { return p.step * STEP_PIECES + (p.tile * 2 + p.i) * READERS + p.reader; }

// Starts the thread's copies of a stage of x, zeros past its ends. Without copy_async the pieces wait in registers for store_stage.
DEVICE void load_stage(const f16 *x, u32 stage, u32 base, u32 rows, u32 inner, u32x4 (&to)[STAGE_PIECES], u32x4 (&pieces)[EACH]) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        if (STAGE_PIECES % BLOCK && THREAD + e * BLOCK >= STAGE_PIECES) continue;
        Place p = place_of(THREAD + e * BLOCK);
        u32 step = stage * STAGE_STEPS + p.step, turn = step / STEPS, group = step % STEPS / 2, half = step % 2;
        u32 k = piece_start(turn, reader_part(p.reader), group, 2 * half + p.i), m = base + p.tile * TILE_TOKENS + reader_token(p.reader);
        bool there = k < inner && m < rows;
        const u32x4 *from = (const u32x4 *)(x + (there ? m * inner + k : 0));
        if (HAS_COPY_ASYNC) {
            copy_async(&to[in_stage(p)], from, there);
            continue;
        }
        u32x4 piece = {}; // word by word, because clang keeps in memory what is only copied as a whole
        if (there)
            UNROLL for (u32 w = 0; w < 4; ++w) piece.v[w] = from->v[w];
        UNROLL for (u32 w = 0; w < 4; ++w) pieces[e].v[w] = piece.v[w];
    }
}
DEVICE void store_stage(u32x4 (&to)[STAGE_PIECES], const u32x4 (&pieces)[EACH]) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        if (STAGE_PIECES % BLOCK && THREAD + e * BLOCK >= STAGE_PIECES) continue;
        u32x4 &own = to[in_stage(place_of(THREAD + e * BLOCK))];
        UNROLL for (u32 w = 0; w < 4; ++w) own.v[w] = pieces[e].v[w];
    }
}

DEVICE RowWeights load_row_weights(const WEIGHT *weight, const Planes &planes, u32 row, u32 turn, u32 part, u32 inner) {
    RowWeights held = {};
#if FORMAT == F16
    UNROLL for (u32 i = 0; i < 4; ++i) {
        u32 k = piece_start(turn, part, 0, i);
        if (k < inner) held.pieces[i] = load_streaming((const u32x4 *)(weight + (u64)row * inner + k));
    }
#else
    u32 units = inner / UNIT_WEIGHTS, unit = turn * TILE_PARTS + part;
    if (unit < units) held = read_unit(planes, (u64)row * units + unit);
#endif
    return held;
}

// A lane's weights of a turn. Nothing is read past the last.
typedef RowWeights Turn[TILES][TILE_LANE_ROWS];
DEVICE void load_turn(Turn &to, const WEIGHT *weight, const Planes &planes, const u32 (&row)[TILES][TILE_LANE_ROWS], u32 turn, u32 end, u32 inner) {
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
            to[t][r] = load_row_weights(weight, planes, row[t][r], turn, tile_part(), turn < end ? inner : 0);
}

// 16 weights as float16, four in each f16_quad.
DEVICE void dequantize_step(const RowWeights &held, u32 unit, u32 group, u32 half, f16_quad (&weights)[4]) {
#if FORMAT == F16
    UNROLL for (u32 i = 0; i < 8; ++i) weights[i / 2].v[i % 2] = held.pieces[2 * half + i / 4].v[i % 4];
#else
    u32 index = unit % UNITS_PER_BLOCK;
    float scale, offset;
    group_scale(held, index, group, HALVES == 2 ? half : 0, scale, offset);
    u32 factor = to_f16(scale).bits, minus = to_f16(-offset).bits;
    factor |= factor << 16, minus |= minus << 16;
    // The float16 1024 + n has the bits 0x6400 | n. Subtracting what was added is exact.
    const u32 zero = ZERO + (IS_SIGNED ? 128 : 0), away = (0xe400u + zero) * 0x10001u;
    UNROLL for (u32 i = 0; i < 4; ++i) {
        u32 codes = four_codes(held, index, group, 4 * half + i) ^ (IS_SIGNED ? 0x80808080u : 0u);
        UNROLL for (u32 j = 0; j < 2; ++j) {
            u32 two = add_f16x2(byte_perm(0x64646464u, codes, j ? 0x04030402u : 0x04010400u), away);
            weights[i].v[j] = fma_f16x2(two, factor, HAS_OFFSET ? minus : 0);
        }
    }
#endif
}

KERNEL(BLOCK) matmul(
    const f16 *x,         // (M, K)
    const WEIGHT *weight, // (N, K) or its first plane, see quant_blocks.hip; with a gate N / 2 gates, then ups
    const u8 *high,       // the other planes, or null
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
    SHARED u32x4 stages[STAGES][STAGE_PIECES];
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    Planes planes{(const u8 *)weight, high, scales, deltas};
    u32 row[TILES][TILE_LANE_ROWS];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) row[t][r] = matrix_row(product, t, tile_row(r));
    // A split is whole turns and whole stages.
    const u32 whole = STAGE_STEPS > STEPS ? STAGE_STEPS / STEPS : 1;
    u32 turns = (inner + TURN_WEIGHTS - 1) / TURN_WEIGHTS, share = (turns + splits * whole - 1) / (splits * whole) * whole;
    u32 begin = BLOCK_Y * share < turns ? BLOCK_Y * share : turns, end = begin + share < turns ? begin + share : turns;

    Turn held[PREFETCH + 1];
    if (PREFETCH || HAS_PDL) load_turn(held[0], weight, planes, row, begin, end, inner);
    grid_dependency_sync();
    ROLLED for (u32 base = FIRST_TOKEN; base < FIRST_TOKEN + TOKENS; base += TOGETHER) {
        Sums sum;
        clear_sums(sum);
        if (base >= rows) break;
        if (base > FIRST_TOKEN) { // everything of the tokens before was read
            lds_barrier();
            if (PREFETCH || HAS_PDL) load_turn(held[0], weight, planes, row, begin, end, inner);
        }
        u32x4 pieces[EACH];
        u32 stage = begin * STEPS / STAGE_STEPS, last_stage = (end * STEPS + STAGE_STEPS - 1) / STAGE_STEPS, at = 0; // its place in LDS
        UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
            if (stage + s < last_stage) load_stage(x, stage + s, base, rows, inner, stages[s], pieces);
            if (!HAS_COPY_ASYNC) store_stage(stages[s], pieces);
            commit_copies();
        }
        auto multiply_turn = [&](u32 turn, Turn &own, Turn &next) {
            if (PREFETCH)
                load_turn(next, weight, planes, row, turn + 1, end, inner);
            else if (!HAS_PDL || turn > begin)
                load_turn(own, weight, planes, row, turn, end, inner);
            EACH_GROUP for (u32 group = 0; group < GROUPS; ++group)
                UNROLL for (u32 half = 0; half < 2; ++half) {
                    u32 step = turn * STEPS + group * 2 + half, last = at == 0 ? STAGES - 1 : at - 1; // the place of the stage before
                    if (step % STAGE_STEPS == 0) {
                        wait_copies<STAGES - 2>();
                        lds_barrier(); // the stage is there, and everything of the stage before was read
                        if (stage + STAGES - 1 < last_stage) load_stage(x, stage + STAGES - 1, base, rows, inner, stages[last], pieces);
                        commit_copies();
                    }
                    const u32x4 *own_x = stages[at] + step % STAGE_STEPS * STEP_PIECES + LANE % READERS;
                    f16_quad weights[TILES][TILE_LANE_ROWS][4];
                    UNROLL for (u32 t = 0; t < TILES; ++t)
                        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                            dequantize_step(own[t][r], turn * TILE_PARTS + tile_part(), group, half, weights[t][r]);
                    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                        f16_quad quads[4];
                        UNROLL for (u32 i = 0; i < 2; ++i) {
                            u32x4 piece = own_x[(m * 2 + i) * READERS];
                            quads[2 * i] = u32x2{{piece.v[0], piece.v[1]}}, quads[2 * i + 1] = u32x2{{piece.v[2], piece.v[3]}};
                        }
                        UNROLL for (u32 t = 0; t < TILES; ++t) tile_multiply(sum[t][m], weights[t], quads);
                    }
                    if (step % STAGE_STEPS == STAGE_STEPS - 1) {
                        if (!HAS_COPY_ASYNC && stage + 1 < last_stage) store_stage(stages[last], pieces);
                        ++stage;
                        at = at + 1 == STAGES ? 0 : at + 1;
                    }
                }
        };
        ROLLED for (u32 turn = begin; turn < end; turn += PREFETCH + 1) { // two turns, so that prefetched weights need no copy
            multiply_turn(turn, held[0], held[PREFETCH]);
            if (PREFETCH && turn + 1 < end) multiply_turn(turn + 1, held[PREFETCH], held[0]);
        }
        store_sums(product, sum, base);
    }
}
