// Decode attention: one query per sequence over its pages of the KV cache, split over the context (flash decoding).
// Uses: tile, tile_mma, tile_mfma, tile_wmma, tile_scalar, rope_pairs
//
// A block takes PACKED query heads of one KV head, so that keys and values are read once for all of them, and one split of the
// positions. In a turn of the main loop each wave takes POSITIONS tiles of 16 positions. The matrix cores multiply keys with the
// queries; an online softmax (arXiv:1805.02867) turns the scores into weights, which go through LDS to a product with the values.
// The states of a block's waves are merged through LDS, those of the splits by the block that ends last (arXiv:2311.01282).
//
// A block makes its queries from the token's product: bias, RMS norm, rotation. The block whose split has the last position also
// makes the key and the value of that position; it uses them as the cache holds them, and one block of each KV head appends them.
// -D THREADS of a block; POSITIONS; HEAD_DIM; PAGE=positions of a page; PACKED; INTERLEAVED.

#define WAVES (THREADS / TILE_WAVE)
#define TURN_POSITIONS (WAVES * 16 * POSITIONS)
#define LANE_NUMBERS ((HEAD_DIM + 31) / 32)                           // of a head
#define THREAD_OUTPUTS ((PACKED * HEAD_DIM + THREADS - 1) / THREADS)  // of the block's results
#define MAX_SPLITS 128
#define SPLITS_AT_ONCE (THREAD_OUTPUTS <= 4 ? 16 : 8) // loads in flight while splits are merged
#define PARTIALS_AT_ONCE 4                            // loads in flight while split-K partials are added
#define LEAST (-1e30f)                                // below every score, and finite, so that differences are defined
#define MISSING (2 * LEAST)                           // the score of a position with weight 0, whatever the maximum

// Keys times queries: the inner dimension is CHUNKS chunks of 16 numbers for each part of the lanes. Values: a lane reads PIECE
// numbers of a position for each of its GROUPS rows of a tile, in PASSES passes over the head. Where keys and values of a turn fit
// the registers (counted in words of a lane), those of the next turn are prefetched. Elsewhere a lane holds HELD_CHUNKS chunks and
// HELD_PASSES passes at a time and loads them as they are needed.
#define CHUNKS ((HEAD_DIM + 16 * TILE_PARTS - 1) / (16 * TILE_PARTS))
#define GROUPS (16 / TILE_LANE_ROWS)
#define PIECE (HEAD_DIM > 4 * GROUPS && (PART_POSITIONS == 4 || HEAD_DIM <= 128) ? 8 : 4)
#define PASSES ((HEAD_DIM + GROUPS * PIECE - 1) / (GROUPS * PIECE))
#define PASS_TILES (PIECE / TILE_LANE_ROWS)
#define PART_POSITIONS (16 / TILE_PARTS) // of a tile
#define QUADS (PART_POSITIONS / 4)
#define CHUNK_WORDS (POSITIONS * TILE_LANE_ROWS * 8)
#define VALUE_WORDS (POSITIONS * PASSES * PART_POSITIONS * PIECE / 2)
#define ACC_WORDS (PASSES * PASS_TILES * TILE_VALUES)
#define PREFETCH (HEAD_DIM % 8 == 0 && CHUNKS * CHUNK_WORDS + VALUE_WORDS + ACC_WORDS <= 144)
#define ROOM (HEAD_DIM % 8 ? 16 : ACC_WORDS < 88 ? 64 : 152 - ACC_WORDS) // words for keys, and for values
#define HELD_CHUNKS                                            \
    (PREFETCH || CHUNKS * CHUNK_WORDS <= ROOM           ? CHUNKS \
     : CHUNKS % 4 == 0 && 4 * CHUNK_WORDS <= ROOM ? 4      \
     : CHUNKS % 2 == 0 && 2 * CHUNK_WORDS <= ROOM ? 2      \
                                                  : 1)
#define HELD_PASSES (PREFETCH || VALUE_WORDS <= ROOM ? PASSES : 1)
#define LANE_HAS_FIRST_ROW (tile_sum_row(0) == 0)

struct alignas(16) Rows {
    float v[PASSES * GROUPS * PIECE]; // at least HEAD_DIM
};
struct alignas(16) Query {
    f16 v[CHUNKS * TILE_PARTS * 16 + 8]; // zeros behind the head; 8 more, so that heads lie in other banks
};
struct alignas(8) Weights {
    f16 v[16 * POSITIONS];
};
// 8 or 4 numbers of a row.
template <u32 N> struct Numbers {
    u32 words[N / 2];
};

