// Products of 2 to 64 rows of x: y[m, column + n] = x[m] . weight[n] (+ bias[n]) (+ what y holds), on the matrix cores.
// Uses: _blocks, _tile, _tile_mma, _tile_mfma, _tile_wmma, _tile_scalar
//
// A wave takes TILES tiles of 16 rows of the matrix, for all rows of x. Weights go from memory to the registers that the
// matrix cores read, each once, and become float16 there. All waves of a block need the same x: it goes through LDS, a
// stage at a time, the next one on its way meanwhile; a block of few rows of the matrix would otherwise read more of x
// than of the weights. SPLIT waves of a block share a tile and take its turns of the inner dimension in turn, and blocks
// may take a slice of it each: the last to end joins them, in their order.
// With a gate the matrix is two, one above the other, TILES is 2, a wave takes a tile of each, and
// gated[m, n] = activation(x[m] . weight[n]) * (x[m] . weight[n + half]).
// -D FORMAT=ggml's number of the type; WEIGHT=type of its first plane; TOKENS=rows of x at most; TILES=1 or 2; SPLIT;
// AHEAD=1: weights of the next turn are on their way while one is computed; CORE_BLOCKS=blocks that a multiprocessor holds; BLOCK=threads.

#undef RESIDENT
#define RESIDENT CORE_BLOCKS
#define WAVES (BLOCK / TILE_WAVE)
#define ROW_WAVES (WAVES / SPLIT)
#define TOGETHER (TOKENS < TILE_MOST_TOKENS ? TOKENS : TILE_MOST_TOKENS) // tokens whose sums there is room for
#define TOKEN_TILES ((TOGETHER + TILE_TOKENS - 1) / TILE_TOKENS)

#if defined(FORGE_CUDA) && __CUDA_ARCH__ >= 800 // from memory to LDS, past the registers
#define ASYNC 1
DEVICE void copy_async(u32x4 *to, const u32x4 *from, bool there) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16, %2;" : : "r"((u32)__cvta_generic_to_shared(to)), "l"(from), "r"(there ? 16u : 0u) : "memory");
}
DEVICE void await_copies() { asm volatile("cp.async.wait_all;" : : : "memory"); }
#else
#define ASYNC 0
#endif

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

// A step is a group of all parts; a stage of x is whole turns for each of the waves that share a tile, or groups of one.
#define STEP_PIECES (4 * TILE_PARTS * TOKEN_TILES * TILE_TOKENS)
#define STAGE_BYTES 16384 // of x, at most where the waves that share a tile need no more
#define FIT (STAGE_BYTES / (16 * STEP_PIECES))
#define SHARED_STEPS (GROUPS * SPLIT)
#define STEPS (FIT >= SHARED_STEPS ? FIT / SHARED_STEPS * SHARED_STEPS : SPLIT > 1 ? SHARED_STEPS : FIT >= 2 ? 2 : 1)
#define STAGE_PIECES (STEPS * STEP_PIECES)
#define EACH ((STAGE_PIECES + BLOCK - 1) / BLOCK) // pieces that a thread brings
#define TOGETHER_PIECES (TILE_QUADS > 2 ? 2 : 1) // of x, of which instructions take no less
#define OWN_STEPS (STEPS / SPLIT) // of a wave in a stage
#if TOKENS <= 16
#define MAYBE_UNROLL UNROLL // what groups share is computed once
#else
#define MAYBE_UNROLL ROLLED
#endif
#define VALUES (TILES * TOKEN_TILES * TILE_VALUES)

// Where in a row the i-th piece of a lane's group is, in its part of a turn.
DEVICE u32 piece_start(u32 turn, u32 part, u32 group, u32 i) {
#if FORMAT == F16
    return turn * TURN_WEIGHTS + (i * TILE_PARTS + part) * 8;
#else
    return group_start(turn * TILE_PARTS + part, group) + i * 8;
#endif
}

// Stages of x lie in LDS as lanes read them: the pieces of a wave's readers are neighbours, and each brings those of its own.
#define READERS (TILE_PARTS * TILE_TOKENS)
#define READER (LANE % READERS)

