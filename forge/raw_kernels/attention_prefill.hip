// Prefill attention: several queries per sequence over its pages of the KV cache. Tiles of queries meet tiles of keys and values
// in LDS, with an online softmax per query (FlashAttention, arXiv:2205.14135). A block takes one tile of queries of one head.
// -D HEAD_DIM, PAGE=positions of a page.

#define THREADS 128
#define QUERIES 32
#define KEYS 32
#define WIDTH ((HEAD_DIM + 7) / 8 * 8) // rows are padded with zeros to whole vectors
#define STRIDE (WIDTH + 8)             // so that rows begin in different banks
#define VECTORS ((WIDTH + 31) / 32)    // of 8 numbers, of a query's values, in each of its four threads
#define LEAST (-1e30f)

// A row of HEAD_DIM numbers into a row of a tile, or zeros.
DEVICE void load_row(const f16 *row, bool there, u32 lane, u32 lanes, f16 (&to)[STRIDE]) {
    for (u32 d = lane; d < WIDTH; d += lanes) to[d] = there && d < HEAD_DIM ? row[d] : f16{0};
}

// Keys, or values, of positions from `start` on, zeros before `begin` and from `end` on.
DEVICE void load_tile(
    const f16 *pages, const i32 *page_table, u32 start, u32 begin, u32 end, u32 kv_heads, u32 kv_head, f16 (&tile)[KEYS][STRIDE]
) {
    for (u32 j = THREAD / 8; j < KEYS; j += THREADS / 8) {
        u32 at = start + j;
        bool there = at >= begin && at < end;
        u64 slot = there ? (u64)page_table[at / PAGE] * PAGE + at % PAGE : 0;
        load_row(pages + (slot * kv_heads + kv_head) * HEAD_DIM, there, THREAD % 8, 8, tile[j]);
    }
}

typedef float Weights[QUERIES][KEYS + 1];

struct Mask {
    u32 position, window; // of the tile's first query; 0: all positions are seen
};

// Scaled, capped and masked scores of the tile: two queries by four keys per thread.
DEVICE void compute_scores(
    const f16 (&query)[QUERIES][STRIDE], const f16 (&keys)[KEYS][STRIDE], u32 start, Mask mask, float scale, float softcap, Weights &score
) {
    u32 i0 = THREAD / 8 * 2, j0 = THREAD % 8;
    float sum[2][4] = {};
    for (u32 d = 0; d < WIDTH; d += 2) {
        float a[2][2], b[4][2];
        UNROLL for (u32 i = 0; i < 2; ++i) a[i][0] = to_float(query[i0 + i][d]), a[i][1] = to_float(query[i0 + i][d + 1]);
        UNROLL for (u32 j = 0; j < 4; ++j) b[j][0] = to_float(keys[j0 + 8 * j][d]), b[j][1] = to_float(keys[j0 + 8 * j][d + 1]);
        UNROLL for (u32 i = 0; i < 2; ++i)
            UNROLL for (u32 j = 0; j < 4; ++j) sum[i][j] += a[i][0] * b[j][0] + a[i][1] * b[j][1];
    }
    UNROLL for (u32 i = 0; i < 2; ++i)
        UNROLL for (u32 j = 0; j < 4; ++j) {
            u32 from = mask.position + i0 + i, to = start + j0 + 8 * j;
            float s = sum[i][j] * scale;
            if (softcap > 0.0f) s = softcap * fast_tanh(fast_divide(s, softcap));
            bool hidden = to > from || (mask.window && to + mask.window <= from);
            score[i0 + i][j0 + 8 * j] = hidden ? LEAST : s;
        }
}

// The online softmax of a query, in the four threads that share it.
struct State {
    float m, l;            // maximum of the scores so far, sum of exp(score - m)
    float acc[VECTORS][8]; // values weighted by exp(score - m)
};

// Takes the tile's scores of the thread's query into m and l, and makes them weights. Returns what acc is scaled by.
DEVICE float update_state(State &s, Weights &weight, u32 own, u32 quarter) {
    float score[KEYS / 4], greatest = s.m;
    UNROLL for (u32 j = 0; j < KEYS / 4; ++j) {
        score[j] = weight[own][quarter + 4 * j];
        greatest = larger(greatest, score[j]);
    }
    greatest = wave_max(greatest, 4);
    float keep = fast_exp(s.m - greatest), part = 0;
    UNROLL for (u32 j = 0; j < KEYS / 4; ++j) {
        float w = score[j] > LEAST ? fast_exp(score[j] - greatest) : 0.0f;
        weight[own][quarter + 4 * j] = w;
        part += w;
    }
    s.m = greatest;
    s.l = s.l * keep + wave_sum(part, 4);
    return keep;
}