// N numbers of a row from d on. Past its end the first ones, which meet zeros or are not stored.
template <u32 N> DEVICE Numbers<N> read_numbers(const f16 *row, u32 d) {
    struct alignas(2 * N) Piece {
        Numbers<N> numbers;
    } piece = {};
#if HEAD_DIM % 8 == 0
    piece = *(const Piece *)(row + (d < HEAD_DIM ? d : 0));
#else
    UNROLL for (u32 i = 0; i < N; ++i) piece.numbers.words[i / 2] |= (u32)row[d + i < HEAD_DIM ? d + i : 0].bits << 16 * (i % 2);
#endif
    return piece.numbers;
}

// The cached positions of a row: `first` to `last`. A position outside stands for the nearest one, and its weight is 0: the compiler
// can wait for each load alone where no branch is in front of it.
struct Cache {
    const f16 *k, *v;       // (N, P, G, D)
    const i32 *page_table;  // of the row
    u32 kv_heads, kv_head, first, last;
};
#define WHOLE_TILES (PAGE % 16 == 0) // a tile lies in one page; else each position looks its page up
struct Tiles {
    u32 start[POSITIONS], page[POSITIONS];
};
DEVICE u32 page_at(const i32 *page_table, u32 position) { return (u32)load_l2(page_table + position / PAGE); }
DEVICE void find_tiles(const Cache &cache, u32 position, Tiles &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u) {
        u32 most = cache.last / 16 * 16, start = position + 16 * u;
        to.start[u] = start < most ? start : most;
        if (WHOLE_TILES) to.page[u] = page_at(cache.page_table, to.start[u]);
    }
}
DEVICE u64 offset_of(const Cache &cache, const Tiles &tiles, u32 u, u32 row) {
    u32 at = tiles.start[u] + row;
    at = at > cache.first ? at : cache.first;
    at = at < cache.last ? at : cache.last;
    u32 slot = (WHOLE_TILES ? tiles.page[u] : page_at(cache.page_table, at)) * PAGE + at % PAGE;
    return ((u64)slot * cache.kv_heads + cache.kv_head) * HEAD_DIM;
}

// A lane's keys of a turn's tiles, HELD_CHUNKS chunks from c on, and its values, HELD_PASSES passes from p on.
struct Keys {
    Numbers<8> v[POSITIONS][TILE_LANE_ROWS][HELD_CHUNKS][2];
};
struct Values {
    Numbers<PIECE> v[POSITIONS][HELD_PASSES][PART_POSITIONS];
};
DEVICE void load_keys(const Cache &cache, const Tiles &tiles, u32 c, Keys &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            const f16 *row = cache.k + offset_of(cache, tiles, u, tile_row(r));
            UNROLL for (u32 n = 0; n < HELD_CHUNKS; ++n)
                UNROLL for (u32 i = 0; i < 2; ++i)
                    to.v[u][r][n][i] = read_numbers<8>(row, ((c + n) * TILE_PARTS + tile_part()) * 16 + 8 * i);
        }
}
DEVICE void load_values(const Cache &cache, const Tiles &tiles, u32 p, Values &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 j = 0; j < PART_POSITIONS; ++j) {
            const f16 *row = cache.v + offset_of(cache, tiles, u, tile_part() * PART_POSITIONS + j);
            UNROLL for (u32 n = 0; n < HELD_PASSES; ++n)
                to.v[u][n][j] = read_numbers<PIECE>(row, ((p + n) * GROUPS + tile_row(0)) * PIECE);
        }
}

// The product of the token, (B, (H + 2G) * D) as split-K partials `size` numbers apart, and what becomes of its heads.
struct Product {
    const float *qkv, *bias, *q_norm, *k_norm;
    const float *cos_sin; // of the last position, (pairs, 2)
    u64 size;
    u32 partials, pairs;
    float eps;
};

