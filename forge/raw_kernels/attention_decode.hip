// Attention of one query per sequence over its pages of the KV cache, split over the context.
//
// A block takes PACKED query heads of one KV head, so that keys and values are read once for all of them, and a part of
// the positions. LANES lanes of a wave share a key: each holds PER numbers of it. Every lane group keeps a running
// maximum, sum and weighted value per head (arXiv:1805.02867); the groups of a block are joined at its end, the parts of
// the context by attention_merge (arXiv:2311.01282).
// -D HEAD_DIM, PAGE=positions of a page, PACKED.

#define THREADS 128
#define VECTOR (HEAD_DIM % 8 == 0)
#define PER (VECTOR ? 8 : (HEAD_DIM + 31) / 32)
#define PARTS ((HEAD_DIM + PER - 1) / PER)
#define LANES (PARTS <= 1 ? 1 : PARTS <= 2 ? 2 : PARTS <= 4 ? 4 : PARTS <= 8 ? 8 : PARTS <= 16 ? 16 : 32)
#define TEAMS (THREADS / LANES) // lane groups of a block
#define LEAST (-1e30f)          // below every score, and finite: exp of a difference stays defined

DEVICE void read_part(const f16 *row, u32 part, float (&value)[PER]) {
#if VECTOR
    f16x8 v = part < PARTS ? *(const f16x8 *)(row + part * 8) : f16x8{};
    UNROLL for (u32 i = 0; i < PER; ++i) value[i] = to_float(v.v[i]);
#else
    UNROLL for (u32 i = 0; i < PER; ++i) {
        u32 d = part * PER + i;
        value[i] = d < HEAD_DIM ? to_float(row[d]) : 0.0f;
    }
#endif
}

KERNEL(THREADS) attention_decode(const f16 *q, const f16 *k_pages, const f16 *v_pages, const i32 *lengths, const i32 *page_table, f16 *out, float *part_values, float *part_sums, u32 heads, u32 kv_heads, u32 pages, u32 span, float scale, u32 window, float softcap) {
    SHARED float team_most[TEAMS][PACKED];
    SHARED float team_sum[TEAMS][PACKED];
    SHARED float values[PACKED][HEAD_DIM];
    u32 group = heads / kv_heads, chunks = (group + PACKED - 1) / PACKED;
    u32 row = BLOCK_X, kv_head = BLOCK_Y / chunks, first_head = BLOCK_Y % chunks * PACKED;
    u32 split = BLOCK_Z;
    u32 team = THREAD / LANES, part = THREAD % LANES;
    u32 length = (u32)lengths[row];
    u32 begin = split * span, end = begin + span < length ? begin + span : length;
    if (window && length > window && begin < length - window) begin = length - window;

    float query[PACKED][PER], value[PACKED][PER], most[PACKED], sum[PACKED];
    UNROLL for (u32 h = 0; h < PACKED; ++h) {
        u32 own = first_head + h < group ? first_head + h : group - 1;
        read_part(q + ((u64)row * heads + kv_head * group + own) * HEAD_DIM, part, query[h]);
        UNROLL for (u32 i = 0; i < PER; ++i) query[h][i] *= scale, value[h][i] = 0;
        most[h] = LEAST;
        sum[h] = 0;
    }
    // All lanes of the block make the same number of turns; those without a position do not count.
    u32 turns = begin < end ? (end - begin + TEAMS - 1) / TEAMS : 0;
    for (u32 turn = 0; turn < turns; ++turn) {
        u32 position = begin + turn * TEAMS + team;
        bool there = position < end;
        float key[PER], own[PER];
        UNROLL for (u32 i = 0; i < PER; ++i) key[i] = own[i] = 0;
        if (there) {
            u64 slot = (u64)page_table[(u64)row * pages + position / PAGE] * PAGE + position % PAGE;
            u64 at = (slot * kv_heads + kv_head) * HEAD_DIM;
            read_part(k_pages + at, part, key);
            read_part(v_pages + at, part, own);
        }
        UNROLL for (u32 h = 0; h < PACKED; ++h) {
            float score = 0;
            UNROLL for (u32 i = 0; i < PER; ++i) score += query[h][i] * key[i];
            score = wave_sum(score, LANES);
            if (softcap > 0.0f) score = softcap * fast_tanh(fast_divide(score, softcap));
            if (!there) score = LEAST;
            float greatest = larger(most[h], score);
            float keep = fast_exp(most[h] - greatest), weight = there ? fast_exp(score - greatest) : 0.0f;
            most[h] = greatest;
            sum[h] = sum[h] * keep + weight;
            UNROLL for (u32 i = 0; i < PER; ++i) value[h][i] = value[h][i] * keep + weight * own[i];
        }
    }
    if (part == 0)
        for (u32 h = 0; h < PACKED; ++h) team_most[team][h] = most[h], team_sum[team][h] = sum[h];
    for (u32 i = THREAD; i < PACKED * HEAD_DIM; i += THREADS) values[i / HEAD_DIM][i % HEAD_DIM] = 0;
    barrier();
    float block_most[PACKED], block_sum[PACKED];
    for (u32 h = 0; h < PACKED; ++h) {
        block_most[h] = LEAST;
        block_sum[h] = 0;
        ROLLED for (u32 t = 0; t < TEAMS; ++t) block_most[h] = larger(block_most[h], team_most[t][h]);
        ROLLED for (u32 t = 0; t < TEAMS; ++t) block_sum[h] += team_sum[t][h] * fast_exp(team_most[t][h] - block_most[h]);
    }
    // Teams add their values one after the other: the order is fixed, so runs are equal bit for bit.
    ROLLED for (u32 t = 0; t < TEAMS; ++t) {
        if (t == team && part < PARTS)
            for (u32 h = 0; h < PACKED; ++h)
                for (u32 i = 0; i < PER; ++i) {
                    u32 d = part * PER + i;
                    if (d < HEAD_DIM) values[h][d] += value[h][i] * fast_exp(most[h] - block_most[h]);
                }
        barrier();
    }
    u32 splits = (pages * PAGE + span - 1) / span;
    for (u32 h = 0; h < PACKED && first_head + h < group; ++h) {
        u64 head = (u64)row * heads + kv_head * group + first_head + h;
        for (u32 d = THREAD; d < HEAD_DIM; d += THREADS) {
            if (splits == 1)
                out[head * HEAD_DIM + d] = to_f16(fast_divide(values[h][d], block_sum[h]));
            else
                part_values[(head * splits + split) * HEAD_DIM + d] = values[h][d];
        }
        if (splits > 1 && THREAD == 0) {
            part_sums[(head * splits + split) * 2] = block_most[h];
            part_sums[(head * splits + split) * 2 + 1] = block_sum[h];
        }
    }
}

// Joins the parts of the context. A block per query head.
KERNEL(64) attention_merge(const float *part_values, const float *part_sums, f16 *out, u32 splits) {
    u64 head = BLOCK_X;
    const float *sums = part_sums + head * splits * 2;
    float most = LEAST, sum = 0;
    for (u32 s = 0; s < splits; ++s) most = larger(most, sums[2 * s]);
    for (u32 s = 0; s < splits; ++s) sum += sums[2 * s + 1] * fast_exp(sums[2 * s] - most);
    for (u32 d = THREAD; d < HEAD_DIM; d += 64) {
        float value = 0;
        for (u32 s = 0; s < splits; ++s)
            value += part_values[(head * splits + s) * HEAD_DIM + d] * fast_exp(sums[2 * s] - most);
        out[head * HEAD_DIM + d] = to_f16(fast_divide(value, sum));
    }
}
