// Attention of one query per sequence over its pages of the KV cache, split over the context.
// Uses: tile, tile_mma, tile_mfma, tile_wmma, tile_scalar
//
// A block takes PACKED query heads of one KV head, so that keys and values are read once for all of them, and a part of
// the positions. A wave takes POSITIONS tiles of 16 of them at a time, whose loads are under way together. Keys are the
// rows of a product with the queries on the matrix cores; of the scores it keeps a running maximum and sum per head
// (arXiv:1805.02867), and what they weigh goes through LDS to a product with the values, whose rows are the numbers of a
// head. The waves of a block are joined through LDS, and the parts of a context by the block that is the last to end
// (arXiv:2311.01282).
//
// With ROPE a block makes its queries from the product of the token: bias, RMS norm, rotation. The block with the last
// position makes its key and value too; it takes them as the cache holds them, and one of those of a KV head appends them.
// -D THREADS of a block; MIN_BLOCKS=blocks that a multiprocessor holds; POSITIONS; HEAD_DIM; PAGE=positions of a page; PACKED; ROPE=0: queries are given, 1: pairs (i, i + pairs), 2: (2i, 2i + 1).

#define WAVES (THREADS / TILE_WAVE)
#define TURN (WAVES * 16 * POSITIONS) // positions
#define PER_LANE ((HEAD_DIM + 31) / 32)
#define EACH ((PACKED * HEAD_DIM + THREADS - 1) / THREADS) // results of a block, per thread
#define MAX_PARTS 128                                     // of a context
#define JOINED (EACH <= 4 ? 16 : 8)                        // parts whose loads are under way together
#define LEAST (-1e30f)                                     // below every score, and finite: a difference stays defined
#define SLICES_AT_ONCE 4                                   // of the product, whose loads are under way together
#define MISSING (2 * LEAST)                                // its weight is 0, whatever the maximum

// The inner dimension of keys times queries: chunks of 16 numbers for each part. Values are read in pieces of PIECE numbers
// of a position, one for each of a lane's GROUPS rows of a tile, in as many passes as a head has pieces for. Where they fit the
// registers (a lane's WORDS of each), those of the next turn are on their way while one is computed; else those of a turn are
// asked for as they are needed, so many at a time as there is room for.
#define CHUNKS ((HEAD_DIM + 16 * TILE_PARTS - 1) / (16 * TILE_PARTS))
#define GROUPS (16 / TILE_LANE_ROWS)
#define PIECE (HEAD_DIM > 4 * GROUPS && (PART_POSITIONS == 4 || HEAD_DIM <= 128) ? 8 : 4)
#define PASSES ((HEAD_DIM + GROUPS * PIECE - 1) / (GROUPS * PIECE))
#define PASS_TILES (PIECE / TILE_LANE_ROWS)
#define PART_POSITIONS (16 / TILE_PARTS) // of a tile
#define QUADS (PART_POSITIONS / 4)
#define CHUNK_WORDS (POSITIONS * TILE_LANE_ROWS * 8)
#define VALUE_WORDS (POSITIONS * PASSES * PART_POSITIONS * PIECE / 2)
#define SUM_WORDS (PASSES * PASS_TILES * TILE_VALUES)
#define PREFETCH (HEAD_DIM % 8 == 0 && CHUNKS * CHUNK_WORDS + VALUE_WORDS + SUM_WORDS <= 144)
#define ROOM (HEAD_DIM % 8 ? 16 : SUM_WORDS < 88 ? 64 : 152 - SUM_WORDS) // for keys, and for values
#define HELD_CHUNKS (PREFETCH || CHUNKS * CHUNK_WORDS <= ROOM ? CHUNKS : CHUNKS % 4 == 0 && 4 * CHUNK_WORDS <= ROOM ? 4 : CHUNKS % 2 == 0 && 2 * CHUNK_WORDS <= ROOM ? 2 : 1)
#define HELD_PASSES (PREFETCH || VALUE_WORDS <= ROOM ? PASSES : 1)
#define LANE_HAS_FIRST_ROW (tile_sum_row(0) == 0)