// A thread's pieces of a stage of x are sent for, zeros where there are none; and are there, for this thread.
DEVICE void bring_stage(const f16 *x, u32 stage, u32 base, u32 rows, u32 inner, u32x4 (&to)[STAGE_PIECES], u32x4 (&pieces)[EACH]) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        u32 place = THREAD + e * BLOCK;
        if (STAGE_PIECES % BLOCK && place >= STAGE_PIECES) continue;
        u32 i = place / READERS % 4, tile = place / READERS / 4 % TOKEN_TILES, step = stage * STEPS + place / STEP_PIECES;
        u32 k = piece_start(step / GROUPS, tile_part(), step % GROUPS, i), m = base + tile * TILE_TOKENS + tile_token();
        bool there = k < inner && m < rows;
        const u32x4 *from = (const u32x4 *)(x + (there ? m * inner + k : 0));
#if ASYNC
        copy_async(&to[place], from, there);
#else
        u32x4 piece = {}; // word by word: what is only copied as a whole, clang would keep in memory
        if (there)
            UNROLL for (u32 w = 0; w < 4; ++w) piece.v[w] = from->v[w];
        UNROLL for (u32 w = 0; w < 4; ++w) pieces[e].v[w] = piece.v[w];
#endif
    }
}
DEVICE void land_stage(u32x4 (&to)[STAGE_PIECES], const u32x4 (&pieces)[EACH]) {
#if ASYNC
    await_copies();
#else
    UNROLL for (u32 e = 0; e < EACH; ++e)
        if (STAGE_PIECES % BLOCK == 0 || THREAD + e * BLOCK < STAGE_PIECES)
            UNROLL for (u32 w = 0; w < 4; ++w) to[THREAD + e * BLOCK].v[w] = pieces[e].v[w];
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
DEVICE void read_turn(const WEIGHT *weight, const Planes &planes, const u32 (&row)[TILES][TILE_LANE_ROWS], u32 turn, u32 end, u32 part, u32 inner, Held (&held)[TILES][TILE_LANE_ROWS]) {
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
            held[t][r] = read_held(weight, planes, row[t][r], turn, part, turn < end ? inner : 0);
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

KERNEL(BLOCK) tile_linear(const f16 *x, const WEIGHT *weight, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, f16 *gated, float *part_sums, u32 *arrived, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate, u32 gelu, u32 blocks, u32 slices) {
    SHARED u32x4 stages[2][STAGE_PIECES];
    SHARED u32 before;
    u32 wave = THREAD / TILE_WAVE, part = tile_part(), set = wave / SPLIT, split = wave % SPLIT, slice = BLOCK_Y;
    u32 outputs = gated ? outer / 2 : outer, per_set = gated ? 16 : 16 * TILES; // of a wave
    u32 first = (BLOCK_X * ROW_WAVES + set) * per_set;
    Planes planes{(const u8 *)weight, high, scales, deltas};
    u32 row[TILES][TILE_LANE_ROWS];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            u32 n = first + tile_row(r) + (gated ? 0 : t * 16);
            row[t][r] = (n < outputs ? n : outputs - 1) + (gated ? t * outputs : 0); // a row too many is not stored
        }
    // In a round each of the waves that share a tile takes a turn. Slices are whole stages, and whole rounds.
    const u32 rounds = OWN_STEPS < GROUPS ? 1 : OWN_STEPS / GROUPS;
    u32 all = (inner + TURN_WEIGHTS * SPLIT * rounds - 1) / (TURN_WEIGHTS * SPLIT * rounds), share = (all + slices - 1) / slices;
    u32 begin = slice * share < all ? slice * share * rounds : all * rounds, end = begin + share * rounds < all * rounds ? begin + share * rounds : all * rounds;
    u32 last_stage = end * GROUPS / OWN_STEPS, last_turn = end * SPLIT;

    ROLLED for (u32 base = 0; base < rows; base += TOGETHER) {
        float sum[TILES][TOKEN_TILES][TILE_VALUES];
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
                UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[t][m][i] = 0;
        u32x4 pieces[EACH];
        Held held[2][TILES][TILE_LANE_ROWS];
        auto take_turn = [&](u32 round, Held(&own)[TILES][TILE_LANE_ROWS], Held(&next)[TILES][TILE_LANE_ROWS]) {
            u32 turn = round * SPLIT + split;
            MAYBE_UNROLL for (u32 group = 0; group < GROUPS; ++group) {
                u32 own_step = round * GROUPS + group, stage = own_step / OWN_STEPS;
                u32 step = OWN_STEPS < GROUPS ? own_step % OWN_STEPS : (own_step % OWN_STEPS / GROUPS * SPLIT + split) * GROUPS + group; // in the stage
                if (group == 0) { // before the barrier, behind which a compiler may put them off
                    if (AHEAD)
                        read_turn(weight, planes, row, turn + SPLIT, last_turn, part, inner, next);
                    else
                        read_turn(weight, planes, row, turn, last_turn, part, inner, own);
                }
                if (own_step % OWN_STEPS == 0) {
                    lds_barrier(); // the stage is there, and of the one before everything was read
                    if (stage + 1 < last_stage) bring_stage(x, stage + 1, base, rows, inner, stages[(stage + 1) % 2], pieces);
                }
                const u32x4 *own_x = stages[stage % 2] + step * STEP_PIECES + READER;
                UNROLL for (u32 h = 0; h < 2; ++h) {
                    f16_quad weights[TILES][TILE_LANE_ROWS][4];
                    UNROLL for (u32 t = 0; t < TILES; ++t)
                        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) take_pair(own[t][r], turn * TILE_PARTS + part, group, h, weights[t][r]);
                    // From one instruction to the next the sums are others: they do not wait for each other.
                    UNROLL for (u32 i = 0; i < 2; i += TOGETHER_PIECES) {
                        f16_quad quads[TOKEN_TILES][2 * TOGETHER_PIECES];
                        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
                            UNROLL for (u32 p = 0; p < TOGETHER_PIECES; ++p) {
                                u32x4 piece = own_x[(m * 4 + 2 * h + i + p) * READERS];
                                quads[m][2 * p] = u32x2{{piece.v[0], piece.v[1]}}, quads[m][2 * p + 1] = u32x2{{piece.v[2], piece.v[3]}};
                            }
                        UNROLL for (u32 q = 0; q < 2 * TOGETHER_PIECES; q += TILE_QUADS)
                            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
                                UNROLL for (u32 t = 0; t < TILES; ++t) {
                                    f16_quad left[TILE_LANE_ROWS][TILE_QUADS], right[TILE_QUADS];
                                    UNROLL for (u32 j = 0; j < TILE_QUADS; ++j) {
                                        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) left[r][j] = weights[t][r][2 * i + q + j];
                                        right[j] = quads[m][q + j];
                                    }
                                    tile_multiply(sum[t][m], left, right);
                                }
                    }
                }
                if ((own_step + 1) % OWN_STEPS == 0 && stage + 1 < last_stage) land_stage(stages[(stage + 1) % 2], pieces);
            }
        };
        if (begin < end) {
            u32 stage = begin * GROUPS / OWN_STEPS;
            bring_stage(x, stage, base, rows, inner, stages[stage % 2], pieces);
            if (AHEAD) read_turn(weight, planes, row, begin * SPLIT + split, last_turn, part, inner, held[0]);
            land_stage(stages[stage % 2], pieces);
        }
        ROLLED for (u32 round = begin; round < end; round += 2) { // what is ahead needs no copy
            take_turn(round, held[0], held[1]);
            if (round + 1 < end) take_turn(round + 1, held[AHEAD], held[0]);
        }
        barrier();

        // The waves that share a tile, through LDS, then the slices, through memory: the first wave of a set has the sums.
#if SPLIT > 1
        const u32 most_tiles = STAGE_PIECES * 8 / (ROW_WAVES * (SPLIT - 1) * TILES * TILE_VALUES * TILE_WAVE);
        const u32 round = most_tiles < 1 ? 1 : most_tiles < TOKEN_TILES ? most_tiles : TOKEN_TILES; // tiles of tokens
        static_assert(most_tiles >= 1, "the sums of a tile have no room");
        float *room = (float *)stages + set * (SPLIT - 1) * round * TILES * TILE_VALUES * TILE_WAVE + LANE;
        UNROLL for (u32 m0 = 0; m0 < TOKEN_TILES; m0 += round) {
            UNROLL for (u32 m = 0; m < round; ++m)
                UNROLL for (u32 t = 0; t < TILES; ++t)
                    UNROLL for (u32 i = 0; i < TILE_VALUES; ++i)
                        if (split && m0 + m < TOKEN_TILES) room[((((split - 1) * round + m) * TILES + t) * TILE_VALUES + i) * TILE_WAVE] = sum[t][m0 + m][i];
            lds_barrier();
            ROLLED for (u32 s = 0; s < SPLIT - 1; ++s)
                UNROLL for (u32 m = 0; m < round; ++m)
                    UNROLL for (u32 t = 0; t < TILES; ++t)
                        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i)
                            if (!split && m0 + m < TOKEN_TILES) sum[t][m0 + m][i] += room[(((s * round + m) * TILES + t) * TILE_VALUES + i) * TILE_WAVE];
            lds_barrier();
        }