DEVICE void accumulate_values(State &s, float keep, const Weights &weight, const f16 (&values)[KEYS][STRIDE], u32 own, u32 quarter) {
    UNROLL for (u32 c = 0; c < VECTORS; ++c)
        UNROLL for (u32 i = 0; i < 8; ++i) s.acc[c][i] *= keep;
    for (u32 j = 0; j < KEYS; ++j) {
        float w = weight[own][j];
        UNROLL for (u32 c = 0; c < VECTORS; ++c) {
            u32 d = (quarter + 4 * c) * 8;
            if (d < WIDTH)
                UNROLL for (u32 i = 0; i < 8; ++i) s.acc[c][i] += w * to_float(values[j][d + i]);
        }
    }
}

KERNEL(THREADS) attention_prefill(
    const f16 *q,          // (T, H, D)
    const f16 *k_pages,    // (N, P, G, D)
    const f16 *v_pages,    // (N, P, G, D)
    const i32 *starts,     // (B + 1,) first token of each sequence
    const i32 *lengths,    // (B,) positions, these tokens included
    const i32 *page_table, // (B, pages)
    f16 *out,              // (T, H, D)
    u32 rows,              // B
    u32 heads,             // H
    u32 kv_heads,          // G
    u32 pages,             // of a row of page_table
    float scale,           // of the scores
    u32 window,            // positions that are seen, or 0: all
    float softcap          // or 0: none
) {
    SHARED f16 query[QUERIES][STRIDE];
    SHARED f16 tile[KEYS][STRIDE]; // of keys, then of values
    SHARED Weights weight;
    u32 head = BLOCK_Y, kv_head = head / (heads / kv_heads);

    // Which sequence's tile this is. The launch has as many blocks as there can be tiles; surplus blocks end here.
    u32 row = 0, index = BLOCK_X; // of the tile in its sequence
    for (; row < rows; ++row) {
        u32 tiles = ((u32)(starts[row + 1] - starts[row]) + QUERIES - 1) / QUERIES;
        if (index < tiles) break;
        index -= tiles;
    }
    if (row == rows) return;
    u32 first = (u32)starts[row] + index * QUERIES, stop = (u32)starts[row + 1];
    u32 count = stop - first < QUERIES ? stop - first : QUERIES;
    u32 position = (u32)lengths[row] - (stop - first); // of the tile's first query
    u32 end = position + count;
    u32 begin = window && position + 1 > window ? position + 1 - window : 0;
    const i32 *own_pages = page_table + (u64)row * pages;

    u32 own = THREAD / 4, quarter = THREAD % 4; // four threads of a wave share a query
    for (u32 i = THREAD / 8; i < QUERIES; i += THREADS / 8)
        load_row(q + ((u64)(first + i) * heads + head) * HEAD_DIM, i < count, THREAD % 8, 8, query[i]);
    State state;
    state.m = LEAST, state.l = 0;
    UNROLL for (u32 c = 0; c < VECTORS; ++c)
        UNROLL for (u32 i = 0; i < 8; ++i) state.acc[c][i] = 0;

    // Tiles of keys begin at multiples of their size, so that a query's sums do not depend on the queries beside it: a tile that
    // it does not see changes nothing.
    for (u32 start = begin / KEYS * KEYS; start < end; start += KEYS) {
        barrier(); // the values of the turn before were read
        load_tile(k_pages, own_pages, start, begin, end, kv_heads, kv_head, tile);
        barrier();
        compute_scores(query, tile, start, Mask{position, window}, scale, softcap, weight);
        barrier();
        load_tile(v_pages, own_pages, start, begin, end, kv_heads, kv_head, tile);
        float keep = update_state(state, weight, own, quarter);
        barrier();
        accumulate_values(state, keep, weight, tile, own, quarter);
    }
    if (own >= count) return;
    f16 *to = out + ((u64)(first + own) * heads + head) * HEAD_DIM;
    UNROLL for (u32 c = 0; c < VECTORS; ++c)
        UNROLL for (u32 i = 0; i < 8; ++i) {
            u32 d = (quarter + 4 * c) * 8 + i;
            if (d < HEAD_DIM) to[d] = to_f16(fast_divide(state.acc[c][i], state.l));
        }
}
