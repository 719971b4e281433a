// Router of a mixture of experts without groups, for several rows: as route.hip, by a block for each EACH experts and 8 rows.
// Uses: router_weights
//
// Weights are on their way before the rows are there. The block of 8 rows that ends last chooses for them, a wave for a row; the last of
// all that choose lists the tiles of pairs of a row and one of its experts, as expert_groups does, for up to 64 rows.
// -D BLOCK=threads; PIECES=vectors of a row that a thread takes; EACH; VECTOR of route.hip.

#define MAX_EXPERTS 512
#define TOGETHER 8

// The wave's sums of eight numbers. This lane's is of the number eight_place().
DEVICE u32 eight_place() { return LANE % 2 * 4 + LANE / 2 % 2 * 2 + LANE / 4 % 2; }
template <u32 HALF, u32 N> DEVICE void fold(float (&v)[N]) {
    const u32 mask = N / 2 / HALF;
    UNROLL for (u32 i = 0; i < HALF; ++i) {
        float first = v[i], second = v[i + HALF]; // in registers: clang would choose between addresses
        bool upper = LANE & mask;
        v[i] = (upper ? second : first) + shfl_xor(upper ? first : second, mask);
    }
}
DEVICE float sum_of_eight(float (&v)[TOGETHER]) {
    fold<4>(v);
    fold<2>(v);
    fold<1>(v);
    float sum = v[0];
    for (u32 mask = TOGETHER; mask < WAVE; mask *= 2) sum += shfl_xor(sum, mask);
    return sum;
}

// The sum of what threads before this one have, and of all.
template <u32 N> DEVICE u32 sum_before(u32 x, u32 &all, u32 (&scratch)[N]) {
    u32 sum = x, before = 0;
    for (u32 distance = 1; distance < WAVE; distance *= 2) {
        u32 more = shfl(sum, LANE >= distance ? LANE - distance : LANE);
        if (LANE >= distance) sum += more;
    }
    if (LANE == WAVE - 1) scratch[THREAD / WAVE] = sum;
    lds_barrier();
    all = 0;
    for (u32 w = 0; w < BLOCK / WAVE; ++w) {
        if (w == THREAD / WAVE) before = all;
        all += scratch[w];
    }
    return before + sum - x;
}

// The best U of the keys of a row's experts, of which a lane has `each` that follow each other. This lane's is in the place LANE.
DEVICE u32 choose(u32 *own, u32 each, u32 experts, u32 used) {
    u32 expert = LANE < experts ? LANE : 0, best = 0, first = LANE * each; // an expert though keys be equal and 0
    for (u32 i = 0; i < each; ++i) best = larger(best, own[i]);
    for (u32 place = 0; place < used; ++place) {
        u32 most = wave_max(best);
        u64 who = wave_ballot(best == most);
        u32 leader = popcount((who & (0 - who)) - 1), found = 0;
        if (LANE == leader) {
            bool is_out = false;
            best = 0;
            for (u32 i = 0; i < each; ++i) {
                u32 key = own[i];
                if (!is_out && key == most)
                    is_out = true, found = first + i, own[i] = 0;
                else
                    best = larger(best, key);
            }
        }
        found = shfl(found, leader);
        if (LANE == place) expert = smaller(found, experts - 1); // where keys are of NaN, too
    }
    return expert;
}

struct Tiles {
    i32 *pairs; // (P,) numbers of pairs, by expert and number, or null: no list is made
    i32 *tiles; // (tiles, 4) see expert_groups
    u32 rows;   // pairs of a tile at most
    u32 count;  // of tiles
};
// The list of all pairs. A row chooses an expert once: a pair's place among its expert's is that of its row.
DEVICE void list_tiles(const Tiles &to, const i32 *chosen, u32 total, u32 used, u32 experts) {
    SHARED u32 rows_of[MAX_EXPERTS][2], first_of[MAX_EXPERTS], scratch[MAX_WAVES(BLOCK)];
    for (u32 e = THREAD; e < MAX_EXPERTS; e += BLOCK) rows_of[e][0] = rows_of[e][1] = 0;
    lds_barrier();
    for (u32 p = THREAD; p < total; p += BLOCK) {
        u32 row = p / used;
        atomic_add(&rows_of[(u32)chosen[p]][row / 32], 1u << row % 32);
    }
    lds_barrier();
    const u32 each = MAX_EXPERTS / BLOCK;
    u32 own = 0, all;
    UNROLL for (u32 i = 0; i < each; ++i) {
        const u32(&mask)[2] = rows_of[THREAD * each + i];
        u32 count = popcount(mask[0]) + popcount(mask[1]);
        own += count | (count + to.rows - 1) / to.rows << 16;
    }
    u32 before = sum_before(own, all, scratch), first = before & 0xffffu, tile = before >> 16;
    UNROLL for (u32 i = 0; i < each; ++i) {
        u32 e = THREAD * each + i, count = popcount(rows_of[e][0]) + popcount(rows_of[e][1]);
        first_of[e] = first;
        for (u32 at = 0; at < count; at += to.rows)
            store(to.tiles + 4 * tile++, Vec<i32, 4>{{(i32)e, (i32)(first + at), (i32)smaller(count - at, to.rows), 0}});
        first += count;
    }
    for (u32 t = (all >> 16) + THREAD; t < to.count; t += BLOCK) store(to.tiles + 4 * t, Vec<i32, 4>{{0, 0, 0, 0}});
    lds_barrier();
    for (u32 p = THREAD; p < total; p += BLOCK) {
        u32 e = (u32)chosen[p], row = p / used;
        u64 mask = (u64)rows_of[e][1] << 32 | rows_of[e][0];
        to.pairs[first_of[e] + popcount(mask & (((u64)1 << row) - 1))] = (i32)p;
    }
}

