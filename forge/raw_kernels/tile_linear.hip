// Products of 2 to 64 rows of x: y[m, column + n] = x[m] . weight[n] (+ bias[n]) (+ what y holds), on the matrix cores.
// Uses: _blocks, _tile, _tile_mma, _tile_mfma, _tile_wmma, _tile_scalar
//
// A wave takes TILES tiles of 16 rows of the matrix, for all rows of x, and every SPLIT-th turn of the inner dimension; SPLIT
// waves of a block, a team, join their sums. Weights go from memory to the registers that the matrix cores read, each once, and
// become float16 there; x is small and comes from the near cache, which the weights leave to it.
// With a gate the matrix is two, one above the other, TILES is 2, a wave takes a tile of each, and
// gated[m, n] = activation(x[m] . weight[n]) * (x[m] . weight[n + half]).
// -D FORMAT=ggml's number of the type; WEIGHT=type of its first plane; TOKENS=rows of x at most; PACKED=1: x is as
// tile_pack stores it; TILES=1 or 2; TEAM, BLOCK=threads.

#define WAVES (BLOCK / TILE_WAVE)
#define SPLIT (TEAM / TILE_WAVE)
#define ROW_WAVES (WAVES / SPLIT)
#define TOGETHER (TOKENS < TILE_MOST_TOKENS ? TOKENS : TILE_MOST_TOKENS) // tokens whose sums there is room for
#define TOKEN_TILES ((TOGETHER + TILE_TOKENS - 1) / TILE_TOKENS)
#define PACKED_TILES ((TOKENS + TILE_TOKENS - 1) / TILE_TOKENS)

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