struct alignas(16) Rows {
    float v[PASSES * GROUPS * PIECE]; // no fewer than a head has numbers
};
struct alignas(16) Query {
    f16 v[CHUNKS * TILE_PARTS * 16 + 8]; // 8 more: another head lies in other banks
};
struct alignas(8) Weights {
    f16 v[16 * POSITIONS];
};
// 8 or 4 numbers of a row.
template <u32 N> struct Numbers {
    u32 words[N / 2];
};

// N numbers of a row from d on; past its end its first ones, which meet zeros or are not stored.
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

// The positions of a row, from which parts of the context are taken. For one before the first or behind the last, that one is
// read: what has no branch in front of it is not waited for, and its weight is 0.
struct Cache {
    const f16 *k, *v;
    const i32 *own_pages;
    u32 kv_heads, kv_head, first, last;
};
// Where a tile may lie in several pages, each position asks for its own.
#define WHOLE_TILES (PAGE % 16 == 0)
struct Tiles {
    u32 start[POSITIONS], page[POSITIONS];
};
DEVICE u32 page_at(const i32 *own_pages, u32 position) { return (u32)load_l2(own_pages + position / PAGE); }
DEVICE void find_tiles(const Cache &cache, u32 position, Tiles &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u) {
        u32 most = cache.last / 16 * 16, start = position + 16 * u;
        to.start[u] = start < most ? start : most;
        if (WHOLE_TILES) to.page[u] = page_at(cache.own_pages, to.start[u]);
    }
}
DEVICE u64 place_of(const Cache &cache, const Tiles &tiles, u32 u, u32 offset) {
    u32 at = tiles.start[u] + offset;
    at = at > cache.first ? at : cache.first;
    at = at < cache.last ? at : cache.last;
    u32 slot = (WHOLE_TILES ? tiles.page[u] : page_at(cache.own_pages, at)) * PAGE + at % PAGE;
    return ((u64)slot * cache.kv_heads + cache.kv_head) * HEAD_DIM;
}

// A lane's keys of some tiles, and its values: HELD_CHUNKS chunks from c on, HELD_PASSES passes from p on.
struct Keys {
    Numbers<8> v[POSITIONS][TILE_LANE_ROWS][HELD_CHUNKS][2];
};
struct Values {
    Numbers<PIECE> v[POSITIONS][HELD_PASSES][PART_POSITIONS];
};
DEVICE void read_keys(const Cache &cache, const Tiles &tiles, u32 c, Keys &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            const f16 *row = cache.k + place_of(cache, tiles, u, tile_row(r));
            UNROLL for (u32 n = 0; n < HELD_CHUNKS; ++n)
                UNROLL for (u32 i = 0; i < 2; ++i) to.v[u][r][n][i] = read_numbers<8>(row, ((c + n) * TILE_PARTS + tile_part()) * 16 + 8 * i);
        }
}
DEVICE void read_values(const Cache &cache, const Tiles &tiles, u32 p, Values &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 j = 0; j < PART_POSITIONS; ++j) {
            const f16 *row = cache.v + place_of(cache, tiles, u, tile_part() * PART_POSITIONS + j);
            UNROLL for (u32 n = 0; n < HELD_PASSES; ++n) to.v[u][n][j] = read_numbers<PIECE>(row, ((p + n) * GROUPS + tile_row(0)) * PIECE);
        }
}

// The number of a head that is a row of a pass's t-th tile.
DEVICE u32 dim_of(u32 pass, u32 t, u32 row) { return (pass * GROUPS + row % GROUPS) * PIECE + t * TILE_LANE_ROWS + row / GROUPS; }

