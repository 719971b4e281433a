// The main loop of products on the matrix cores: weights from memory to registers, x through LDS in stages.
//
// A wave takes TILES tiles of 16 rows of the matrix, for all rows of x. Weights go from memory straight to the registers that the
// matrix cores read, each once, and become float16 there. All waves of a block need the same x, which goes through LDS in stages,
// pipelined.
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
// The row of x, of TOGETHER, of the thread's e-th copy.
DEVICE u32 copied_row(u32 e) {
    Place p = place_of(THREAD + e * BLOCK);
    return p.tile * TILE_TOKENS + reader_token(p.reader);
}
DEVICE u32 in_stage(const Place &p) { return p.step * STEP_PIECES + (p.tile * 2 + p.i) * READERS + p.reader; }

// Starts the thread's copies of a stage of x, zeros past its ends. Without copy_async the pieces wait in registers for store_stage.
// at_row(e, m) is the row of x that is the m-th, of the thread's e-th copy.
template <typename Rows>
DEVICE void load_stage(const f16 *x, const Rows &at_row, u32 stage, u32 base, u32 rows, u32 inner, u32x4 (&to)[STAGE_PIECES], u32x4 (&pieces)[EACH]) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        if (STAGE_PIECES % BLOCK && THREAD + e * BLOCK >= STAGE_PIECES) continue;
        Place p = place_of(THREAD + e * BLOCK);
        u32 step = stage * STAGE_STEPS + p.step, turn = step / STEPS, group = step % STEPS / 2, half = step % 2;
        u32 k = piece_start(turn, reader_part(p.reader), group, 2 * half + p.i), m = base + p.tile * TILE_TOKENS + reader_token(p.reader);
        bool there = k < inner && m < rows;
        const u32x4 *from = (const u32x4 *)(x + (there ? at_row(e, m) * inner + k : 0));
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
    const u32 zero = HAS_ZEROS ? held.delta >> 16 : ZERO + (IS_SIGNED ? 128 : 0), away = (0xe400u + zero) * 0x10001u;
    UNROLL for (u32 i = 0; i < 4; ++i) {
        u32 codes = four_codes(held, index, group, 4 * half + i) ^ (IS_SIGNED ? 0x80808080u : 0u);
        UNROLL for (u32 j = 0; j < 2; ++j) {
            u32 two = add_f16x2(byte_perm(0x64646464u, codes, j ? 0x04030402u : 0x04010400u), away);
            weights[i].v[j] = fma_f16x2(two, factor, HAS_OFFSET && !HAS_ZEROS ? minus : 0);
        }
    }
#endif
}

// Adds the products of TOGETHER rows of x from `base` on, of `rows`, with the turns from `begin` to `end` of the wave's rows of the
// matrix. With PREFETCH or HAS_PDL, `held` has the first turn.
template <typename Rows>
DEVICE void multiply_turns(
    Sums &sum,
    u32x4 (&stages)[STAGES][STAGE_PIECES],
    Turn (&held)[PREFETCH + 1],
    const f16 *x,
    const Rows &at_row,
    const WEIGHT *weight,
    const Planes &planes,
    const u32 (&row)[TILES][TILE_LANE_ROWS],
    u32 base,
    u32 rows,
    u32 inner,
    u32 begin,
    u32 end
) {
    u32x4 pieces[EACH];
    u32 stage = begin * STEPS / STAGE_STEPS, last_stage = (end * STEPS + STAGE_STEPS - 1) / STAGE_STEPS, at = 0; // its place in LDS
    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
        if (stage + s < last_stage) load_stage(x, at_row, stage + s, base, rows, inner, stages[s], pieces);
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
                    if (stage + STAGES - 1 < last_stage) load_stage(x, at_row, stage + STAGES - 1, base, rows, inner, stages[last], pieces);
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
}
