// Prefill attention: the online softmax (arXiv:1805.02867) of a wave between the two products of FlashAttention.

#define LEAST (-1e30f) // below every score, and finite, so that differences are defined
// Scores may be above the maximum that they are counted from by so many powers of two before that moves: float16 weights have the room,
// and everything summed so far is scaled less often (FlashAttention-4). Whether a row's moves depends on its own scores alone.
#define ROOM 8.0f

// As the lanes of a wave hold it: tile_sum_token says of which row. It refers to three arrays, since NVIDIA's compiler gives the members
// of one struct other registers.
struct State {
    float (&acc)[DIM_TILES][TOKEN_TILES][TILE_VALUES]; // values weighted by 2**(factor * (score - m))
    float (&m)[TOKEN_TILES][TILE_LANE_TOKENS];         // what scores are counted from: about their maximum so far
    float (&l)[TOKEN_TILES][TILE_LANE_TOKENS];         // sum of the weights over the lane's positions
};
typedef float Scores[KEY_TILES][TOKEN_TILES][TILE_VALUES];
typedef f16_quad Weights[TOKEN_TILES][KEY_TILES][TILE_X_QUADS];

// Over the lanes that have sums of the same rows.
DEVICE float over_rows(float x, bool is_sum, u32 from, u32 to) {
    for (u32 i = from; i < to; i *= 2) {
        float other = shfl_xor(x, i);
        x = is_sum ? x + other : fast_max(x, other);
    }
    return x;
}

DEVICE void init_state(State &s) {
    UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t) {
        UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) s.m[t][n] = LEAST, s.l[t][n] = 0;
        UNROLL for (u32 d = 0; d < DIM_TILES; ++d)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) s.acc[d][t][i] = 0;
    }
}

// AMD's compiler would load as many keys and values ahead as there are registers, and more.
#if TILE == TILE_SCALAR
#define EACH_CHUNK ROLLED
#define CHUNKS_AHEAD 1
#define VALUES_AHEAD 2
#else
#define EACH_CHUNK UNROLL
#define CHUNKS_AHEAD (TILE_PARTS == 1 ? 1 : 2)
#define VALUES_AHEAD (TILE_PARTS == 1 ? 2 : 4)
#endif

// Keys of the tile times the queries of the wave's group, over the wave's slice of the head.
DEVICE void compute_scores(const Shared &shared, u32 wave_group, u32 slice, const Asked &asked, Scores &score) {
    UNROLL for (u32 u = 0; u < KEY_TILES; ++u)
        UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][t][i] = 0;
    EACH_CHUNK for (u32 c = 0; c < CHUNKS; ++c) {
        f16_quad queries[TOKEN_TILES][CHUNK_QUADS];
        UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t) read_queries(shared, asked, wave_group, t, slice, c, queries[t]);
        UNROLL for (u32 u = 0; u < KEY_TILES; ++u) {
            f16_quad keys[TILE_LANE_ROWS][CHUNK_QUADS];
            read_keys(shared, u, chunk_start(slice, c), keys);
            UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t) tile_multiply(score[u][t], keys, queries[t]);
        }
        if (TILE != TILE_MMA && c % CHUNKS_AHEAD == CHUNKS_AHEAD - 1) compiler_fence(score[0][0][0]);
    }
}

#if SLICES > 1
// The scores of a slice go to LDS; all waves of a group add those of all slices in the same order.
typedef float SliceScores[KEY_TILES * TOKEN_TILES * TILE_VALUES][TILE_WAVE];
DEVICE void store_scores(const Scores &score, SliceScores &to) {
    UNROLL for (u32 u = 0; u < KEY_TILES; ++u)
        UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) to[(u * TOKEN_TILES + t) * TILE_VALUES + i][LANE] = score[u][t][i];
}
DEVICE void add_scores(const Shared &shared, u32 wave_group, Scores &score) {
    UNROLL for (u32 u = 0; u < KEY_TILES; ++u)
        UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
                float sum = 0;
                UNROLL for (u32 s = 0; s < SLICES; ++s) sum += shared.scores[wave_group * SLICES + s][(u * TOKEN_TILES + t) * TILE_VALUES + i][LANE];
                score[u][t][i] = sum;
            }
}
#endif

// Scores in powers of two.
DEVICE void cap_scores(Scores &score, float cap, float per_cap) {
    UNROLL for (u32 u = 0; u < KEY_TILES; ++u)
        UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][t][i] = cap * fast_tanh(score[u][t][i] * per_cap);
}