// The o-th numbers of four pieces.
DEVICE f16_quad across(const Numbers<PIECE> *four, u32 o) {
    u32 places = o % 2 ? 0x07060302u : 0x05040100u;
    return u32x2{{pick_bytes(four[1].words[o / 2], four[0].words[o / 2], places), pick_bytes(four[3].words[o / 2], four[2].words[o / 2], places)}};
}

// Over the lanes that have sums of the same tokens.
DEVICE float over_rows(float x, bool is_sum, u32 from, u32 to) {
    for (u32 i = from; i < to; i *= 2) {
        float other = shfl_xor(x, i);
        x = is_sum ? x + other : larger(x, other);
    }
    return x;
}

// A thread's numbers of some parts' values; where there is none, another's, which has no share.
DEVICE void read_parts(const float *values, u32 start, u32 parts, u32 results, float (&to)[EACH][JOINED]) {
    UNROLL for (u32 n = 0; n < EACH; ++n)
        UNROLL for (u32 s = 0; s < JOINED; ++s) {
            u32 part = start + s < parts ? start + s : parts - 1, at = THREAD + n * THREADS;
            to[n][s] = values[part * PACKED * HEAD_DIM + (at < results ? at : results - 1)];
        }
}

#if ROPE
// A head of the product by a whole wave, from which number LANE + i * WAVE is x[i]. The first 2 * pairs numbers turn. The
// product is the sum of slices, arrays of `size` numbers one behind the other.
DEVICE void make_head(const float *head, u64 size, u32 slices, const float *bias, const float *norm, const float *rotation, u32 pairs, float eps, float (&x)[PER_LANE]) {
    float other[PER_LANE], cosine[PER_LANE], sine[PER_LANE];
    u32 d[PER_LANE], partner[PER_LANE]; // where there is no such number, another is read: no load waits for a branch
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
        d[i] = HEAD_DIM % WAVE == 0 || LANE + i * WAVE < HEAD_DIM ? LANE + i * WAVE : 0;
        partner[i] = d[i] >= 2 * pairs ? d[i] : ROPE == 2 ? d[i] ^ 1 : d[i] < pairs ? d[i] + pairs : d[i] - pairs;
        x[i] = 0, other[i] = 0;
    }
    for (u32 s = 0; s < slices; s += SLICES_AT_ONCE) {
        float own[SLICES_AT_ONCE][PER_LANE], of_partner[SLICES_AT_ONCE][PER_LANE];
        UNROLL for (u32 n = 0; n < SLICES_AT_ONCE; ++n) {
            const float *slice = head + (s + n < slices ? s + n : slices - 1) * size;
            UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) own[n][i] = slice[d[i]], of_partner[n][i] = slice[partner[i]];
        }
        UNROLL for (u32 n = 0; n < SLICES_AT_ONCE; ++n)
            if (s + n < slices)
                UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) x[i] += own[n][i], other[i] += of_partner[n][i];
    }
    float squares = 0;
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
        settle(d[i]); // what is known about it is not to be kept until here
        bool turns = d[i] < 2 * pairs, first = ROPE == 2 ? d[i] % 2 == 0 : d[i] < pairs;
        u32 pair = !turns ? 0 : ROPE == 2 ? d[i] / 2 : first ? d[i] : partner[i];
        f32x2 turn = *(const f32x2 *)(rotation + 2 * pair);
        cosine[i] = turns ? turn.v[0] : 1.0f;
        sine[i] = !turns ? 0.0f : first ? -turn.v[1] : turn.v[1];
        if (bias) x[i] += bias[d[i]], other[i] += bias[partner[i]];
        squares += HEAD_DIM % WAVE == 0 || LANE + i * WAVE < HEAD_DIM ? x[i] * x[i] : 0.0f;
        if (norm) x[i] *= norm[d[i]], other[i] *= norm[partner[i]];
    }
    float scale = norm ? rsqrt_fast(wave_sum(squares) * (1.0f / HEAD_DIM) + eps) : 1.0f; // the same for the wave
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) x[i] = x[i] * scale * cosine[i] + other[i] * scale * sine[i];
}
#endif