#endif
        bool is_last = true;
        if (slices > 1) {
            const u32 pitch = ROW_WAVES * TILE_WAVE, slice_quads = VALUES / 4 * pitch;
            u32 place = base / TOGETHER * blocks + BLOCK_X;
            f32x4 *own = (f32x4 *)part_sums + (u64)place * slices * slice_quads + set * TILE_WAVE + LANE;
            float *values = &sum[0][0][0];
            u32 at = slice * slice_quads; // goes on step by step: addresses made ahead would fill the scalar registers
            UNROLL for (u32 v = 0; v < VALUES; v += 4, at += pitch) {
                settle(at);
                if (!split) own[at] = f32x4{{values[v], values[v + 1], values[v + 2], values[v + 3]}};
            }
            fence_device();
            barrier();
            if (THREAD == 0) before = atomic_add(&arrived[place], 1u);
            barrier();
            is_last = before == slices - 1;
            if (is_last) {
                fence_device();
                if (THREAD == 0) arrived[place] = 0;
                UNROLL for (u32 v = 0; v < VALUES; ++v) values[v] = 0;
                at = 0;
                ROLLED for (u32 s = 0; s < slices; ++s) {
                    f32x4 found[VALUES / 4];
                    UNROLL for (u32 v = 0; v < VALUES / 4; ++v, at += pitch) {
                        settle(at);
                        UNROLL for (u32 i = 0; i < 4; ++i) found[v].v[i] = own[at].v[i];
                    }
                    UNROLL for (u32 v = 0; v < VALUES; ++v) values[v] += found[v / 4].v[v % 4];
                }
            }
        }
        if (!is_last) continue; // the whole block

        // What becomes of the sums, through LDS: stored as rows of y are, by a short loop; unrolled for each sum, it would be
        // more instructions than the near caches hold, for each block to wait for.
        const u32 width = ROW_WAVES * TILES * 16, pitch = width + 4; // + 4: tokens and rows of a wave in other banks
        const u32 fitting = 2 * STAGE_PIECES * 4 / pitch / TILE_TOKENS, round_tiles = fitting < TOKEN_TILES ? fitting : TOKEN_TILES;
        static_assert(fitting > 0, "the sums of a tile of tokens have no room");
        float *found = (float *)stages;
        u32 block_outputs = gated ? width / 2 : width;
        ROLLED for (u32 m0 = 0; m0 < TOKEN_TILES; m0 += round_tiles) {
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) { // not indexed by m0: registers have no addresses
                if (split || m < m0 || m >= m0 + round_tiles) continue;
                float *to = found + (m - m0) * TILE_TOKENS * pitch + set * TILES * 16;
                UNROLL for (u32 t = 0; t < TILES; ++t)
                    UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) to[tile_sum_token(i) * pitch + t * 16 + tile_sum_row(i)] = sum[t][m][i];
            }
            lds_barrier();
            u32 token0 = base + m0 * TILE_TOKENS, tokens = rows - token0 < round_tiles * TILE_TOKENS ? rows - token0 : round_tiles * TILE_TOKENS;
            if (token0 >= rows) tokens = 0;
            ROLLED for (u32 i = THREAD; i < tokens * block_outputs; i += BLOCK) {
                u32 token = gated ? i / (width / 2) : i / width, c = i - token * block_outputs, n = BLOCK_X * block_outputs + c;
                if (n >= outputs) continue;
                const float *own = found + token * pitch;
                if (TILES == 2 && gated) {
                    float gate = own[c / 16 * 32 + c % 16] + (bias ? bias[n] : 0.0f), up = own[c / 16 * 32 + c % 16 + 16] + (bias ? bias[outputs + n] : 0.0f);
                    gated[(u64)(token0 + token) * outputs + n] = to_f16((gelu ? gelu_tanh(gate) : silu(gate)) * up);
                } else {
                    float *out = y + (u64)(token0 + token) * stride + column + n, all = own[c] + (bias ? bias[n] : 0.0f);
                    *out = accumulate ? *out + all : all;
                }
            }
            lds_barrier();
        }
    }
}
