// Decode attention: the online softmax (arXiv:1805.02867) of a wave. Matrix cores multiply keys with queries; the scores become
// weights, which go through LDS to a product with the values.

#define LEAST (-1e30f)      // below every score, and finite, so that differences are defined
#define MISSING (2 * LEAST) // the score of a position with weight 0, whatever the maximum
#define LANE_HAS_FIRST_ROW (tile_sum_row(0) == 0)

struct alignas(8) Weights {
    f16 v[16 * POSITIONS];
};

// The online softmax of a wave, as its lanes hold it: tile_sum_token says of which head. It refers to three arrays, since NVIDIA's
// compiler gives the members of one struct other registers.
struct State {
    float (&acc)[PASSES][PASS_TILES][TILE_VALUES]; // values weighted by 2**(score - m)
    float (&m)[TILE_LANE_TOKENS];                  // maximum of the scores so far, in powers of two
    float (&l)[TILE_LANE_TOKENS];                  // sum of 2**(score - m) over the lane's positions
};
typedef float Scores[POSITIONS][TILE_VALUES];

// Over the lanes that have sums of the same heads.
DEVICE float over_rows(float x, bool is_sum, u32 from, u32 to) {
    for (u32 i = from; i < to; i *= 2) {
        float other = shfl_xor(x, i);
        x = is_sum ? x + other : larger(x, other);
    }
    return x;
}

// The number of a head that is a row of a pass's t-th tile.
DEVICE u32 dim_of(u32 pass, u32 t, u32 row) { return (pass * GROUPS + row % GROUPS) * PIECE + t * TILE_LANE_ROWS + row / GROUPS; }

// The head whose queries and weights the lane holds as the matrix cores read them; the last one, where there is none.
DEVICE u32 reader_head() { return reader_token(LANE) < PACKED ? reader_token(LANE) : PACKED - 1; }

// A state of no position.
DEVICE void init_state(State &s) {
    UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) s.m[n] = LEAST, s.l[n] = 0;
    UNROLL for (u32 p = 0; p < PASSES; ++p)
        UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) s.acc[p][t][i] = 0;
}

DEVICE float cap_score(float score, float softcap, float per_cap) { return softcap * LOG2E * fast_tanh(score * per_cap); }
DEVICE void cap_scores(Scores &score, float softcap) {
    compiler_fence(softcap); // what is made of it takes no registers where there is none
    float per_cap = fast_divide(1.0f, softcap);
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][i] = cap_score(score[u][i], softcap, per_cap);
}

// The state of the last position alone, whose key and value are in LDS. By one wave.
DEVICE void init_last_position(
    State &s,
    const Query (&query)[PACKED],
    const Rows (&latest)[2],
    float softcap // or 0: none
) {
    ROLLED for (u32 h = 0; h < PACKED; ++h) {
        float score = 0;
        for (u32 d = LANE; d < HEAD_DIM; d += TILE_WAVE) score += to_float(query[h].v[d]) * latest[0].v[d];
        score = wave_sum(score, TILE_WAVE);
        if (softcap > 0.0f) score = cap_score(score, softcap, fast_divide(1.0f, softcap));
        UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n)
            if (tile_sum_token(n) == h) s.m[n] = score, s.l[n] = LANE_HAS_FIRST_ROW ? 1.0f : 0.0f;
    }
    UNROLL for (u32 p = 0; p < PASSES; ++p)
        UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) s.acc[p][t][i] = latest[1].v[dim_of(p, t, tile_sum_row(i))];
}

// Keys of the turn's tiles times queries.
DEVICE void compute_scores(const Cache &cache, Tiles &tiles, const Query (&query)[PACKED], u32 head, Keys &key, Scores &score) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][i] = 0;
    ROLLED for (u32 c = 0; c < CHUNKS; c += HELD_CHUNKS) {
        if (!PREFETCH) compiler_fence(tiles.start[0]), load_keys(cache, tiles, c, key);
        UNROLL for (u32 n = 0; n < HELD_CHUNKS; ++n) {
            f16_quad asked[4];
            UNROLL for (u32 i = 0; i < 4; ++i)
                asked[i] = *(const u32x2 *)&query[head].v[((c + n) * TILE_PARTS + tile_part()) * 16 + 4 * i];
            UNROLL for (u32 u = 0; u < POSITIONS; ++u) {
                f16_quad of_row[TILE_LANE_ROWS][4];
                UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                    UNROLL for (u32 i = 0; i < 4; ++i) {
                        const u32(&words)[4] = key.v[u][r][n][i / 2].words;
                        of_row[r][i] = u32x2{{words[i % 2 * 2], words[i % 2 * 2 + 1]}};
                    }
                tile_multiply(score[u], of_row, asked);
                if (!PREFETCH) compiler_fence(score[u][0]);
            }
        }
    }
}

