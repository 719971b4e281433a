// Attention of one query per sequence over its pages of the KV cache, split over the context.
//
// A block takes PACKED query heads of one KV head, so that keys and values are read once for all of them, and a part of
// the positions. LANES lanes of a wave share a key: each holds PER numbers of it. Such a team takes POSITIONS of them at
// a time, whose loads are under way together, and keeps a running maximum, sum and weighted value per head
// (arXiv:1805.02867). The teams of a wave are joined by shuffles, the waves of a block through LDS, and the parts of a
// context by the block that is the last to end (arXiv:2311.01282).
//
// With ROPE a block makes its queries from the product of the token: bias, RMS norm, rotation. The block with the last
// position makes its key and value too; it takes them as the cache holds them, and one of those of a KV head appends them.
// -D THREADS of a block; CORE_BLOCKS=blocks that a multiprocessor holds; POSITIONS; HEAD_DIM; PAGE=positions of a page; PACKED; ROPE=0: queries are given, 1: pairs (i, i + pairs), 2: (2i, 2i + 1).

#define VECTOR (HEAD_DIM % 8 == 0)
#define PER (VECTOR ? 8 : (HEAD_DIM + 31) / 32)
#define PIECES ((HEAD_DIM + PER - 1) / PER)
#define LANES (PIECES <= 1 ? 1 : PIECES <= 2 ? 2 : PIECES <= 4 ? 4 : PIECES <= 8 ? 8 : PIECES <= 16 ? 16 : 32)
#define TEAMS (THREADS / LANES) // of a block
#define TURN (TEAMS * POSITIONS)
#define PER_LANE ((HEAD_DIM + 31) / 32)
#define EACH ((PACKED * HEAD_DIM + THREADS - 1) / THREADS) // results of a block, per thread
#define MOST_PARTS 128                                     // of a context
#define JOINED (EACH <= 4 ? 16 : 8)                        // parts whose loads are under way together
#define LEAST (-1e30f)                                     // below every score, and finite: a difference stays defined
#define MISSING (2 * LEAST)                                // its weight is 0, whatever the maximum
#define NOWHERE 0xffffffffu
#undef RESIDENT
#define RESIDENT CORE_BLOCKS

struct alignas(16) Head {
    float v[HEAD_DIM];
};
#if VECTOR
typedef f16x8 Piece;
#else
struct Piece {
    f16 v[PER];
};
#endif

// The pages of a team's next positions, whether or not there are so many; and their slots.
DEVICE void find_pages(const i32 *own_pages, u32 pages, u32 position, u32 (&page)[POSITIONS]) {
    UNROLL for (u32 j = 0; j < POSITIONS; ++j) {
        u32 n = (position + j * TEAMS) / PAGE;
        page[j] = (u32)read_far(own_pages + (n < pages ? n : pages - 1));
    }
}
DEVICE void find_slots(const u32 (&page)[POSITIONS], u32 position, u32 end, u32 (&slot)[POSITIONS]) {
    UNROLL for (u32 j = 0; j < POSITIONS; ++j) {
        u32 at = position + j * TEAMS;
        slot[j] = at < end ? page[j] * PAGE + at % PAGE : NOWHERE;
    }
}

// A lane's pieces of the keys, or values, in these slots; zeros where there is none.
DEVICE void read_pieces(const f16 *pages, const u32 (&slot)[POSITIONS], u32 kv_heads, u32 kv_head, u32 piece, Piece (&to)[POSITIONS]) {
    UNROLL for (u32 j = 0; j < POSITIONS; ++j) {
        const f16 *row = pages + ((u64)slot[j] * kv_heads + kv_head) * HEAD_DIM;
        bool there = slot[j] != NOWHERE && piece < PIECES;
#if VECTOR
        to[j] = there ? *(const f16x8 *)(row + piece * 8) : f16x8{};
#else
        UNROLL for (u32 i = 0; i < PER; ++i) {
            u32 d = piece * PER + i;
            to[j].v[i] = there && d < HEAD_DIM ? row[d] : f16{0};
        }
#endif
    }
}

