// Decode attention: the heads of a token from its product, by bias, RMS norm and rotation. The block's threads add the partials of all
// its heads at once, so that the memory's latency is paid once, then one wave makes a head.
// -D THREADS of a block; PACKED=query heads of a block; ODD_ROWS=1: a row of the product is no multiple of 4 numbers.

#define LANE_NUMBERS ((HEAD_DIM + 31) / 32) // of a head
#define PARTIALS_AT_ONCE 4                  // loads in flight while split-K partials are added
#ifndef ODD_ROWS
#define ODD_ROWS 0
#endif
#define SUMMED (HEAD_DIM % 4 || ODD_ROWS ? 1 : 4) // numbers that a thread adds up together
#define HEAD_SUMS (HEAD_DIM / SUMMED)
#define THREAD_SUMS (((PACKED + 2) * HEAD_SUMS + THREADS - 1) / THREADS)

// The product of the token, (B, row_size) as split-K partials `size` numbers apart, and what becomes of its heads.
struct Product {
    const float *qkv, *bias, *q_norm, *k_norm, *v_norm;
    const float *cos_sin; // of the last position, (pairs, 2)
    u64 size;
    u32 partials, pairs;
    float eps;
};

// What a block computes: the heads of a row, and which split of its positions.
struct Task {
    u32 row, heads, value_head;               // the values' first head in a row
    u32 kv_heads, kv_head, group;             // query heads of a KV head
    u32 first_head, last_head;                // in the group; last_head counts from first_head and may be PACKED or more
    bool has_last_position;
};

// The heads of a block, by bias and norm's weights, and the squares that its root mean square is made of.
struct Sums {
    Rows (&query)[PACKED], (&latest)[2];
    float (&squares)[PACKED + 2][HEAD_SUMS];
};

// Adds the partials of the block's first `count` heads: its queries, then the key and the value of the last position.
DEVICE void add_partials(const Task &t, const Product &p, u32 count, const Sums &to) {
    const float *qkv = p.qkv, *bias = p.bias, *q_norm = p.q_norm, *k_norm = p.k_norm, *v_norm = p.v_norm; // see make_heads
    u32 at[THREAD_SUMS];
    float sum[THREAD_SUMS][SUMMED], weight[THREAD_SUMS][SUMMED];
    UNROLL for (u32 i = 0; i < THREAD_SUMS; ++i) {
        u32 place = THREAD + i * THREADS, n = place / HEAD_SUMS, d = place % HEAD_SUMS * SUMMED;
        if (n >= count) n = 0; // so that no load waits for a branch
        u32 of_group = n < t.last_head ? n : t.last_head;
        u32 head = n < PACKED ? t.kv_head * t.group + t.first_head + of_group : (n == PACKED ? t.heads : t.value_head) + t.kv_head;
        const float *norm = n < PACKED ? q_norm : n == PACKED ? k_norm : v_norm;
        at[i] = head * HEAD_DIM + d;
        UNROLL for (u32 j = 0; j < SUMMED; ++j) sum[i][j] = 0, weight[i][j] = 1.0f;
        if (norm) {
            auto found = load<SUMMED>(norm + d);
            UNROLL for (u32 j = 0; j < SUMMED; ++j) weight[i][j] = found.v[j];
        }
        if (bias) {
            auto found = load<SUMMED>(bias + at[i]);
            UNROLL for (u32 j = 0; j < SUMMED; ++j) sum[i][j] = found.v[j];
        }
    }
    for (u32 s = 0; s < p.partials; s += PARTIALS_AT_ONCE) {
        Vec<float, SUMMED> part[PARTIALS_AT_ONCE][THREAD_SUMS];
        UNROLL for (u32 n = 0; n < PARTIALS_AT_ONCE; ++n) {
            const float *partial = qkv + (s + n < p.partials ? s + n : p.partials - 1) * p.size;
            UNROLL for (u32 i = 0; i < THREAD_SUMS; ++i) part[n][i] = load<SUMMED>(partial + at[i]);
        }
        UNROLL for (u32 n = 0; n < PARTIALS_AT_ONCE; ++n)
            if (s + n < p.partials)
                UNROLL for (u32 i = 0; i < THREAD_SUMS; ++i)
                    UNROLL for (u32 j = 0; j < SUMMED; ++j) sum[i][j] += part[n][i].v[j];
    }
    UNROLL for (u32 i = 0; i < THREAD_SUMS; ++i) {
        u32 place = THREAD + i * THREADS, n = place / HEAD_SUMS, d = place % HEAD_SUMS * SUMMED;
        if (n >= count) continue;
        Rows &into = n < PACKED ? to.query[n] : to.latest[n - PACKED];
        float squares = 0;
        UNROLL for (u32 j = 0; j < SUMMED; ++j) squares += sum[i][j] * sum[i][j], into.v[d + j] = sum[i][j] * weight[i][j];
        to.squares[n][d / SUMMED] = squares;
    }
}

