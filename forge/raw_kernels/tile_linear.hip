// Products of 2 to 64 rows of x: y[m, column + n] = x[m] . weight[n] (+ bias[n]) (+ what y holds), on the matrix cores.
// Uses: _blocks, _tile, _tile_mma, _tile_mfma, _tile_wmma, _tile_scalar, _tile_product
//
// A wave takes TILES tiles of 16 rows of the matrix, for all rows of x. Weights go from memory to the registers that the
// matrix cores read, each once, and become float16 there. All waves of a block need the same x: it goes through LDS, a
// stage at a time, the next ones on their way meanwhile. A grid of few blocks takes a slice of the inner dimension in
// each, whose sums are arrays of their own: whoever reads them adds them.
// With a gate the matrix is two, one above the other, half of a tile's rows are of each, so that a lane has both sums, and
// gated[m, n] = activation(x[m] . weight[n]) * (x[m] . weight[n + half]).
// -D FORMAT=ggml's number of the type; WEIGHT=type of its first plane; AHEAD=1: weights of the next turn are on their way while
// one is computed; those of _tile_product.

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
#define NEIGHBOURS (FORMAT != F16) // a part's two pieces of a step

// Where in a row the i-th piece of a lane's group is, in its part of a turn.
DEVICE u32 piece_start(u32 turn, u32 part, u32 group, u32 i) {
#if FORMAT == F16
    return turn * TURN_WEIGHTS + (i * TILE_PARTS + part) * 8;
#else
    return group_start(turn * TILE_PARTS + part, group) + i * 8;
#endif
}
DEVICE Held read_held(const WEIGHT *weight, const Planes &planes, u32 row, u32 turn, u32 part, u32 inner) {
    Held held = {};
#if FORMAT == F16
    UNROLL for (u32 i = 0; i < 4; ++i) {
        u32 k = piece_start(turn, part, 0, i);
        if (k < inner) held.pieces[i] = read_once((const u32x4 *)(weight + (u64)row * inner + k));
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

KERNEL(BLOCK) tile_linear(const f16 *x, const WEIGHT *weight, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, f16 *gated, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate, u32 gelu, u32 slices) {
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

    auto start = [](u32 step, u32 part, u32 i) { return piece_start(step / STEPS, part, step % STEPS / 2, step % 2 * 2 + i); };

    Turn held[AHEAD + 1];
    if (AHEAD || STARTS_EARLY) read_turn(held[0], weight, planes, row, begin, end, inner);
    await_earlier();
    ROLLED for (u32 base = 0; base < TOKENS; base += TOGETHER) {
        Sums sum;
        clear_sums(sum);
        if (base >= rows) break;
        if (base) { // of the tokens before, everything was read
            lds_barrier();
            if (AHEAD || STARTS_EARLY) read_turn(held[0], weight, planes, row, begin, end, inner);
        }
        u32x4 pieces[EACH];
        u32 stage = begin * STEPS / STAGE_STEPS, last_stage = (end * STEPS + STAGE_STEPS - 1) / STAGE_STEPS, at = 0; // where it lies
        UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
            if (stage + s < last_stage) bring_stage<NEIGHBOURS>(x, stage + s, base, rows, inner, stages[s], pieces, start);
#if ASYNC
            end_copies();
#else
            land_stage<NEIGHBOURS>(stages[s], pieces);
#endif
        }
        auto take_turn = [&](u32 turn, Turn &own, Turn &next) {
            if (AHEAD)
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
                        if (stage + STAGES - 1 < last_stage) bring_stage<NEIGHBOURS>(x, stage + STAGES - 1, base, rows, inner, stages[last], pieces, start);
#if ASYNC
                        end_copies();
#endif
                    }
                    StepWeights weights;
                    UNROLL for (u32 t = 0; t < TILES; ++t)
                        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                            take_pair(own[t][r], turn * TILE_PARTS + tile_part(), group, half, weights[t][r]);
                    multiply_step(sum, weights, stages[at] + step % STAGE_STEPS * STEP_PIECES);
                    if (step % STAGE_STEPS == STAGE_STEPS - 1) {
#if !ASYNC
                        if (stage + 1 < last_stage) land_stage<NEIGHBOURS>(stages[last], pieces);
#endif
                        ++stage;
                        at = at + 1 == STAGES ? 0 : at + 1;
                    }
                }
        };
        ROLLED for (u32 turn = begin; turn < end; turn += AHEAD + 1) { // what is ahead needs no copy
            take_turn(turn, held[0], held[AHEAD]);
            if (AHEAD && turn + 1 < end) take_turn(turn + 1, held[AHEAD], held[0]);
        }
        store_sums(product, sum, base);
    }
}
