// Products of 2 to 64 rows of x: y[m, column + n] = x[m] . weight[n] (+ bias[n]) (+ what y holds), on the matrix cores.
// Uses: quant_blocks, tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, matmul_epilogue
//
// A wave takes TILES tiles of 16 rows of the matrix, for all rows of x. Weights go from memory to the registers that the
// matrix cores read, each once, and become float16 there. All waves of a block need the same x: it goes through LDS, a
// stage at a time, the next ones on their way meanwhile. A grid of few blocks takes a slice of the inner dimension in
// each, whose sums are arrays of their own: whoever reads them adds them.
// With a gate the matrix is two, one above the other, half of a tile's rows are of each, so that a lane has both sums, and
// gated[m, n] = activation(x[m] . weight[n]) * (x[m] . weight[n + half]).
// -D FORMAT=ggml's number of the type; WEIGHT=type of its first plane; PREFETCH=1: weights of the next turn are on their way while
// one is computed; STAGE_STEPS; those of matmul_epilogue.

#define STAGES (ASYNC ? 3 : 2)

// What a lane holds of a row for a turn: groups of 32 numbers, in two pairs of two pieces of 8.
#if FORMAT == F16
#define GROUPS 1
struct Held {
    u32x4 pieces[4];
};
#else
#define IS_SIGNED (FORMAT == Q8_0 || NONLINEAR)
typedef Unit Held;
#endif
#define TURN_WEIGHTS (32 * GROUPS * TILE_PARTS)
#define STEPS (2 * GROUPS) // of a turn
#if GROUPS > 2
#define EACH_GROUP ROLLED // they would hold too many registers together
#else
#define EACH_GROUP UNROLL
#endif

// A step is a pair of all parts, a stage STAGE_STEPS of them; it lies in LDS as lanes read it, the pieces of a wave's readers
// beside each other.
#define READERS (TILE_PARTS * TILE_TOKENS)
#define STEP_PIECES (TOKEN_TILES * 2 * READERS)
#define STAGE_PIECES (STAGE_STEPS * STEP_PIECES)
#define EACH ((STAGE_PIECES + BLOCK - 1) / BLOCK) // pieces that a thread brings

// Where in a row the i-th piece of a lane's group is, in its part of a turn.
DEVICE u32 piece_start(u32 turn, u32 part, u32 group, u32 i) {
#if FORMAT == F16
    return turn * TURN_WEIGHTS + (i * TILE_PARTS + part) * 8;
#else
    return group_start(turn * TILE_PARTS + part, group) + i * 8;
#endif
}

// Where a piece lies in a stage, and the two pieces of a part, which are neighbours in x but with F16: they are brought by
// neighbouring threads.
struct Place {
    u32 step, tile, i, reader;
};
DEVICE Place place_of(u32 n) {
    const bool paired = FORMAT != F16;
    return Place{n / STEP_PIECES, n / READERS / 2 % TOKEN_TILES, (paired ? n : n / READERS) % 2, (paired ? n / 2 : n) % READERS};
}
DEVICE u32 in_stage(const Place &p) { return p.step * STEP_PIECES + (p.tile * 2 + p.i) * READERS + p.reader; }

// A thread's pieces of a stage of x are sent for, zeros where there are none; where nothing goes past the registers, they come
// to LDS by land_stage.
DEVICE void bring_stage(const f16 *x, u32 stage, u32 base, u32 rows, u32 inner, u32x4 (&to)[STAGE_PIECES], u32x4 (&pieces)[EACH]) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        if (STAGE_PIECES % BLOCK && THREAD + e * BLOCK >= STAGE_PIECES) continue;
        Place p = place_of(THREAD + e * BLOCK);
        u32 step = stage * STAGE_STEPS + p.step, turn = step / STEPS, group = step % STEPS / 2, half = step % 2;
        u32 k = piece_start(turn, reader_part(p.reader), group, 2 * half + p.i), m = base + p.tile * TILE_TOKENS + reader_token(p.reader);
        bool there = k < inner && m < rows;
        const u32x4 *from = (const u32x4 *)(x + (there ? m * inner + k : 0));
#if ASYNC
        copy_async(&to[in_stage(p)], from, there);
#else
        u32x4 piece = {}; // word by word: what is only copied as a whole, clang would keep in memory
        if (there)
            UNROLL for (u32 w = 0; w < 4; ++w) piece.v[w] = from->v[w];
        UNROLL for (u32 w = 0; w < 4; ++w) pieces[e].v[w] = piece.v[w];
#endif
    }
}
#if !ASYNC
DEVICE void land_stage(u32x4 (&to)[STAGE_PIECES], const u32x4 (&pieces)[EACH]) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        if (STAGE_PIECES % BLOCK && THREAD + e * BLOCK >= STAGE_PIECES) continue;
        u32x4 &own = to[in_stage(place_of(THREAD + e * BLOCK))];
        UNROLL for (u32 w = 0; w < 4; ++w) own.v[w] = pieces[e].v[w];
    }
}
#endif