// A lane's numbers of a head in LDS. Those of lanes without a piece meet zeros.
DEVICE void take_piece(const Head &head, u32 piece, float (&to)[PER]) {
    u32 first = piece < PIECES ? piece * PER : 0;
    UNROLL for (u32 i = 0; i < PER; ++i) to[i] = VECTOR || first + i < HEAD_DIM ? head.v[first + i] : 0.0f;
}

// A thread's numbers of some parts' values; zeros where there is none.
DEVICE void read_parts(const float *values, u32 start, u32 parts, u32 results, float (&to)[EACH][JOINED]) {
    UNROLL for (u32 n = 0; n < EACH; ++n)
        UNROLL for (u32 s = 0; s < JOINED; ++s) {
            u32 at = THREAD + n * THREADS;
            to[n][s] = start + s < parts && at < results ? values[(start + s) * PACKED * HEAD_DIM + at] : 0.0f;
        }
}

#if ROPE
// A head of the product by a whole wave, from which number LANE + i * WAVE is x[i]. The first 2 * pairs numbers turn. The
// product is the sum of slices, arrays of `size` numbers one behind the other.
DEVICE void make_head(const float *head, u64 size, u32 slices, const float *bias, const float *norm, const float *rotation, u32 pairs, float eps, float (&x)[PER_LANE]) {
    float other[PER_LANE], cosine[PER_LANE], sine[PER_LANE];
    float squares = 0;
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
        u32 at = LANE + i * WAVE; // where there is no such number, another is read: no load waits for a branch
        bool there = HEAD_DIM % WAVE == 0 || at < HEAD_DIM;
        u32 d = there ? at : 0;
        bool turns = d < 2 * pairs, first = ROPE == 2 ? LANE % 2 == 0 : d < pairs;
        u32 partner = !turns ? d : ROPE == 2 ? d ^ 1 : first ? d + pairs : d - pairs;
        u32 pair = !turns ? 0 : ROPE == 2 ? d / 2 : first ? d : partner;
        f32x2 turn = *(const f32x2 *)(rotation + 2 * pair);
        cosine[i] = turns ? turn.v[0] : 1.0f;
        sine[i] = !turns ? 0.0f : first ? -turn.v[1] : turn.v[1];
        x[i] = 0, other[i] = 0;
        for (u32 s = 0; s < slices; s += SLICES_AT_ONCE) {
            float own[SLICES_AT_ONCE], of_partner[SLICES_AT_ONCE];
            UNROLL for (u32 n = 0; n < SLICES_AT_ONCE; ++n) {
                own[n] = s + n < slices ? head[(s + n) * size + d] : 0.0f;
                of_partner[n] = s + n < slices ? head[(s + n) * size + partner] : 0.0f;
            }
            UNROLL for (u32 n = 0; n < SLICES_AT_ONCE; ++n) x[i] += own[n], other[i] += of_partner[n];
        }
        if (bias) x[i] += bias[d], other[i] += bias[partner];
        squares += there ? x[i] * x[i] : 0.0f;
        if (norm) x[i] *= norm[d], other[i] *= norm[partner];
    }
    float scale = norm ? rsqrt_fast(wave_sum(squares) * (1.0f / HEAD_DIM) + eps) : 1.0f; // the same for the wave
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) x[i] = x[i] * scale * cosine[i] + other[i] * scale * sine[i];
}
#endif

