// Attention of several queries per sequence: tiles of queries against tiles of keys and values in LDS, with a running
// maximum and sum per query (FlashAttention, arXiv:2205.14135). A block takes one tile of queries of one head.
// -D HEAD_DIM, PAGE=positions of a page.

#define THREADS 128
#define QUERIES 32
#define KEYS 32
#define WIDTH ((HEAD_DIM + 7) / 8 * 8) // rows are padded with zeros to whole vectors
#define STRIDE (WIDTH + 8)             // and off the banks
#define VECTORS ((WIDTH + 31) / 32)    // of 8 numbers, of a query's values, in each of its four threads
#define LEAST (-1e30f)

// A row of HEAD_DIM numbers into a row of a tile; rows that are not there become zeros.
DEVICE void stage(const f16 *row, bool there, u32 lane, u32 lanes, f16 (&to)[STRIDE]) {
    for (u32 d = lane; d < WIDTH; d += lanes) to[d] = there && d < HEAD_DIM ? row[d] : f16{0};
}

// Keys, or values, of positions `start` on.
DEVICE void stage_tile(const f16 *from, const i32 *own_pages, u32 start, u32 end, u32 kv_heads, u32 kv_head, f16 (&tile)[KEYS][STRIDE]) {
    for (u32 j = THREAD / 8; j < KEYS; j += THREADS / 8) {
        u32 at = start + j;
        bool there = at < end;
        u64 slot = there ? (u64)own_pages[at / PAGE] * PAGE + at % PAGE : 0;
        stage(from + (slot * kv_heads + kv_head) * HEAD_DIM, there, THREAD % 8, 8, tile[j]);
    }
}

KERNEL(THREADS) attention_prefill(const f16 *q, const f16 *k_pages, const f16 *v_pages, const i32 *starts, const i32 *lengths, const i32 *page_table, f16 *out, u32 rows, u32 heads, u32 kv_heads, u32 pages, float scale, u32 window, float softcap) {
    SHARED f16 query[QUERIES][STRIDE];
    SHARED f16 tile[KEYS][STRIDE]; // of keys, then of values
    SHARED float weight[QUERIES][KEYS + 1];
    u32 head = BLOCK_Y, kv_head = head / (heads / kv_heads);

    // Which sequence's tile this is: as many blocks as tiles can be were launched, and those too many end here.
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

    u32 own = THREAD / 4, quarter = THREAD % 4; // four threads share a query, in one wave
    for (u32 i = THREAD / 8; i < QUERIES; i += THREADS / 8)
        stage(q + ((u64)(first + i) * heads + head) * HEAD_DIM, i < count, THREAD % 8, 8, query[i]);

    float most = LEAST, sum = 0;
    float total[VECTORS][8];
    UNROLL for (u32 c = 0; c < VECTORS; ++c)
        UNROLL for (u32 i = 0; i < 8; ++i) total[c][i] = 0;

    for (u32 start = begin; start < end; start += KEYS) {
        barrier(); // the tile of the turn before is used up
        stage_tile(k_pages, page_table + (u64)row * pages, start, end, kv_heads, kv_head, tile);
        barrier();
        // Scores: two queries by four keys per thread.
        u32 i0 = THREAD / 8 * 2, j0 = THREAD % 8;
        float score[2][4] = {};
        for (u32 d = 0; d < WIDTH; d += 2) {
            float a[2][2], b[4][2];
            UNROLL for (u32 i = 0; i < 2; ++i) a[i][0] = to_float(query[i0 + i][d]), a[i][1] = to_float(query[i0 + i][d + 1]);
            UNROLL for (u32 j = 0; j < 4; ++j) b[j][0] = to_float(tile[j0 + 8 * j][d]), b[j][1] = to_float(tile[j0 + 8 * j][d + 1]);
            UNROLL for (u32 i = 0; i < 2; ++i)
                UNROLL for (u32 j = 0; j < 4; ++j) score[i][j] += a[i][0] * b[j][0] + a[i][1] * b[j][1];
        }
        UNROLL for (u32 i = 0; i < 2; ++i)
            UNROLL for (u32 j = 0; j < 4; ++j) {
                u32 from = position + i0 + i, to = start + j0 + 8 * j;
                float s = score[i][j] * scale;
                if (softcap > 0.0f) s = softcap * fast_tanh(fast_divide(s, softcap));
                bool hidden = to > from || (window && to + window <= from);
                weight[i0 + i][j0 + 8 * j] = hidden ? LEAST : s;
            }
        barrier();
        stage_tile(v_pages, page_table + (u64)row * pages, start, end, kv_heads, kv_head, tile);
        // Weights of the own query: eight keys per thread.
        float s[KEYS / 4], greatest = most;
        UNROLL for (u32 j = 0; j < KEYS / 4; ++j) {
            s[j] = weight[own][quarter + 4 * j];
            greatest = larger(greatest, s[j]);
        }
        greatest = wave_max(greatest, 4);
        float keep = fast_exp(most - greatest), part = 0;
        UNROLL for (u32 j = 0; j < KEYS / 4; ++j) {
            float w = s[j] > LEAST ? fast_exp(s[j] - greatest) : 0.0f;
            weight[own][quarter + 4 * j] = w;
            part += w;
        }
        most = greatest;
        sum = sum * keep + wave_sum(part, 4);
        barrier();
        UNROLL for (u32 c = 0; c < VECTORS; ++c)
            UNROLL for (u32 i = 0; i < 8; ++i) total[c][i] *= keep;
        for (u32 j = 0; j < KEYS; ++j) {
            float w = weight[own][j];
            UNROLL for (u32 c = 0; c < VECTORS; ++c) {
                u32 d = (quarter + 4 * c) * 8;
                if (d < WIDTH)
                    UNROLL for (u32 i = 0; i < 8; ++i) total[c][i] += w * to_float(tile[j][d + i]);
            }
        }
    }
    if (own >= count) return;
    f16 *to = out + ((u64)(first + own) * heads + head) * HEAD_DIM;
    UNROLL for (u32 c = 0; c < VECTORS; ++c)
        UNROLL for (u32 i = 0; i < 8; ++i) {
            u32 d = (quarter + 4 * c) * 8 + i;
            if (d < HEAD_DIM) to[d] = to_f16(fast_divide(total[c][i], sum));
        }
}