// One head of the product by a whole wave: number LANE + i * WAVE is x[i]. The first 2 * pairs numbers rotate.
DEVICE void make_head(
    const Product &p,
    const float *first_partial, // (D,)
    const float *bias,          // (D,) or null
    const float *norm,          // (D,) or null
    u32 pairs,
    float (&x)[LANE_NUMBERS]
) {
    float other[LANE_NUMBERS], cosine[LANE_NUMBERS], sine[LANE_NUMBERS];
    u32 d[LANE_NUMBERS], partner[LANE_NUMBERS]; // past the head its first number, so that no load waits for a branch
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
        d[i] = HEAD_DIM % WAVE == 0 || LANE + i * WAVE < HEAD_DIM ? LANE + i * WAVE : 0;
        partner[i] = d[i] >= 2 * pairs ? d[i] : partner_of(d[i], pairs);
        x[i] = 0, other[i] = 0;
    }
    for (u32 s = 0; s < p.partials; s += PARTIALS_AT_ONCE) {
        float own[PARTIALS_AT_ONCE][LANE_NUMBERS], of_partner[PARTIALS_AT_ONCE][LANE_NUMBERS];
        UNROLL for (u32 n = 0; n < PARTIALS_AT_ONCE; ++n) {
            const float *partial = first_partial + (s + n < p.partials ? s + n : p.partials - 1) * p.size;
            UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) own[n][i] = partial[d[i]], of_partner[n][i] = partial[partner[i]];
        }
        UNROLL for (u32 n = 0; n < PARTIALS_AT_ONCE; ++n)
            if (s + n < p.partials)
                UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) x[i] += own[n][i], other[i] += of_partner[n][i];
    }
    float squares = 0;
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
        compiler_fence(d[i]); // what is derived from it is computed again rather than held in registers
        bool rotates = d[i] < 2 * pairs, first = is_first_of_pair(d[i], pairs);
        u32 pair = !rotates ? 0 : pair_of(d[i], partner[i], first);
        f32x2 turn = load<2>(p.cos_sin + 2 * pair);
        cosine[i] = rotates ? turn.v[0] : 1.0f;
        sine[i] = !rotates ? 0.0f : first ? -turn.v[1] : turn.v[1];
        if (bias) x[i] += bias[d[i]], other[i] += bias[partner[i]];
        squares += HEAD_DIM % WAVE == 0 || LANE + i * WAVE < HEAD_DIM ? x[i] * x[i] : 0.0f;
        if (norm) x[i] *= norm[d[i]], other[i] *= norm[partner[i]];
    }
    float scale = norm ? rms_scale(wave_sum(squares) * (1.0f / HEAD_DIM), p.eps) : 1.0f; // the same for the wave
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) x[i] = x[i] * scale * cosine[i] + other[i] * scale * sine[i];
}

// What a block computes: the heads of a row, and which split of its positions.
struct Task {
    u32 row, heads, kv_heads, kv_head, group; // query heads of a KV head
    u32 first_head, last_head;                // in the group; last_head counts from first_head and may be PACKED or more
    bool has_last_position;
};

// The block's queries times `factor`; the key and the value of the last position, also appended to the cache at the row's slot.
DEVICE void make_heads(
    const Task &t,
    const Product &p,
    float factor,
    const i32 *slots,
    f16 *k_pages,
    f16 *v_pages,
    Query (&query)[PACKED],
    Rows (&latest)[2]
) {
    // Copies, because NVIDIA's compiler makes a branch of `?:` on fields of a struct, with more registers.
    const float *qkv = p.qkv, *bias = p.bias, *q_norm = p.q_norm, *k_norm = p.k_norm;
    u32 row = t.row, heads = t.heads, kv_heads = t.kv_heads, kv_head = t.kv_head, group = t.group, pairs = p.pairs;
    u32 first_head = t.first_head, last_head = t.last_head;
    bool is_last = t.has_last_position;
    for (u32 n = THREAD / WAVE; n < PACKED + (is_last ? 2u : 0u); n += THREADS / WAVE) {
        u32 head = n < PACKED ? kv_head * group + first_head + (n < last_head ? n : last_head)
                              : heads + (n - PACKED) * kv_heads + kv_head;
        u64 at = (u64)row * (heads + 2 * kv_heads) * HEAD_DIM + head * HEAD_DIM;
        const float *norm = n < PACKED ? q_norm : n == PACKED ? k_norm : nullptr;
        float x[LANE_NUMBERS];
        make_head(p, qkv + at, bias ? bias + head * HEAD_DIM : nullptr, norm, n > PACKED ? 0 : pairs, x);
        UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
            u32 d = LANE + i * WAVE;
            if (HEAD_DIM % WAVE && d >= HEAD_DIM) continue;
            if (n < PACKED) {
                query[n].v[d] = to_f16(x[i] * factor);
            } else {
                f16 kept = to_f16(x[i]);
                latest[n - PACKED].v[d] = to_float(kept);
                if (first_head == 0)
                    (n == PACKED ? k_pages : v_pages)[((u64)(u32)slots[row] * kv_heads + kv_head) * HEAD_DIM + d] = kept;
            }
        }
    }
}

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