KERNEL(THREADS) attention_decode(const f16 *q, const float *qkv, const float *bias, const float *q_norm, const float *k_norm, const float *rotations, const float *query_scale, const i32 *lengths, const i32 *slots, f16 *k_pages, f16 *v_pages, const i32 *page_table, f16 *out, float *part_values, float *part_sums, u32 *arrived, u32 heads, u32 kv_heads, u32 pages, u32 pairs, u32 rows, u32 slices, u32 splits, float eps, float scale, u32 window, float softcap) {
    SHARED Query query[PACKED]; // zeros behind each
    SHARED Rows latest[2];         // the last position's key and value
    SHARED Rows values[WAVES][PACKED];
    SHARED float mosts[WAVES][PACKED];
    SHARED float sums[WAVES][PACKED];
    SHARED float share[PACKED][MAX_PARTS];
    SHARED Weights weights[WAVES][PACKED];
    SHARED u32 before;
    if (!ROPE) grid_dependency_sync(); // it may be what stored the last position
    u32 row = BLOCK_X, split = BLOCK_Z, wave = THREAD / TILE_WAVE;
    u32 length = (u32)load_l2(lengths + row);
    const i32 *own_pages = page_table + (u64)row * pages;
    Tiles tiles; // asked for together with the length, on which only the first and the last ones depend
    u32 own_first = split * TURN + wave * 16 * POSITIONS;
    find_tiles(Cache{k_pages, v_pages, own_pages, 0, 0, 0, pages * PAGE - 1}, own_first, tiles);
    UNROLL for (u32 u = 0; u < POSITIONS; ++u) settle(tiles.page[u]);
    u32 group = heads / kv_heads, chunks = (group + PACKED - 1) / PACKED;
    u32 kv_head = BLOCK_Y / chunks, first_head = BLOCK_Y % chunks * PACKED;

    // Parts take turns of positions in turn, as many as the launch has room for: blocks that are left without one end here.
    u32 first = window && length > window ? length - window : 0, start = first / 16 * 16;
    u32 turns = (length - start + TURN - 1) / TURN, parts = turns < splits ? turns : splits;
    bool is_last = split == (turns - 1) % splits;
    u32 stride = splits * TURN, cached = length - (ROPE ? 1 : 0), position = start + own_first;
    if (split >= parts) {
        if (ROPE) grid_dependency_sync();
        return;
    }

    // What must come from far is asked for first.
    Cache cache{k_pages, v_pages, own_pages, kv_heads, kv_head, first, cached ? cached - 1 : 0};
    settle(cache.first), settle(cache.last), settle(group); // of AMD's registers for what is the same in all lanes there are too few
    Keys key;
    Values value;
    if (start || position + 16 * POSITIONS > cached) find_tiles(cache, position, tiles);
    if (PREFETCH) read_keys(cache, tiles, 0, key), read_values(cache, tiles, 0, value);
    if (ROPE) grid_dependency_sync();

    for (u32 i = THREAD; i < PACKED * (sizeof(Query) / 2 - HEAD_DIM); i += THREADS)
        query[i % PACKED].v[HEAD_DIM + i / PACKED] = f16{0};
    // Scores are in powers of two.
    float factor = softcap > 0.0f ? scale : scale * LOG2E;
    u32 most_head = group - 1 - first_head; // heads of the block that there are none of repeat the last one
#if ROPE
    const float *rotation = rotations + (u64)(length - 1) * pairs * 2;
    u64 size = (u64)rows * (heads + 2 * kv_heads) * HEAD_DIM;
    if (query_scale) factor *= query_scale[length - 1];
    for (u32 n = THREAD / WAVE; n < PACKED + (is_last ? 2u : 0u); n += THREADS / WAVE) {
        u32 head = n < PACKED ? kv_head * group + first_head + (n < most_head ? n : most_head) : heads + (n - PACKED) * kv_heads + kv_head;
        u64 at = (u64)row * (heads + 2 * kv_heads) * HEAD_DIM + head * HEAD_DIM;
        const float *norm = n < PACKED ? q_norm : n == PACKED ? k_norm : nullptr;
        float x[PER_LANE];
        make_head(qkv + at, size, slices, bias ? bias + head * HEAD_DIM : nullptr, norm, rotation, n > PACKED ? 0 : pairs, eps, x);
        UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
            u32 d = LANE + i * WAVE;
            if (HEAD_DIM % WAVE && d >= HEAD_DIM) continue;
            if (n < PACKED) {
                query[n].v[d] = to_f16(x[i] * factor);
            } else {
                f16 kept = to_f16(x[i]);
                latest[n - PACKED].v[d] = to_float(kept);
                if (first_head == 0) (n == PACKED ? k_pages : v_pages)[((u64)(u32)slots[row] * kv_heads + kv_head) * HEAD_DIM + d] = kept;
            }
        }
    }
