// Decode attention: the heads of a token from its product, by bias, RMS norm and rotation. One wave makes a head.
// -D THREADS of a block; PACKED=query heads of a block.

#define LANE_NUMBERS ((HEAD_DIM + 31) / 32) // of a head
#define PARTIALS_AT_ONCE 4                  // loads in flight while split-K partials are added

// The product of the token, (B, row_size) as split-K partials `size` numbers apart, and what becomes of its heads.
struct Product {
    const float *qkv, *bias, *q_norm, *k_norm, *v_norm;
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
    u32 row, heads, value_head;           // the values' first head in a row
    u32 kv_heads, kv_head, group;         // query heads of a KV head
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
    const float *qkv = p.qkv, *bias = p.bias, *q_norm = p.q_norm, *k_norm = p.k_norm, *v_norm = p.v_norm;
    u32 row = t.row, heads = t.heads, kv_heads = t.kv_heads, kv_head = t.kv_head, group = t.group, pairs = p.pairs;
    u32 first_head = t.first_head, last_head = t.last_head, value_head = t.value_head;
    bool is_last = t.has_last_position;
    for (u32 n = THREAD / WAVE; n < PACKED + (is_last ? 2u : 0u); n += THREADS / WAVE) {
        u32 head = n < PACKED ? kv_head * group + first_head + (n < last_head ? n : last_head)
                   : n == PACKED ? heads + kv_head
                                 : value_head + kv_head;
        u32 at = head * HEAD_DIM;
        const float *norm = n < PACKED ? q_norm : n == PACKED ? k_norm : v_norm;
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