// Where that piece of the lane's token in a tile lies in packed x: those of all lanes beside each other.
DEVICE u32 packed_at(u32 turn, u32 group, u32 i, u32 tile) {
    u32 before = ((turn * GROUPS + group) * 4 + i) * PACKED_TILES + tile;
    return (before * TILE_PARTS + tile_part()) * TILE_TOKENS + tile_token();
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

// x as the lanes of tiles read it, with zeros where there is none, by so many waves.
KERNEL(BLOCK) tile_pack(const f16 *x, f16 *packed, u32 rows, u32 inner, u32 waves) {
    u32 turns = (inner + TURN_WEIGHTS - 1) / TURN_WEIGHTS;
    for (u32 i = BLOCK_X * WAVES + THREAD / TILE_WAVE; i < turns * GROUPS * PACKED_TILES; i += waves) {
        u32 tile = i % PACKED_TILES, group = i / PACKED_TILES % GROUPS, turn = i / PACKED_TILES / GROUPS;
        u32 token = tile * TILE_TOKENS + tile_token();
        UNROLL for (u32 p = 0; p < 4; ++p) {
            u32 k = piece_start(turn, tile_part(), group, p);
            u32x4 *to = (u32x4 *)packed + packed_at(turn, group, p, tile);
            if (k < inner && token < rows)
                *to = *(const u32x4 *)(x + token * inner + k);
            else
                *to = u32x4{};
        }
    }
}

// The i-th piece of a lane's group of its token in a tile.
DEVICE u32x4 x_piece(const f16 *x, u32 turn, u32 group, u32 i, u32 tile, u32 rows, u32 inner) {
#if PACKED
    return ((const u32x4 *)x)[packed_at(turn, group, i, tile)];
#else
    u32 k = piece_start(turn, tile_part(), group, i), token = tile * TILE_TOKENS + tile_token();
    token = token < rows ? token : rows - 1; // a row too many is computed and not stored
    u32x4 piece = {};
    if (k < inner) piece = *(const u32x4 *)(x + token * inner + k);
    return piece;
#endif
}

KERNEL(BLOCK) tile_linear(const f16 *x, const WEIGHT *weight, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, f16 *gated, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate, u32 gelu) {
    // Rows of 20 numbers: neighbouring tokens are in other banks.
    const u32 joined = TOKEN_TILES * TILE_TOKENS > 32 ? 32 / TILE_TOKENS : TOKEN_TILES, joined_tokens = joined * TILE_TOKENS;
    SHARED float partial[TILES][WAVES][joined_tokens][20];
    u32 wave = THREAD / TILE_WAVE, part = tile_part();
    u32 outputs = gated ? outer / 2 : outer, per_set = gated ? 16 : 16 * TILES; // of a wave
    u32 step = gated ? outputs : 16; // from one tile of a wave to its next
    Planes planes{(const u8 *)weight, high, scales, deltas};
    u32 row[TILES][TILE_LANE_ROWS];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            u32 n = (BLOCK_X * ROW_WAVES + wave / SPLIT) * per_set + tile_row(r) + (gated ? 0 : t * 16);
            row[t][r] = (n < outputs ? n : outputs - 1) + (gated ? t * outputs : 0); // a row too many is not stored
        }
    u32 turns = (inner + TURN_WEIGHTS - 1) / TURN_WEIGHTS;

    ROLLED for (u32 base = 0; base < rows; base += TOGETHER) {
        float sum[TILES][TOKEN_TILES][TILE_VALUES];
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
                UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[t][m][i] = 0;
        ROLLED for (u32 turn = wave % SPLIT; turn < turns; turn += SPLIT) {
            Held held[TILES][TILE_LANE_ROWS];
            UNROLL for (u32 t = 0; t < TILES; ++t)
                UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                    held[t][r] = read_held(weight, planes, row[t][r], turn, part, inner);
            ROLLED for (u32 group = 0; group < GROUPS; ++group)
                UNROLL for (u32 h = 0; h < 2; ++h) {
                    f16_quad weights[TILES][TILE_LANE_ROWS][4];
                    UNROLL for (u32 t = 0; t < TILES; ++t)
                        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                            take_pair(held[t][r], turn * TILE_PARTS + part, group, h, weights[t][r]);
                    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                        f16_quad own[4];
                        UNROLL for (u32 i = 0; i < 2; ++i) {
                            u32x4 piece = x_piece(x, turn, group, 2 * h + i, base / TILE_TOKENS + m, rows, inner);
                            own[2 * i] = u32x2{{piece.v[0], piece.v[1]}}, own[2 * i + 1] = u32x2{{piece.v[2], piece.v[3]}};
                        }
                        UNROLL for (u32 t = 0; t < TILES; ++t) tile_multiply(sum[t][m], weights[t], own);
                    }
                }
        }

        UNROLL for (u32 start = 0; start < TOKEN_TILES; start += joined) {
            UNROLL for (u32 t = 0; t < TILES; ++t)
                UNROLL for (u32 m = 0; m < joined; ++m)
                    UNROLL for (u32 i = 0; i < TILE_VALUES; ++i)
                        partial[t][wave][m * TILE_TOKENS + tile_sum_token(i)][tile_sum_row(i)] = sum[t][start + m][i];
            barrier();
            for (u32 i = THREAD; i < ROW_WAVES * joined_tokens * 16; i += BLOCK) {
                u32 in_tile = i % 16, token = i / 16 % joined_tokens, set = i / 16 / joined_tokens;
                float total[TILES];
                UNROLL for (u32 t = 0; t < TILES; ++t) {
                    total[t] = 0;
                    UNROLL for (u32 s = 0; s < SPLIT; ++s) total[t] += partial[t][set * SPLIT + s][token][in_tile];
                }
                u32 m = base + start * TILE_TOKENS + token, first = (BLOCK_X * ROW_WAVES + set) * per_set + in_tile;
                if (m >= rows) continue;
                UNROLL for (u32 t = 0; t < TILES; ++t)
                    if (bias && first + t * step < outer) total[t] += bias[first + t * step];
                if (gated) {
                    float gate = gelu ? gelu_tanh(total[0]) : silu(total[0]);
                    if (first < outputs) gated[(u64)m * outputs + first] = to_f16(gate * total[TILES - 1]);
                    continue;
                }
                UNROLL for (u32 t = 0; t < TILES; ++t) {
                    u32 n = first + t * 16;
                    float *out = y + (u64)m * stride + column + n;
                    if (n < outer) *out = accumulate ? *out + total[t] : total[t];
                }
            }
            barrier();
        }
    }
}