DEVICE Held read_held(const WEIGHT *weight, const Planes &planes, u32 row, u32 turn, u32 part, u32 inner) {
    Held held = {};
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

// A lane's weights of a turn; of one behind the last, nothing is read.
typedef Held Turn[TILES][TILE_LANE_ROWS];
DEVICE void read_turn(Turn &to, const WEIGHT *weight, const Planes &planes, const u32 (&row)[TILES][TILE_LANE_ROWS], u32 turn, u32 end, u32 inner) {
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
            to[t][r] = read_held(weight, planes, row[t][r], turn, tile_part(), turn < end ? inner : 0);
}

// 16 weights: four words of four.
DEVICE void take_pair(const Held &held, u32 unit, u32 group, u32 half, f16_quad (&weights)[4]) {
#if FORMAT == F16
    UNROLL for (u32 i = 0; i < 8; ++i) weights[i / 2].v[i % 2] = held.pieces[2 * half + i / 4].v[i % 4];
#else
    u32 index = unit % UNITS_PER_BLOCK;
    float scale, offset;
    group_scale(held, index, group, HALVES == 2 ? half : 0, scale, offset);
    u32 factor = to_f16(scale).bits, minus = to_f16(-offset).bits;
    factor |= factor << 16, minus |= minus << 16;
    // The float16 1024 + n holds the integer n in its last bits: 0x6400 | n. What was added is taken away exactly.
    const u32 zero = ZERO + (IS_SIGNED ? 128 : 0), away = (0xe400u + zero) * 0x10001u;
    UNROLL for (u32 i = 0; i < 4; ++i) {
        u32 codes = four_codes(held, index, group, 4 * half + i) ^ (IS_SIGNED ? 0x80808080u : 0u);
        UNROLL for (u32 j = 0; j < 2; ++j) {
            u32 two = halves_add(pick_bytes(0x64646464u, codes, j ? 0x04030402u : 0x04010400u), away);
            weights[i].v[j] = halves_fma(two, factor, HAS_OFFSET ? minus : 0);
        }
    }
#endif
}

KERNEL(BLOCK) matmul(const f16 *x, const WEIGHT *weight, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, f16 *gated, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate, u32 gelu, u32 slices) {
    SHARED u32x4 stages[STAGES][STAGE_PIECES];
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    Planes planes{(const u8 *)weight, high, scales, deltas};
    u32 row[TILES][TILE_LANE_ROWS];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) row[t][r] = matrix_row(product, t, tile_row(r));
    // Slices are whole turns and whole stages.
    const u32 whole = STAGE_STEPS > STEPS ? STAGE_STEPS / STEPS : 1;
    u32 turns = (inner + TURN_WEIGHTS - 1) / TURN_WEIGHTS, share = (turns + slices * whole - 1) / (slices * whole) * whole;
    u32 begin = BLOCK_Y * share < turns ? BLOCK_Y * share : turns, end = begin + share < turns ? begin + share : turns;

    Turn held[PREFETCH + 1];
    if (PREFETCH || STARTS_EARLY) read_turn(held[0], weight, planes, row, begin, end, inner);
    grid_dependency_sync();
    ROLLED for (u32 base = 0; base < TOKENS; base += TOGETHER) {
        Sums sum;
        clear_sums(sum);
        if (base >= rows) break;
        if (base) { // of the tokens before, everything was read
            lds_barrier();
            if (PREFETCH || STARTS_EARLY) read_turn(held[0], weight, planes, row, begin, end, inner);
        }
        u32x4 pieces[EACH];
        u32 stage = begin * STEPS / STAGE_STEPS, last_stage = (end * STEPS + STAGE_STEPS - 1) / STAGE_STEPS, at = 0; // where it lies
        UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
            if (stage + s < last_stage) bring_stage(x, stage + s, base, rows, inner, stages[s], pieces);
#if ASYNC
            end_copies();
#else
            land_stage(stages[s], pieces);
#endif
        }
        auto take_turn = [&](u32 turn, Turn &own, Turn &next) {
            if (PREFETCH)
                read_turn(next, weight, planes, row, turn + 1, end, inner);
            else if (!STARTS_EARLY || turn > begin)
                read_turn(own, weight, planes, row, turn, end, inner);
            EACH_GROUP for (u32 group = 0; group < GROUPS; ++group)
                UNROLL for (u32 half = 0; half < 2; ++half) {
                    u32 step = turn * STEPS + group * 2 + half, last = at == 0 ? STAGES - 1 : at - 1; // where the stage before lay
                    if (step % STAGE_STEPS == 0) {
#if ASYNC
                        await_copies<STAGES - 2>();
#endif
                        lds_barrier(); // the stage is there, and of the one before everything was read
                        if (stage + STAGES - 1 < last_stage) bring_stage(x, stage + STAGES - 1, base, rows, inner, stages[last], pieces);
#if ASYNC
                        end_copies();
#endif
                    }
                    const u32x4 *own_x = stages[at] + step % STAGE_STEPS * STEP_PIECES + LANE % READERS;
                    f16_quad weights[TILES][TILE_LANE_ROWS][4];
                    UNROLL for (u32 t = 0; t < TILES; ++t)
                        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                            take_pair(own[t][r], turn * TILE_PARTS + tile_part(), group, half, weights[t][r]);
                    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                        f16_quad quads[4];
                        UNROLL for (u32 i = 0; i < 2; ++i) {
                            u32x4 piece = own_x[(m * 2 + i) * READERS];
                            quads[2 * i] = u32x2{{piece.v[0], piece.v[1]}}, quads[2 * i + 1] = u32x2{{piece.v[2], piece.v[3]}};
                        }
                        UNROLL for (u32 t = 0; t < TILES; ++t) tile_multiply(sum[t][m], weights[t], quads);
                    }
                    if (step % STAGE_STEPS == STAGE_STEPS - 1) {
#if !ASYNC
                        if (stage + 1 < last_stage) land_stage(stages[last], pieces);
#endif
                        ++stage;
                        at = at + 1 == STAGES ? 0 : at + 1;
                    }
                }
        };
        ROLLED for (u32 turn = begin; turn < end; turn += PREFETCH + 1) { // what is ahead needs no copy
            take_turn(turn, held[0], held[PREFETCH]);
            if (PREFETCH && turn + 1 < end) take_turn(turn + 1, held[PREFETCH], held[0]);
        }
        store_sums(product, sum, base);
    }
}