KERNEL(THREADS) attention_decode(const f16 *q, const float *qkv, const float *bias, const float *q_norm, const float *k_norm, const float *rotations, const float *query_scale, const i32 *lengths, const i32 *slots, f16 *k_pages, f16 *v_pages, const i32 *page_table, f16 *out, float *part_values, float *part_sums, u32 *arrived, u32 heads, u32 kv_heads, u32 pages, u32 pairs, u32 rows, u32 slices, u32 splits, float eps, float scale, u32 window, float softcap) {
    SHARED Head query[PACKED];
    SHARED Head latest[2]; // the last position's key and value
    SHARED Head values[MOST_WAVES(THREADS)][PACKED];
    SHARED float mosts[MOST_WAVES(THREADS)][PACKED];
    SHARED float sums[MOST_WAVES(THREADS)][PACKED];
    SHARED float share[PACKED][MOST_PARTS];
    SHARED u32 before;
    if (!ROPE) await_earlier(); // it may be what stored the last position
    u32 row = BLOCK_X, split = BLOCK_Z, team = THREAD / LANES, piece = THREAD % LANES;
    u32 length = (u32)read_far(lengths + row);
    const i32 *own_pages = page_table + (u64)row * pages;
    u32 page[POSITIONS]; // asked for together with the length, on which only a window's first positions depend
    find_pages(own_pages, pages, split * TURN + team, page);
    UNROLL for (u32 j = 0; j < POSITIONS; ++j) settle(page[j]);
    u32 group = heads / kv_heads, chunks = (group + PACKED - 1) / PACKED;
    u32 kv_head = BLOCK_Y / chunks, first_head = BLOCK_Y % chunks * PACKED;

    // Parts take turns of positions in turn, as many as the launch has room for: blocks that are left without one end here.
    u32 first = window && length > window ? length - window : 0;
    u32 turns = (length - first + TURN - 1) / TURN, parts = turns < splits ? turns : splits;
    bool is_last = split == (turns - 1) % splits;
    u32 begin = first + split * TURN, stride = splits * TURN, cached = length - (ROPE ? 1 : 0);
    if (split >= parts) {
        if (ROPE) await_earlier(rows <= FEW_ROWS);
        return;
    }

    // What must come from far is asked for first.
    u32 slot[POSITIONS];
    Piece key[POSITIONS], own[POSITIONS];
    if (first) find_pages(own_pages, pages, begin + team, page);
    find_slots(page, begin + team, cached, slot);
    read_pieces(k_pages, slot, kv_heads, kv_head, piece, key);
    read_pieces(v_pages, slot, kv_heads, kv_head, piece, own);
    if (ROPE) await_earlier(rows <= FEW_ROWS);

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
                query[n].v[d] = x[i] * factor;
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
        query[h].v[d] = to_float(q[head * HEAD_DIM + d]) * factor;
    }