DEVICE float cap_score(float score, float cap, float per_cap) { return cap * fast_tanh(score * per_cap); }
DEVICE void cap_scores(Scores &score, float cap, float per_cap) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][i] = cap_score(score[u][i], cap, per_cap);
}

// The state of the last position alone, whose key and value are in LDS. By one wave.
DEVICE void init_last_position(
    State &s,
    const Query (&query)[PACKED],
    const Rows (&latest)[2],
    float softcap, // or 0: none
    float cap,
    float per_cap
) {
    ROLLED for (u32 h = 0; h < PACKED; ++h) {
        float score = 0;
        for (u32 d = LANE; d < HEAD_DIM; d += TILE_WAVE) score += to_float(query[h].v[d]) * latest[0].v[d];
        score = wave_sum(score, TILE_WAVE);
        if (softcap > 0.0f) score = cap_score(score, cap, per_cap);
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

// The states of a block's waves, by head, in LDS. Arrays of their own there, as one struct takes more instructions for addresses.
struct WaveStates {
    Rows (&acc)[WAVES][PACKED];
    float (&m)[WAVES][PACKED], (&l)[WAVES][PACKED];
};
DEVICE void store_state(State &s, const WaveStates &to, u32 wave) {
    UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
        u32 h = tile_sum_token(n);
        s.l[n] = over_rows(s.l[n], true, TILE_ROW_LANES);
        if (h >= PACKED) continue;
        if (LANE_HAS_FIRST_ROW) to.m[wave][h] = s.m[n], to.l[wave][h] = s.l[n];
        UNROLL for (u32 p = 0; p < PASSES; ++p)
            UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
                UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS)
                    to.acc[wave][h].v[dim_of(p, t, tile_sum_row(i))] = s.acc[p][t][i];
    }
}

// The state of a split in device memory: of each head acc (D,) and (m, l).
struct SplitState {
    float *acc, *ml;
};

// Merges the states of the waves. The result is the output, where there is one split, or the split's state.
DEVICE void merge_waves(const WaveStates &from, u32 splits, u32 outputs, f16 *out, const SplitState &to) {
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n) {
        u32 at = THREAD + n * THREADS, h = at / HEAD_DIM, d = at % HEAD_DIM;
        if (at >= outputs) continue;
        float m = LEAST, l = 0, acc = 0;
        for (u32 w = 0; w < WAVES; ++w) m = larger(m, from.m[w][h]);
        for (u32 w = 0; w < WAVES; ++w) {
            float keep = fast_exp2(from.m[w][h] - m);
            l += from.l[w][h] * keep;
            acc += from.acc[w][h].v[d] * keep;
        }
        if (splits == 1) {
            out[at] = to_f16(fast_divide(acc, l));
        } else {
            to.acc[at] = acc;
            if (d == 0) to.ml[2 * h] = m, to.ml[2 * h + 1] = l;
        }
    }
}

// The share that each split has of each head: 2**(m - the greatest m) / the sum of all l.
DEVICE void compute_shares(const float *ml, u32 splits, u32 last_head, float (&share)[PACKED][MAX_SPLITS]) {
    for (u32 h = THREAD / WAVE; h < PACKED; h += THREADS / WAVE) {
        float split_m[MAX_SPLITS / 32], split_l[MAX_SPLITS / 32];
        float m = LEAST, l = 0;
        UNROLL for (u32 i = 0; i * WAVE < MAX_SPLITS; ++i) {
            u32 s = LANE + i * WAVE;
            bool there = s < splits && h <= last_head;
            f32x2 found = there ? load<2>(ml + (s * PACKED + h) * 2) : f32x2{MISSING, 0.0f};
            split_m[i] = found.v[0], split_l[i] = found.v[1];
            m = larger(m, split_m[i]);
        }
        m = wave_max(m);
        UNROLL for (u32 i = 0; i * WAVE < MAX_SPLITS; ++i) {
            split_m[i] = fast_exp2(split_m[i] - m);
            l += split_m[i] * split_l[i];
        }
        l = wave_sum(l);
        UNROLL for (u32 i = 0; i * WAVE < MAX_SPLITS; ++i) share[h][LANE + i * WAVE] = fast_divide(split_m[i], l);
    }
}