// Positions before `first` or from `end` on get no weight.
DEVICE void mask_scores(Scores &score, u32 position, u32 first, u32 end) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
            u32 at = position + 16 * u + tile_sum_row(i);
            if (at < first || at >= end) score[u][i] = MISSING;
        }
}

// Takes the turn's scores into m and l, scales acc to the new maximum, and stores the weights of the wave's positions to LDS.
DEVICE void update_state(State &s, const Scores &score, Weights (&weights)[PACKED]) {
    float keep[TILE_LANE_TOKENS];
    UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
        float greatest = s.m[n];
        UNROLL for (u32 u = 0; u < POSITIONS; ++u)
            UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS) greatest = larger(greatest, score[u][i]);
        greatest = over_rows(greatest, false, TILE_ROW_LANES);
        keep[n] = fast_exp2(s.m[n] - greatest);
        s.m[n] = greatest;
        s.l[n] *= keep[n];
    }
    wave_sync(); // the weights of the turn before were read
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
            u32 n = i % TILE_LANE_TOKENS, token = tile_sum_token(i);
            float weight = fast_exp2(score[u][i] - s.m[n]);
            s.l[n] += weight;
            if (token < PACKED) weights[token].v[16 * u + tile_sum_row(i)] = to_f16(weight);
        }
    wave_sync();
    UNROLL for (u32 p = 0; p < PASSES; ++p)
        UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) s.acc[p][t][i] *= keep[i % TILE_LANE_TOKENS];
}

// The o-th numbers of four pieces.
DEVICE f16_quad across(const Numbers<PIECE> *four, u32 o) {
    u32 places = o % 2 ? 0x07060302u : 0x05040100u;
    u32 low = byte_perm(four[1].words[o / 2], four[0].words[o / 2], places);
    return u32x2{{low, byte_perm(four[3].words[o / 2], four[2].words[o / 2], places)}};
}

// acc += values of the turn's tiles times weights.
DEVICE void accumulate_values(State &s, const Cache &cache, Tiles &tiles, const Weights (&weights)[PACKED], u32 head, Values &value) {
    UNROLL for (u32 p = 0; p < PASSES; ++p) {
        if (HELD_PASSES < PASSES) compiler_fence(tiles.start[0]), load_values(cache, tiles, p, value); // not all passes at once
        UNROLL for (u32 u = 0; u < POSITIONS; ++u) {
            f16_quad weigh[QUADS];
            UNROLL for (u32 i = 0; i < QUADS; ++i)
                weigh[i] = *(const u32x2 *)&weights[head].v[16 * u + tile_part() * PART_POSITIONS + 4 * i];
            UNROLL for (u32 t = 0; t < PASS_TILES; ++t) {
                f16_quad of_row[TILE_LANE_ROWS][QUADS];
                UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                    UNROLL for (u32 i = 0; i < QUADS; ++i)
                        of_row[r][i] = across(&value.v[u][HELD_PASSES < PASSES ? 0 : p][4 * i], t * TILE_LANE_ROWS + r);
                tile_multiply(s.acc[p][t], of_row, weigh);
                if (!PREFETCH) compiler_fence(s.acc[p][t][0]);
            }
        }
    }
}

#define TURN_POSITIONS (THREADS / TILE_WAVE * 16 * POSITIONS) // of a block

// The positions of a wave: its tiles of a turn begin at `position`, those of turns are `stride` apart.
struct Span {
    u32 position, stride, first, end; // positions before `first` and from `end` on get no weight
};

// Takes all turns of the wave into its state.
DEVICE void attend(
    State &state, Span at, const Cache &cache, Tiles &tiles, const Query (&query)[PACKED], Weights (&weights)[PACKED], u32 head, Keys &key, Values &value,
    float factor, // of the scores, beside that of the queries
    float softcap // or 0: none
) {
    ROLLED for (; at.position < at.end; at.position += at.stride) {
        Tiles next;
        find_tiles(cache, at.position + at.stride, next);
        Scores score;
        compute_scores(cache, tiles, query, head, key, score);
        if (PREFETCH)
            load_keys(cache, next, 0, key);
        else if (HELD_PASSES == PASSES)
            load_values(cache, tiles, 0, value);
        UNROLL for (u32 u = 0; u < POSITIONS; ++u)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][i] *= factor;
        if (softcap > 0.0f) cap_scores(score, softcap);
        if (at.position < at.first || at.position + 16 * POSITIONS > at.end) mask_scores(score, at.position, at.first, at.end);
        update_state(state, score, weights);
        accumulate_values(state, cache, tiles, weights, head, value);
        if (PREFETCH) load_values(cache, next, 0, value);
        tiles = next;
    }
}
