// Products of 2 to 64 rows of x: y[m, column + n] = x[m] . weight[n] (+ bias[n]) (+ what y holds), on the matrix cores.
// Uses: _blocks, _tile, _tile_mma, _tile_mfma, _tile_wmma, _tile_scalar
//
// A wave takes TILES tiles of 16 rows of the matrix, for all rows of x, and every SPLIT-th turn of the inner dimension; SPLIT
// waves of a block join their sums. Weights go from memory to the registers that the matrix cores read, each once, and
// become float16 there; x is small and comes from the caches.
// With GATE the matrix is two, one above the other, a wave takes tiles of both, and y[m, n] = activation(x[m] . weight[n])
// * (x[m] . weight[n + half]).
// -D FORMAT=ggml's number of the type; WEIGHT=type of its first plane; TOKENS=rows of x at most; TILES; SPLIT;
// BLOCK=threads; GATE=0, 1 (SiLU) or 2 (GELU); OUT=type of y.

#define WAVES (BLOCK / TILE_WAVE)
#define ROW_WAVES (WAVES / SPLIT)
#define TOGETHER (TOKENS < TILE_MOST_TOKENS ? TOKENS : TILE_MOST_TOKENS) // tokens whose sums there is room for
#define TOKEN_TILES ((TOGETHER + TILE_TOKENS - 1) / TILE_TOKENS)
#define MATRICES (GATE ? 2 : 1)

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
        if (k < inner) held.pieces[i] = *(const u32x4 *)(weight + (u64)row * inner + k);
    }
#else
    u32 units = inner / UNIT_WEIGHTS, unit = turn * TILE_PARTS + part;
    if (unit < units) held = read_unit(planes, (u64)row * units + unit);
#endif
    return held;
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

DEVICE void put(float *y, float value) { *y = value; }
DEVICE void put(f16 *y, float value) { *y = to_f16(value); }
DEVICE float get(const float *y) { return *y; }
DEVICE float get(const f16 *y) { return to_float(*y); }

KERNEL(BLOCK) tile_linear(const f16 *x, const WEIGHT *weight, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, OUT *y, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate) {
    u32 wave = THREAD / TILE_WAVE, part = tile_part();
    u32 first = (BLOCK_X * ROW_WAVES + wave / SPLIT) * (TILES / MATRICES * 16);
    Planes planes{(const u8 *)weight, high, scales, deltas};
    u32 half = outer / MATRICES;

    ROLLED for (u32 base = 0; base < rows; base += TOGETHER) {
        float sum[TILES][TOKEN_TILES][TILE_VALUES];
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
                UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[t][m][i] = 0;
        u32 token_start[TOKEN_TILES];
        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
            u32 token = base + m * TILE_TOKENS + tile_token();
            token_start[m] = (token < rows ? token : rows - 1) * inner; // a row too many is computed and not stored
        }

        u32 turns = (inner + TURN_WEIGHTS - 1) / TURN_WEIGHTS;
        ROLLED for (u32 turn = wave % SPLIT; turn < turns; turn += SPLIT) {
            Held held[TILES][TILE_LANE_ROWS];
            UNROLL for (u32 t = 0; t < TILES; ++t)
                UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
                    u32 n = first + t / MATRICES * 16 + tile_row(r);
                    n = (n < half ? n : half - 1) + (GATE ? t % 2 * half : 0);
                    held[t][r] = read_held(weight, planes, n, turn, part, inner);
                }
            ROLLED for (u32 group = 0; group < GROUPS; ++group)
                UNROLL for (u32 h = 0; h < 2; ++h) {
                    f16_quad weights[TILES][TILE_LANE_ROWS][4];
                    UNROLL for (u32 t = 0; t < TILES; ++t)
                        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                            take_pair(held[t][r], turn * TILE_PARTS + part, group, h, weights[t][r]);
                    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                        f16_quad own[4];
                        UNROLL for (u32 i = 0; i < 2; ++i) {
                            u32 k = piece_start(turn, part, group, 2 * h + i);
                            u32x4 piece = {};
                            if (k < inner) piece = *(const u32x4 *)(x + token_start[m] + k);
                            own[2 * i] = u32x2{{piece.v[0], piece.v[1]}}, own[2 * i + 1] = u32x2{{piece.v[2], piece.v[3]}};
                        }
                        UNROLL for (u32 t = 0; t < TILES; ++t) tile_multiply(sum[t][m], weights[t], own);
                    }
                }
        }

        // Join the waves of a row, some tokens at a time. Rows of 20: neighbouring tokens are in other banks.
        const u32 tiles_together = TOKEN_TILES * TILE_TOKENS > 32 ? 32 / TILE_TOKENS : TOKEN_TILES, together = tiles_together * TILE_TOKENS;
        SHARED float partial[MATRICES][WAVES][together][20];
        UNROLL for (u32 t = 0; t < TILES; t += MATRICES)
            UNROLL for (u32 start = 0; start < TOKEN_TILES; start += tiles_together) {
                UNROLL for (u32 g = 0; g < MATRICES; ++g)
                    UNROLL for (u32 m = 0; m < tiles_together; ++m)
                        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i)
                            partial[g][wave][m * TILE_TOKENS + tile_sum_token(i)][tile_sum_row(i)] = sum[t + g][start + m][i];
                barrier();
                for (u32 i = THREAD; i < ROW_WAVES * together * 16; i += BLOCK) {
                    u32 row = i % 16, token = i / 16 % together, set = i / 16 / together;
                    float total[MATRICES];
                    UNROLL for (u32 g = 0; g < MATRICES; ++g) {
                        total[g] = 0;
                        UNROLL for (u32 s = 0; s < SPLIT; ++s) total[g] += partial[g][set * SPLIT + s][token][row];
                    }
                    u32 n = (BLOCK_X * ROW_WAVES + set) * (TILES / MATRICES * 16) + t / MATRICES * 16 + row;
                    u32 m = base + start * TILE_TOKENS + token;
                    if (n >= half || m >= rows) continue;
                    OUT *out = y + (u64)m * stride + column + n;
                    float value = total[0];
                    if (bias) value += bias[n];
    #if GATE
                    float up = total[MATRICES - 1];
                    if (bias) up += bias[n + half];
                    value = (GATE == 1 ? silu(value) : gelu_tanh(value)) * up;
    #endif
                    put(out, accumulate ? get(out) + value : value);
                }
                barrier();
            }
    }
}