// The i-th number of a lane in a head; past the head its first one.
DEVICE u32 lane_number(u32 lane, u32 i) { return HEAD_DIM % WAVE == 0 || lane + i * WAVE < HEAD_DIM ? lane + i * WAVE : 0; }

// The block's queries times `factor`; the key and the value of the last position, also appended to the cache at the row's slot.
// The sums of the queries and their squares need LDS in between.
DEVICE void make_heads(
    const Task &t,
    const Product &p,
    float factor,
    const i32 *slots,
    f16 *k_pages,
    f16 *v_pages,
    Query (&query)[PACKED],
    Rows (&latest)[2],
    Rows (&query_sums)[PACKED],
    float (&squares)[PACKED + 2][HEAD_SUMS]
) {
    // Copies, because NVIDIA's compiler makes a branch of `?:` on fields of a struct, with more registers.
    const float *q_norm = p.q_norm, *k_norm = p.k_norm, *v_norm = p.v_norm;
    u32 kv_heads = t.kv_heads, kv_head = t.kv_head, pairs = p.pairs, count = PACKED + (t.has_last_position ? 2u : 0u);
    u64 slot = (u32)slots[t.row];
    f32x2 turn[LANE_NUMBERS];
    UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
        u32 d = lane_number(LANE, i), partner = d >= 2 * pairs ? d : partner_of(d, pairs);
        turn[i] = load<2>(p.cos_sin + 2 * (d < 2 * pairs ? pair_of(d, partner, is_first_of_pair(d, pairs)) : 0));
    }
    add_partials(t, p, count, Sums{query_sums, latest, squares});
    barrier();
    u32 lane = LANE;
    compiler_fence(lane); // places are computed again rather than held in registers
    for (u32 n = THREAD / WAVE; n < count; n += THREADS / WAVE) {
        Rows &from = n < PACKED ? query_sums[n] : latest[n - PACKED];
        float scale = 1.0f, x[LANE_NUMBERS]; // the scale is the same for the wave
        if (n < PACKED ? q_norm : n == PACKED ? k_norm : v_norm) {
            float sum = 0;
            for (u32 i = LANE; i < HEAD_SUMS; i += WAVE) sum += squares[n][i];
            scale = rms_scale(wave_sum(sum) * (1.0f / HEAD_DIM), p.eps);
        }
        UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
            u32 d = lane_number(lane, i), partner = d >= 2 * pairs ? d : partner_of(d, pairs);
            bool rotates = n <= PACKED && d < 2 * pairs, first = is_first_of_pair(d, pairs);
            float cosine = rotates ? turn[i].v[0] : 1.0f, sine = !rotates ? 0.0f : first ? -turn[i].v[1] : turn[i].v[1];
            x[i] = from.v[d] * scale * cosine + from.v[partner] * scale * sine;
        }
        wave_sync(); // all lanes have read the sums of the key
        UNROLL for (u32 i = 0; i * WAVE < HEAD_DIM; ++i) {
            u32 d = lane + i * WAVE;
            if (HEAD_DIM % WAVE && d >= HEAD_DIM) continue;
            if (n < PACKED) {
                query[n].v[d] = to_f16(x[i] * factor);
            } else {
                f16 kept = to_f16(x[i]);
                latest[n - PACKED].v[d] = to_float(kept);
                if (t.first_head == 0)
                    (n == PACKED ? k_pages : v_pages)[(slot * kv_heads + kv_head) * HEAD_DIM + d] = kept;
            }
        }
    }
}