// A row sees no later position, and with a window only so many. `base`: position of the sequence's first row.
DEVICE void mask_scores(Scores &score, u32 start, u32 base, u32 first_row, u32 group, u32 window) {
    compiler_fence(first_row); // few tiles are masked: positions take no registers elsewhere
    UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t)
        UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
            u32 from = base + (first_row + t * TILE_TOKENS + tile_sum_token(n)) / group;
            UNROLL for (u32 u = 0; u < KEY_TILES; ++u) {
                UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS) {
                    u32 to = start + 16 * u + tile_sum_row(i);
                    if (to > from || IS_BEFORE(to, from, window)) score[u][t][i] = NEG_INFINITY;
                }
                if (TILE != TILE_MMA) compiler_fence(from); // AMD has few scalar registers for what is compared
            }
        }
}

// Takes the tile's scores into m and l, and makes them weights.
DEVICE void update_state(State &s, const Scores &score, float factor, Weights &weights) {
    float greatest[TOKEN_TILES][TILE_LANE_TOKENS];
    bool moves = false;
    UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t)
        UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
            greatest[t][n] = NEG_INFINITY;
            UNROLL for (u32 u = 0; u < KEY_TILES; ++u)
                UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS) greatest[t][n] = fast_max(greatest[t][n], score[u][t][i]);
            moves |= (greatest[t][n] - s.m[t][n]) * factor > ROOM;
        }
    if (wave_ballot(moves)) {
        UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t)
            UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
                float most = over_rows(greatest[t][n], false, TILE_ROW_LANES);
                most = (most - s.m[t][n]) * factor > ROOM ? most : s.m[t][n];
                float keep = fast_exp2((s.m[t][n] - most) * factor);
                s.m[t][n] = most;
                s.l[t][n] *= keep;
                UNROLL for (u32 d = 0; d < DIM_TILES; ++d)
                    UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS) s.acc[d][t][i] *= keep;
            }
    }
    UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t) {
        float from[TILE_LANE_TOKENS];
        UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) from[n] = s.m[t][n] * factor;
        UNROLL for (u32 u = 0; u < KEY_TILES; ++u) {
            float weight[TILE_VALUES];
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
                weight[i] = fast_exp2(score[u][t][i] * factor - from[i % TILE_LANE_TOKENS]);
                s.l[t][i % TILE_LANE_TOKENS] += weight[i];
            }
            tile_as_x(weight, weights[t][u]);
        }
    }
}

// acc += values of the tile, in the wave's slice, times weights.
DEVICE void accumulate_values(State &s, const Shared &shared, u32 slice, const Weights &weights) {
    UNROLL for (u32 d = 0; d < DIM_TILES; ++d)
        UNROLL for (u32 u = 0; u < KEY_TILES; ++u) {
            f16_quad values[TILE_LANE_ROWS][TILE_X_QUADS];
            read_values(shared, slice, d, u, values);
            UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t) tile_multiply(s.acc[d][t], values, weights[t][u]);
            if (TILE != TILE_MMA && (d * KEY_TILES + u) % VALUES_AHEAD == VALUES_AHEAD - 1) compiler_fence(s.acc[d][0][0]);
        }
}

// acc / l to the rows of the wave's group. Lanes that hold copies of a token's numbers each store some of them. A head's sink is one more
// weight of l, without a value (arXiv:2309.17453).
DEVICE void store_out(State &s, f16 *out, const float *sinks, float factor, u32 heads, u32 group, u32 first_row, u32 last_row, u32 slice) {
    const u32 copies = TILE_WAVE / READERS;
    UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t) {
        float per_sum[TILE_LANE_TOKENS];
        UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
            float sum = over_rows(s.l[t][n], true, TILE_ROW_LANES);
            if (sinks) sum += fast_exp2(sinks[(first_row + t * TILE_TOKENS + tile_sum_token(n)) % group] * LOG2E - s.m[t][n] * factor);
            per_sum[n] = fast_divide(1.0f, sum);
        }
        u32 row = first_row + t * TILE_TOKENS + reader_token(LANE % READERS);
        f16 *to = out + ((u64)(row / group) * heads + row % group) * HEAD_DIM;
        UNROLL for (u32 d = 0; d < DIM_TILES; ++d) {
            float values[TILE_VALUES];
            f16_quad packed[TILE_X_QUADS];
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) values[i] = s.acc[d][t][i] * per_sum[i % TILE_LANE_TOKENS];
            tile_as_x(values, packed);
            UNROLL for (u32 w = 0; w < 2 * TILE_X_QUADS; ++w) {
                u32 at = slice * SLICE_DIMS + d * 16 + tile_x_row(tile_part(), 2 * w), word = packed[w / 2].v[w % 2];
                if (row > last_row || w % copies != LANE / READERS) continue;
#if HEAD_DIM % 2 == 0
                if (HEAD_DIM == DIMS || at < HEAD_DIM) *(u32 *)(to + at) = word;
#else
                if (at < HEAD_DIM) to[at] = f16{(u16)word};
                if (at + 1 < HEAD_DIM) to[at + 1] = f16{(u16)(word >> 16)};
#endif
            }
        }
    }
}