#else
    for (u32 i = THREAD; i < PACKED * HEAD_DIM; i += THREADS) {
        u32 h = i / HEAD_DIM, d = i % HEAD_DIM;
        u64 head = (u64)row * heads + kv_head * group + first_head + (h < most_head ? h : most_head);
        query[h].v[d] = to_f16(to_float(q[head * HEAD_DIM + d]) * factor);
    }
#endif
    barrier();

    const u32 asking = reader_token(LANE) < PACKED ? reader_token(LANE) : PACKED - 1; // the head that it holds queries and weights of
    float sum[PASSES][PASS_TILES][TILE_VALUES], most[TILE_LANE_TOKENS], total[TILE_LANE_TOKENS];
    UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) most[n] = LEAST, total[n] = 0;
    UNROLL for (u32 p = 0; p < PASSES; ++p)
        UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[p][t][i] = 0;
    const float cap = softcap * LOG2E, per_cap = softcap > 0.0f ? fast_divide(1.0f, softcap) : 0.0f;
    if (ROPE && is_last && wave == 0) { // the first wave takes the last position
        ROLLED for (u32 h = 0; h < PACKED; ++h) {
            float score = 0;
            for (u32 d = LANE; d < HEAD_DIM; d += TILE_WAVE) score += to_float(query[h].v[d]) * latest[0].v[d];
            score = wave_sum(score, TILE_WAVE);
            if (softcap > 0.0f) score = cap * fast_tanh(score * per_cap);
            UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n)
                if (tile_sum_token(n) == h) most[n] = score, total[n] = LANE_HAS_FIRST_ROW ? 1.0f : 0.0f;
        }
        UNROLL for (u32 p = 0; p < PASSES; ++p)
            UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
                UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[p][t][i] = latest[1].v[dim_of(p, t, tile_sum_row(i))];
    }
    // All waves of the block make the same number of turns.
    ROLLED for (u32 turn = start + split * TURN; turn < cached; turn += stride, position += stride) {
        Tiles next;
        find_tiles(cache, position + stride, next);
        float score[POSITIONS][TILE_VALUES];
        UNROLL for (u32 u = 0; u < POSITIONS; ++u)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][i] = 0;
        ROLLED for (u32 c = 0; c < CHUNKS; c += HELD_CHUNKS) {
            if (!PREFETCH) settle(tiles.start[0]), read_keys(cache, tiles, c, key);
            UNROLL for (u32 n = 0; n < HELD_CHUNKS; ++n) {
                f16_quad asked[4]; // of the last head, where there is none
                UNROLL for (u32 i = 0; i < 4; ++i) asked[i] = *(const u32x2 *)&query[asking].v[((c + n) * TILE_PARTS + tile_part()) * 16 + 4 * i];
                UNROLL for (u32 u = 0; u < POSITIONS; ++u) {
                    f16_quad of_row[TILE_LANE_ROWS][4];
                    UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                        UNROLL for (u32 i = 0; i < 4; ++i) {
                            const u32(&words)[4] = key.v[u][r][n][i / 2].words;
                            of_row[r][i] = u32x2{{words[i % 2 * 2], words[i % 2 * 2 + 1]}};
                        }
                    tile_multiply(score[u], of_row, asked);
                    if (!PREFETCH) settle(score[u][0]);
                }
            }
        }
        if (PREFETCH)
            read_keys(cache, next, 0, key);
        else if (HELD_PASSES == PASSES)
            read_values(cache, tiles, 0, value);
        if (softcap > 0.0f)
            UNROLL for (u32 u = 0; u < POSITIONS; ++u)
                UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) score[u][i] = cap * fast_tanh(score[u][i] * per_cap);
        if (turn < first || turn + TURN > cached)
            UNROLL for (u32 u = 0; u < POSITIONS; ++u)
                UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
                    u32 at = position + 16 * u + tile_sum_row(i);
                    if (at < first || at >= cached) score[u][i] = MISSING;
                }
        float keep[TILE_LANE_TOKENS];
        UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
            float greatest = most[n];
            UNROLL for (u32 u = 0; u < POSITIONS; ++u)
                UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS) greatest = larger(greatest, score[u][i]);
            greatest = over_rows(greatest, false, TILE_ROW_LANES);
            keep[n] = exp2_fast(most[n] - greatest);
            most[n] = greatest;
            total[n] *= keep[n];
        }
        wave_sync(); // what was read of the weights has been
        UNROLL for (u32 u = 0; u < POSITIONS; ++u)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
                u32 n = i % TILE_LANE_TOKENS, token = tile_sum_token(i);
                float weight = exp2_fast(score[u][i] - most[n]);
                total[n] += weight;
                if (token < PACKED) weights[wave][token].v[16 * u + tile_sum_row(i)] = to_f16(weight);
            }
        wave_sync();
        UNROLL for (u32 p = 0; p < PASSES; ++p)
            UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
                UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[p][t][i] *= keep[i % TILE_LANE_TOKENS];
        UNROLL for (u32 p = 0; p < PASSES; ++p) {
            if (HELD_PASSES < PASSES) settle(tiles.start[0]), read_values(cache, tiles, p, value); // not all passes at once
            UNROLL for (u32 u = 0; u < POSITIONS; ++u) {
                f16_quad weigh[QUADS];
                UNROLL for (u32 i = 0; i < QUADS; ++i) weigh[i] = *(const u32x2 *)&weights[wave][asking].v[16 * u + tile_part() * PART_POSITIONS + 4 * i];
                UNROLL for (u32 t = 0; t < PASS_TILES; ++t) {
                    f16_quad of_row[TILE_LANE_ROWS][QUADS];
                    UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r)
                        UNROLL for (u32 i = 0; i < QUADS; ++i) of_row[r][i] = across(&value.v[u][HELD_PASSES < PASSES ? 0 : p][4 * i], t * TILE_LANE_ROWS + r);
                    tile_multiply(sum[p][t], of_row, weigh);
                    if (!PREFETCH) settle(sum[p][t][0]);
                }
            }
        }
        if (PREFETCH) read_values(cache, next, 0, value);
        tiles = next;
    }

    // The waves.
    UNROLL for (u32 n = 0; n < TILE_LANE_TOKENS; ++n) {
        u32 h = tile_sum_token(n);
        total[n] = over_rows(total[n], true, TILE_ROW_LANES);
        if (h >= PACKED) continue;
        if (LANE_HAS_FIRST_ROW) mosts[wave][h] = most[n], sums[wave][h] = total[n];
        UNROLL for (u32 p = 0; p < PASSES; ++p)
            UNROLL for (u32 t = 0; t < PASS_TILES; ++t)
                UNROLL for (u32 i = n; i < TILE_VALUES; i += TILE_LANE_TOKENS) values[wave][h].v[dim_of(p, t, tile_sum_row(i))] = sum[p][t][i];
    }
    barrier();
    u32 place = row * kv_heads * chunks + BLOCK_Y; // of the row's heads
    float *block_values = part_values + ((u64)place * splits + split) * PACKED * HEAD_DIM;
    float *block_sums = part_sums + ((u64)place * splits + split) * PACKED * 2;
    f16 *block_out = out + ((u64)row * heads + kv_head * group + first_head) * HEAD_DIM;
    u32 results = (most_head + 1 < PACKED ? most_head + 1 : PACKED) * HEAD_DIM;
    UNROLL for (u32 n = 0; n < EACH; ++n) {
        u32 at = THREAD + n * THREADS, h = at / HEAD_DIM, d = at % HEAD_DIM;
        if (at >= results) continue;
        float greatest = LEAST, total = 0, x = 0;
        for (u32 w = 0; w < WAVES; ++w) greatest = larger(greatest, mosts[w][h]);
        for (u32 w = 0; w < WAVES; ++w) {
            float keep = exp2_fast(mosts[w][h] - greatest);
            total += sums[w][h] * keep;
            x += values[w][h].v[d] * keep;
        }
        if (parts == 1) {
            block_out[at] = to_f16(fast_divide(x, total));
        } else {
            block_values[at] = x;
            if (d == 0) block_sums[2 * h] = greatest, block_sums[2 * h + 1] = total;
        }
    }
    if (parts == 1) return;

    // Whoever ends last joins all parts, in their order; the counter is then 0 again.
    fence_device();
    barrier();
    if (THREAD == 0) before = atomic_add(&arrived[place], 1u);
    barrier();
    if (before != parts - 1) return;
    fence_device();
    if (THREAD == 0) arrived[place] = 0;
    block_values -= (u64)split * PACKED * HEAD_DIM;
    block_sums -= (u64)split * PACKED * 2;
    float part[EACH][JOINED], joined[EACH];
    read_parts(block_values, 0, parts, results, part);
    for (u32 h = THREAD / WAVE; h < PACKED; h += THREADS / WAVE) {
        float part_most[MAX_PARTS / 32], part_sum[MAX_PARTS / 32];
        float greatest = LEAST, total = 0;
        UNROLL for (u32 i = 0; i * WAVE < MAX_PARTS; ++i) {
            u32 s = LANE + i * WAVE;
            bool there = s < parts && h <= most_head;
            f32x2 found = there ? *(const f32x2 *)(block_sums + (s * PACKED + h) * 2) : f32x2{MISSING, 0.0f};
            part_most[i] = found.v[0], part_sum[i] = found.v[1];
            greatest = larger(greatest, part_most[i]);
        }
        greatest = wave_max(greatest);
        UNROLL for (u32 i = 0; i * WAVE < MAX_PARTS; ++i) {
            part_most[i] = exp2_fast(part_most[i] - greatest);
            total += part_most[i] * part_sum[i];
        }
        total = wave_sum(total);
        UNROLL for (u32 i = 0; i * WAVE < MAX_PARTS; ++i)
            share[h][LANE + i * WAVE] = fast_divide(part_most[i], total);
    }
    barrier();
    UNROLL for (u32 n = 0; n < EACH; ++n) joined[n] = 0;
    for (u32 start = 0; start < parts; start += JOINED) {
        UNROLL for (u32 n = 0; n < EACH; ++n) {
            u32 at = THREAD + n * THREADS;
            UNROLL for (u32 s = 0; s < JOINED; ++s) joined[n] += part[n][s] * share[at < PACKED * HEAD_DIM ? at / HEAD_DIM : 0][start + s];
        }
        read_parts(block_values, start + JOINED, parts, results, part);
    }
    UNROLL for (u32 n = 0; n < EACH; ++n)
        if (THREAD + n * THREADS < results) block_out[THREAD + n * THREADS] = to_f16(joined[n]);
}