// Whether this block is the last of so many to arrive. All of its threads have stored what others read.
DEVICE bool is_last(u32 *arrived, u32 blocks) {
    SHARED u32 before;
    fence_device();
    barrier();
    if (THREAD == 0) before = atomic_add(arrived, 1u);
    barrier();
    if (before != blocks - 1) return false;
    fence_device();
    if (THREAD == 0) *arrived = 0; // for the next launch
    return true;
}

KERNEL(BLOCK) route_rows(
    const float *x,              // (M, K)
    const float *norm,           // (K,) weights of the RMS norm of x
    const float *weight,         // (X, K)
    const float *bias,           // (X,) added to the logits, or null
    const float *selection_bias, // (X,) added to the scores for the choice, or null
    const float *expert_scale,   // (X,) factors of the weights, or null
    float *logits,               // (M, X)
    u32 *arrived,                // (ceil(M / 8) + 1,) zeros
    i32 *chosen,                 // (M, U) best first
    float *weights,              // (M, U)
    i32 *pairs,                  // of Tiles, as the three others
    i32 *tiles,
    u32 tile_rows,
    u32 num_tiles,
    float eps,        // of the norm
    float factor,     // of the weights
    u32 rows,         // M
    u32 inner,        // K
    u32 experts,      // X
    u32 used,         // U, at most 32
    u32 is_sigmoid,   // 0 or 1: scores are sigmoids, else a softmax
    u32 renormalizes, // 0 or 1: weights are divided by their sum
    u32 blocks        // of the same rows
) {
    SHARED float parts[MAX_WAVES(BLOCK)][EACH + 1][TOGETHER];
    SHARED u32 keys[MAX_WAVES(BLOCK)][MAX_EXPERTS];
    u32 wave = THREAD / WAVE, base = BLOCK_Y * TOGETHER, first = BLOCK_X * EACH;
    Vec<float, VECTOR> own[EACH][PIECES];
    UNROLL for (u32 p = 0; p < PIECES; ++p) {
        u32 k = (p * BLOCK + THREAD) * VECTOR;
        Vec<float, VECTOR> scale = k < inner ? load<VECTOR>(norm + k) : Vec<float, VECTOR>{};
        UNROLL for (u32 e = 0; e < EACH; ++e) {
            own[e][p] = k < inner ? load<VECTOR>(weight + (u64)smaller(first + e, experts - 1) * inner + k) : Vec<float, VECTOR>{};
            UNROLL for (u32 i = 0; i < VECTOR; ++i) own[e][p].v[i] *= scale.v[i];
        }
    }
    grid_dependency_sync();
    float sum[EACH][TOGETHER], squares[TOGETHER];
    UNROLL for (u32 r = 0; r < TOGETHER; ++r) {
        squares[r] = 0;
        UNROLL for (u32 e = 0; e < EACH; ++e) sum[e][r] = 0;
        UNROLL for (u32 p = 0; p < PIECES; ++p) {
            u32 k = (p * BLOCK + THREAD) * VECTOR;
            Vec<float, VECTOR> row = k < inner ? load<VECTOR>(x + (u64)smaller(base + r, rows - 1) * inner + k) : Vec<float, VECTOR>{};
            UNROLL for (u32 i = 0; i < VECTOR; ++i) {
                squares[r] += row.v[i] * row.v[i];
                UNROLL for (u32 e = 0; e < EACH; ++e) sum[e][r] += row.v[i] * own[e][p].v[i];
            }
        }
    }
    float all = sum_of_eight(squares);
    if (LANE < TOGETHER) parts[wave][EACH][eight_place()] = all;
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        all = sum_of_eight(sum[e]);
        if (LANE < TOGETHER) parts[wave][e][eight_place()] = all;
    }
    lds_barrier();
    u32 r = THREAD % TOGETHER, e = THREAD / TOGETHER;
    if (e < EACH && first + e < experts && base + r < rows) {
        float total = 0, square = 0;
        for (u32 w = 0; w < BLOCK / WAVE; ++w) total += parts[w][e][r], square += parts[w][EACH][r];
        logits[(u64)(base + r) * experts + first + e] =
            total * rms_scale(fast_divide(square, (float)inner), eps) + (bias ? bias[first + e] : 0.0f);
    }
    if (!is_last(&arrived[BLOCK_Y], blocks)) return;

    u32 each = (experts + WAVE - 1) / WAVE;
    for (u32 row = base + wave; row < base + TOGETHER && row < rows; row += BLOCK / WAVE) {
        const float *z = logits + (u64)row * experts;
        Scores scores{is_sigmoid != 0, 0.0f, 1.0f};
        if (!is_sigmoid && (selection_bias || !renormalizes)) scores = softmax_scores(z, experts);
        for (u32 n = LANE; n < each * WAVE; n += WAVE) {
            float rank = n >= experts ? 0.0f : selection_bias ? score_of(scores, z[n]) + selection_bias[n] : z[n];
            keys[wave][n] = n < experts ? larger(ordered_key(rank), 1u) : 0; // 0: chosen; a NaN could have it
        }
        wave_sync();
        u32 expert = choose(&keys[wave][LANE * each], each, experts, used);
        u64 place = (u64)row * used;
        store_choice(chosen + place, weights + place, LANE < used, expert, z[expert], scores, renormalizes, factor, expert_scale);
        wave_sync();
    }
    if (!pairs) return;
    u32 groups = (rows + TOGETHER - 1) / TOGETHER;
    barrier(); // the choice is there
    if (groups > 1 && !is_last(&arrived[groups], groups)) return;
    list_tiles(Tiles{pairs, tiles, tile_rows, num_tiles}, chosen, rows * used, used, experts);
}