#endif
    barrier();

    float value[PACKED][PER], most[PACKED], sum[PACKED];
    UNROLL for (u32 h = 0; h < PACKED; ++h) {
        UNROLL for (u32 i = 0; i < PER; ++i) value[h][i] = 0;
        most[h] = LEAST;
        sum[h] = 0;
    }
    const float cap = softcap * LOG2E, per_cap = softcap > 0.0f ? fast_divide(1.0f, softcap) : 0.0f;
    if (ROPE && is_last) { // for the whole block; the first team takes it
        float last_key[PER], last_value[PER];
        take_piece(latest[0], piece, last_key);
        take_piece(latest[1], piece, last_value);
        UNROLL for (u32 h = 0; h < PACKED; ++h) {
            float asked[PER], score = 0;
            take_piece(query[h], piece, asked);
            UNROLL for (u32 i = 0; i < PER; ++i) score += piece < PIECES ? asked[i] * last_key[i] : 0.0f;
            score = wave_sum(score, LANES);
            if (softcap > 0.0f) score = cap * fast_tanh(score * per_cap);
            if (team == 0) {
                most[h] = score;
                sum[h] = 1;
                UNROLL for (u32 i = 0; i < PER; ++i) value[h][i] = last_value[i];
            }
        }
    }
    // All lanes of the block make the same number of turns.
    for (u32 start = begin; start < cached; start += stride) {
        find_pages(own_pages, pages, start + stride + team, page);
        float score[PACKED][POSITIONS];
        UNROLL for (u32 h = 0; h < PACKED; ++h) {
            float asked[PER];
            take_piece(query[h], piece, asked);
            UNROLL for (u32 j = 0; j < POSITIONS; ++j) {
                score[h][j] = 0;
                UNROLL for (u32 i = 0; i < PER; ++i) score[h][j] += asked[i] * to_float(key[j].v[i]);
            }
        }
        find_slots(page, start + stride + team, cached, slot); // of the next turn
        read_pieces(k_pages, slot, kv_heads, kv_head, piece, key);
        UNROLL for (u32 h = 0; h < PACKED; ++h)
            UNROLL for (u32 j = 0; j < POSITIONS; ++j) score[h][j] = wave_sum(score[h][j], LANES);
        if (softcap > 0.0f)
            UNROLL for (u32 h = 0; h < PACKED; ++h)
                UNROLL for (u32 j = 0; j < POSITIONS; ++j) score[h][j] = cap * fast_tanh(score[h][j] * per_cap);
        if (start + TURN > cached)
            UNROLL for (u32 h = 0; h < PACKED; ++h)
                UNROLL for (u32 j = 0; j < POSITIONS; ++j)
                    if (start + team + j * TEAMS >= cached) score[h][j] = MISSING;
        UNROLL for (u32 h = 0; h < PACKED; ++h) {
            float greatest = most[h];
            UNROLL for (u32 j = 0; j < POSITIONS; ++j) greatest = larger(greatest, score[h][j]);
            float keep = exp2_fast(most[h] - greatest);
            most[h] = greatest;
            sum[h] *= keep;
            UNROLL for (u32 i = 0; i < PER; ++i) value[h][i] *= keep;
            UNROLL for (u32 j = 0; j < POSITIONS; ++j) {
                score[h][j] = exp2_fast(score[h][j] - greatest);
                sum[h] += score[h][j];
            }
        }
        UNROLL for (u32 j = 0; j < POSITIONS; ++j)
            UNROLL for (u32 i = 0; i < PER; ++i) {
                float x = to_float(own[j].v[i]);
                UNROLL for (u32 h = 0; h < PACKED; ++h) value[h][i] += score[h][j] * x;
            }
        read_pieces(v_pages, slot, kv_heads, kv_head, piece, own);
    }

    // The teams of a wave, then the waves.
    UNROLL for (u32 h = 0; h < PACKED; ++h) {
        float greatest = most[h];
        for (u32 i = LANES; i < WAVE; i *= 2) greatest = larger(greatest, shfl_xor(greatest, i));
        float keep = exp2_fast(most[h] - greatest);
        sum[h] *= keep;
        for (u32 i = LANES; i < WAVE; i *= 2) sum[h] += shfl_xor(sum[h], i);
        UNROLL for (u32 n = 0; n < PER; ++n) {
            float all = value[h][n] * keep;
            for (u32 i = LANES; i < WAVE; i *= 2) all += shfl_xor(all, i);
            u32 d = piece * PER + n;
            if (LANE < LANES && d < HEAD_DIM) values[THREAD / WAVE][h].v[d] = all;
        }
        if (LANE == 0) mosts[THREAD / WAVE][h] = greatest, sums[THREAD / WAVE][h] = sum[h];
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
        for (u32 w = 0; w < THREADS / WAVE; ++w) greatest = larger(greatest, mosts[w][h]);
        for (u32 w = 0; w < THREADS / WAVE; ++w) {
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
        float part_most[MOST_PARTS / 32], part_sum[MOST_PARTS / 32];
        float greatest = LEAST, total = 0;
        UNROLL for (u32 i = 0; i * WAVE < MOST_PARTS; ++i) {
            u32 s = LANE + i * WAVE;
            bool there = s < parts && h <= most_head;
            f32x2 found = there ? *(const f32x2 *)(block_sums + (s * PACKED + h) * 2) : f32x2{MISSING, 0.0f};
            part_most[i] = found.v[0], part_sum[i] = found.v[1];
            greatest = larger(greatest, part_most[i]);
        }
        greatest = wave_max(greatest);
        UNROLL for (u32 i = 0; i * WAVE < MOST_PARTS; ++i) {
            part_most[i] = exp2_fast(part_most[i] - greatest);
            total += part_most[i] * part_sum[i];
        }
        total = wave_sum(total);
        UNROLL for (u32 i = 0; i * WAVE < MOST_PARTS; ++i)
            share[h][LANE + i * WAVE] = fast_divide(part_most[i], total);
    }
    barrier();
    UNROLL for (u32 n = 0; n < EACH; ++n) joined[n] = 0;
    for (u32 start = 0; start < parts; start += JOINED) {
        UNROLL for (u32 n = 0; n < EACH; ++n) {
            u32 at = THREAD + n * THREADS;
            UNROLL for (u32 s = 0; s < JOINED; ++s) joined[n] += part[n][s] * (at < results ? share[at / HEAD_DIM][start + s] : 0.0f);
        }
        read_parts(block_values, start + JOINED, parts, results, part);
    }
    UNROLL for (u32 n = 0; n < EACH; ++n)
        if (THREAD + n * THREADS < results) block_out[THREAD + n * THREADS] = to_f16(joined[n]);
}