// A thread's numbers of some splits. Where there is none it is another's, whose share is 0.
DEVICE void load_splits(const float *acc, u32 start, u32 splits, u32 outputs, float (&to)[THREAD_OUTPUTS][SPLITS_AT_ONCE]) {
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n)
        UNROLL for (u32 s = 0; s < SPLITS_AT_ONCE; ++s) {
            u32 split = start + s < splits ? start + s : splits - 1, at = THREAD + n * THREADS;
            to[n][s] = acc[split * PACKED * HEAD_DIM + (at < outputs ? at : outputs - 1)];
        }
}

// Merges the states of all splits, in their order, which `all` begins with.
DEVICE void merge_splits(const SplitState &all, u32 splits, u32 last_head, u32 outputs, float (&share)[PACKED][MAX_SPLITS], f16 *out) {
    float part[THREAD_OUTPUTS][SPLITS_AT_ONCE], merged[THREAD_OUTPUTS];
    load_splits(all.acc, 0, splits, outputs, part);
    compute_shares(all.ml, splits, last_head, share);
    barrier();
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n) merged[n] = 0;
    for (u32 start = 0; start < splits; start += SPLITS_AT_ONCE) {
        UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n) {
            u32 at = THREAD + n * THREADS;
            UNROLL for (u32 s = 0; s < SPLITS_AT_ONCE; ++s)
                merged[n] += part[n][s] * share[at < PACKED * HEAD_DIM ? at / HEAD_DIM : 0][start + s];
        }
        load_splits(all.acc, start + SPLITS_AT_ONCE, splits, outputs, part);
    }
    UNROLL for (u32 n = 0; n < THREAD_OUTPUTS; ++n)
        if (THREAD + n * THREADS < outputs) out[THREAD + n * THREADS] = to_f16(merged[n]);
}

KERNEL(THREADS) attention_decode(
    const float *qkv,         // (partials, B, (H + 2G) * D) the token's product
    const float *bias,        // ((H + 2G) * D,) or null
    const float *q_norm,      // (D,) or null
    const float *k_norm,      // (D,) or null
    const float *cos_sin,     // (positions, pairs, 2)
    const float *query_scale, // (positions,) or null
    const i32 *lengths,       // (B,) positions, the last one's token included
    const i32 *slots,         // (B,) of the KV cache, for the last position
    f16 *k_pages,             // (N, P, G, D)
    f16 *v_pages,             // (N, P, G, D)
    const i32 *page_table,    // (B, pages)
    f16 *out,                 // (B, H, D)
    float *split_acc,         // (B, blocks of a row, splits, PACKED, D), or null for one split
    float *split_ml,          // (B, blocks of a row, splits, PACKED, 2), or null for one split
    u32 *arrived,             // (B, blocks of a row) zeros, or null for one split
    u32 heads,                // H
    u32 kv_heads,             // G
    u32 pages,                // of a row of page_table
    u32 pairs,                // that rotate
    u32 rows,                 // B
    u32 partials,             // split-K partials of qkv
    u32 splits,               // of the context, the grid's z
    float eps,                // of the norms
    float scale,              // of the scores
    u32 window,               // positions that are seen, or 0: all
    float softcap             // or 0: none
) {
    SHARED Query query[PACKED];
    SHARED Rows latest[2]; // the last position's key and value
    SHARED Rows wave_acc[WAVES][PACKED];
    SHARED float wave_m[WAVES][PACKED], wave_l[WAVES][PACKED], share[PACKED][MAX_SPLITS];
    SHARED Weights weights[WAVES][PACKED];
    SHARED u32 before;
    u32 row = BLOCK_X, split = BLOCK_Z, wave = THREAD / TILE_WAVE;
    u32 length = (u32)load_l2(lengths + row);
    const i32 *own_pages = page_table + (u64)row * pages;
    Tiles tiles; // looked up together with the length, on which only the first and the last tiles depend
    u32 own_first = split * TURN_POSITIONS + wave * 16 * POSITIONS;
    find_tiles(Cache{k_pages, v_pages, own_pages, 0, 0, 0, pages * PAGE - 1}, own_first, tiles);
    UNROLL for (u32 u = 0; u < POSITIONS; ++u) compiler_fence(tiles.page[u]);
    u32 group = heads / kv_heads, chunks = (group + PACKED - 1) / PACKED;
    u32 kv_head = BLOCK_Y / chunks, first_head = BLOCK_Y % chunks * PACKED;

    // Splits take turns of positions in rotation. Blocks of splits without a turn end here.
    u32 first = window && length > window ? length - window : 0, start = first / 16 * 16;
    u32 turns = (length - start + TURN_POSITIONS - 1) / TURN_POSITIONS, used_splits = turns < splits ? turns : splits;
    bool is_last = split == (turns - 1) % splits;
    u32 stride = splits * TURN_POSITIONS, cached = length - 1, position = start + own_first;
    if (split >= used_splits) {
        grid_dependency_sync();
        return;
    }

    // Loads of cached keys and values come before the wait for the launch that makes the product.
    Cache cache{k_pages, v_pages, own_pages, kv_heads, kv_head, first, cached ? cached - 1 : 0};
    compiler_fence(cache.first), compiler_fence(cache.last), compiler_fence(group); // AMD has too few scalar registers for these
    Keys key;
    Values value;
    if (start || position + 16 * POSITIONS > cached) find_tiles(cache, position, tiles);
    if (PREFETCH) load_keys(cache, tiles, 0, key), load_values(cache, tiles, 0, value);
    grid_dependency_sync();

    for (u32 i = THREAD; i < PACKED * (sizeof(Query) / 2 - HEAD_DIM); i += THREADS)
        query[i % PACKED].v[HEAD_DIM + i / PACKED] = f16{0};
    float factor = softcap > 0.0f ? scale : scale * LOG2E; // scores are in powers of two
    u32 last_head = group - 1 - first_head;
    u64 size = (u64)rows * (heads + 2 * kv_heads) * HEAD_DIM;
    Product product{qkv, bias, q_norm, k_norm, cos_sin + (u64)(length - 1) * pairs * 2, size, partials, pairs, eps};
    if (query_scale) factor *= query_scale[length - 1];
    Task task{row, heads, kv_heads, kv_head, group, first_head, last_head, is_last};
    make_heads(task, product, factor, slots, k_pages, v_pages, query, latest);
    barrier();

    const u32 head = reader_head();
    const float cap = softcap * LOG2E, per_cap = softcap > 0.0f ? fast_divide(1.0f, softcap) : 0.0f;
    float acc[PASSES][PASS_TILES][TILE_VALUES], m[TILE_LANE_TOKENS], l[TILE_LANE_TOKENS];
    State state{acc, m, l};
    init_state(state);
    if (is_last && wave == 0) init_last_position(state, query, latest, softcap, cap, per_cap);
    // All waves of the block make the same number of turns.
    ROLLED for (u32 turn = start + split * TURN_POSITIONS; turn < cached; turn += stride, position += stride) {
        Tiles next;
        find_tiles(cache, position + stride, next);
        Scores score;
        compute_scores(cache, tiles, query, head, key, score);
        if (PREFETCH)
            load_keys(cache, next, 0, key);
        else if (HELD_PASSES == PASSES)
            load_values(cache, tiles, 0, value);
        if (softcap > 0.0f) cap_scores(score, cap, per_cap);
        if (turn < first || turn + TURN_POSITIONS > cached) mask_scores(score, position, first, cached);
        update_state(state, score, weights[wave]);
        accumulate_values(state, cache, tiles, weights[wave], head, value);
        if (PREFETCH) load_values(cache, next, 0, value);
        tiles = next;
    }

    WaveStates states{wave_acc, wave_m, wave_l};
    store_state(state, states, wave);
    barrier();
    u32 place = row * kv_heads * chunks + BLOCK_Y;
    u64 number = (u64)place * splits + split; // of the split's state
    SplitState own{split_acc + number * PACKED * HEAD_DIM, split_ml + number * PACKED * 2};
    f16 *block_out = out + ((u64)row * heads + kv_head * group + first_head) * HEAD_DIM;
    u32 outputs = (last_head + 1 < PACKED ? last_head + 1 : PACKED) * HEAD_DIM;
    merge_waves(states, used_splits, outputs, block_out, own);
    if (used_splits == 1) return;

    // The block that ends last merges the splits. The counter is then 0 again.
    fence_device();
    barrier();
    if (THREAD == 0) before = atomic_add(&arrived[place], 1u);
    barrier();
    if (before != used_splits - 1) return;
    fence_device();
    if (THREAD == 0) arrived[place] = 0;
    SplitState all{own.acc - (u64)split * PACKED * HEAD_DIM, own.ml - (u64)split * PACKED * 2};
    merge_splits(all, used_splits, last_head, outputs, share, block_out);
}
