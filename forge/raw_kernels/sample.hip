// The next token of each row, exactly as ops/sampling.py defines it: integer sums, so that no order of addition matters,
// and float32 steps rounded one by one. A row is divided into chunks of ids, one for each block of the first launches:
//
// - sample_greatest: the greatest and the least logit of each chunk.
// - sample_bins: tokens fall into bins by (greatest logit - logit) / T, as wide as the row needs; how many, and of what
//   weight, a bin holds. Rows that draw nothing end here.
// - sample_list: which bins are kept whole, and which hold the limits of top_k and top_p: their tokens, some out of many,
//   are listed. The weight that is kept of each chunk, without them.
// - sample_draw: a block per row sorts the listed tokens, so that the limits are known, and draws a chunk, then an id.
//
// The greatest logit alone takes the first and argmax, a block per row.
//
// Tokens that weigh nothing are never drawn and add nothing to a sum: they count nowhere, not even for top_k.

#define THREADS 512
#define DRAW_THREADS 1024
#define BINS 2048
#define LISTED 2048
#define MAX_CHUNKS 512
#define NONE 0xffffffffu
#undef MIN_BLOCKS
#define MIN_BLOCKS 3 // so many blocks of a core does ops/sampling.py reckon with

// What the launches of a row hand on, in memory that holds anything before the first.
struct Row {
    u64 sums[BINS];            // weights in a bin, if there is a top_p
    u64 listed[LISTED];        // `order_of` each listed token, in any order
    u64 greatest[MAX_CHUNKS]; // `order_of` the first token of each chunk
    u64 kept[MAX_CHUNKS];     // weight that is kept of each chunk without the listed tokens
    u32 counts[BINS];          // tokens in a bin, if there is a top_k
    u32 least[MAX_CHUNKS];    // the complement of `key_of` the least finite logit of each chunk; 0 if there is none
    u64 before_first;          // weight in the bins before `first`
    u64 before_k;              // weight in the bins before `k_bin`; of all if there is none
    u32 first, last;           // the end of top_p is in these bins or between; NONE: all is kept
    u32 k_bin, k_left;         // the end of top_k is in this bin, behind so many tokens of it; NONE: there is none
    u32 num_listed;            // how many there should be: more than LISTED if not all found room
    u32 top;                   // `key_of` the greatest logit; 0: the row is done
    float unit;                // bins for each unit of (greatest logit - logit) / T
};
static_assert(sizeof(Row) == 8 * 6406, "ops/sampling.py allocates it");

// Tokens in order: by (logit descending, id ascending) these descend. V <= 2**20.
DEVICE u64 order_of(u32 key, u32 id) { return (u64)key << 20 | (~id & 0xfffffu); }
DEVICE u32 key_in(u64 order) { return (u32)(order >> 20); }
DEVICE u32 id_in(u64 order) { return ~(u32)order & 0xfffffu; }

// `weights` of ops/sampling.py, step by step: floor(2**42 * exp(d)) with d = max((z - greatest) / T, -32).
struct Scale {
    float greatest, scale;
};
DEVICE Scale scale_of(u32 top, float temperature) {
    return Scale{logit_of(top), div_rn(1.0f, larger(temperature, 1.3234889800848443e-23f))}; // 2**-76
}
DEVICE float scaled(float z, Scale s) { return larger(mul_rn(add_rn(z, -s.greatest), s.scale), -32.0f); }
DEVICE u64 weight_at(float d) {
    float n = add_rn(add_rn(mul_rn(d, 1.4426950408889634f), 12582912.0f), -12582912.0f); // to the nearest integer
    d = add_rn(d, -mul_rn(n, 0.693359375f));
    d = add_rn(d, -mul_rn(n, -2.12194440e-4f));
    float e = mul_rn(d, 0.001381454f);
    e = mul_rn(add_rn(e, 0.008368745f), d);
    e = mul_rn(add_rn(e, 0.04166839f), d);
    e = mul_rn(add_rn(e, 0.16666521f), d);
    e = mul_rn(add_rn(e, 0.49999994f), d);
    e = add_rn(add_rn(mul_rn(e, d), d), 1.0f);
    return (u64)mul_rn(e, as_float((u32)((i32)n + 127 + 42) << 23));
}
DEVICE u32 bin_of(float d, float unit) { return (u32)mul_rn(d, -unit); } // each step rounds monotonically: in order

// Philox4x32-10 of ops/philox.py: the first two words.
DEVICE u64 random_bits(u64 seed, u32 choice, u32 position) {
    u32 a = position, b = choice, c = 0, d = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
    for (u32 round = 0; round < 10; ++round) {
        u32 high0 = mul_high(0xD2511F53u, a), low0 = 0xD2511F53u * a;
        u32 high1 = mul_high(0xCD9E8D57u, c), low1 = 0xCD9E8D57u * c;
        a = high1 ^ b ^ k0, b = low1, c = high0 ^ d ^ k1, d = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return a | (u64)b << 32;
}

// ceil(p * total), p cut to 32 fractional bits.
DEVICE u64 share(float p, u64 total) {
    u64 fraction = (u64)(smaller(p, 1.0f) * 4294967296.0f);
    fraction = fraction < 1 ? 1 : fraction;
    return fraction * (total >> 32) + (fraction * (total & 0xffffffffu) + 0xffffffffu >> 32);
}

// The least weight that min_p keeps.
DEVICE u64 floor_weight(float min_p) {
    float least = smaller(min_p, 1.0f) * 4398046511104.0f; // 2**42
    u64 weight = (u64)least;
    return (float)weight < least ? weight + 1 : weight;
}

// f(id, logit) for ids from `first` on: every `step`th from `own`. Threads of the same `first` and `stop` make the same
// number of calls: at ids from `stop` on with -inf, which weighs nothing. Loads are ahead of calls.
template <u32 PREFETCH = 4, typename F> DEVICE void for_each(const float *z, u32 first, u32 stop, u32 own, u32 step, F f) {
    ROLLED for (u32 start = first; start < stop; start += PREFETCH * step) {
        float tile[PREFETCH];
        UNROLL for (u32 j = 0; j < PREFETCH; ++j) {
            u32 id = start + j * step + own;
            tile[j] = id < stop ? z[id] : NEG_INFINITY;
        }
        UNROLL for (u32 j = 0; j < PREFETCH; ++j) f(start + j * step + own, tile[j]);
    }
}

// Of whole blocks; a block has no more waves than a wave has lanes.
DEVICE u64 wave_most(u64 x) {
    for (u32 i = WAVE / 2; i > 0; i /= 2) {
        u64 other = shfl_xor(x, i);
        x = other > x ? other : x;
    }
    return x;
}
template <u32 N> DEVICE u64 block_most(u64 x, u64 (&scratch)[N]) {
    x = wave_most(x);
    if (LANE == 0) scratch[THREAD / WAVE] = x;
    barrier();
    x = wave_most(LANE < N * 32 / WAVE ? scratch[LANE] : 0);
    barrier();
    return x;
}

// The sum over the threads before this one, and over all.
template <u32 N> DEVICE u64 block_before(u64 x, u64 (&scratch)[N], u64 &total) {
    u64 reached = x;
    for (u32 i = 1; i < WAVE; i *= 2) {
        u64 other = shfl(reached, LANE >= i ? LANE - i : 0);
        reached += LANE >= i ? other : 0;
    }
    if (LANE == WAVE - 1) scratch[THREAD / WAVE] = reached;
    barrier();
    u64 wave = LANE < N * 32 / WAVE ? scratch[LANE] : 0;
    total = wave_sum(wave);
    u64 before = wave_sum(LANE < THREAD / WAVE ? wave : 0) + reached - x;
    barrier();
    return before;
}

// A sum of 64 bits in two words of LDS: NVIDIA adds 64 bits there by trial and error.
DEVICE void add_wide(u32 &low, u32 &high, u64 x) {
    u32 old = atomic_add(&low, (u32)x);
    u32 rest = (u32)(x >> 32) + (old + (u32)x < old);
    if (rest) atomic_add(&high, rest);
}
DEVICE u64 wide(u32 low, u32 high) { return (u64)high << 32 | low; }

struct Bins {
    u32 counts[BINS], low[BINS], high[BINS];
};
template <u32 N> DEVICE void clear(Bins &bins) {
    for (u32 i = THREAD; i < BINS; i += N) bins.counts[i] = bins.low[i] = bins.high[i] = 0;
    barrier();
}

// Adds a token to a bin: 1 or its weight, or both. All lanes of a wave come here together; where all that add have the
// same bin, as with equal logits, one adds for all.
DEVICE void tally(Bins &bins, u32 bin, bool adds, bool by_count, bool by_weight, u64 weight) {
    u64 adding = wave_ballot(adds);
    if (adding == 0) return;
    u32 leader = bit_count((adding & (0 - adding)) - 1), its_bin = shfl(bin, leader), count = 1;
    bool alone = wave_ballot(adds && bin != its_bin) == 0;
    if (alone) {
        if (by_weight) weight = wave_sum(adds ? weight : 0);
        count = bit_count(adding);
    }
    if (!adds || (alone && LANE != leader)) return;
    if (by_count) atomic_add(&bins.counts[bin], count);
    if (by_weight) add_wide(bins.low[bin], bins.high[bin], weight);
}

struct Chunk {
    u32 first, stop;
};
DEVICE Chunk chunk_at(u32 chunk, u32 size, u32 vocabulary) {
    u32 first = chunk * size;
    return Chunk{first, first + size < vocabulary ? first + size : vocabulary};
}

DEVICE bool counts_tokens(i32 top_k, u32 vocabulary) { return (u32)top_k - 1 < vocabulary - 1; } // 0 < k < V
DEVICE bool is_finite(u32 key) { return key > 0x007fffffu && key < 0xff800000u; } // between the keys of the infinities
DEVICE bool is_positive(float t) { return as_u32(t) - 1 < 0x7f800000u; } // also where it is subnormal

// `order_of` the first token of the row.
DEVICE u64 first_token(const Row &row, u32 chunks, u64 (&scratch)[MAX_WAVES(THREADS)]) {
    u64 best = 0;
    for (u32 i = THREAD; i < chunks; i += THREADS) best = row.greatest[i] > best ? row.greatest[i] : best;
    return block_most(best, scratch);
}

KERNEL(THREADS) sample_greatest(const float *logits, const float *temperature, u64 *state, u32 vocabulary, u32 size, u32 chunks) {
    grid_dependency_sync();
    SHARED u64 scratch[MAX_WAVES(THREADS)];
    Row &row = ((Row *)state)[BLOCK_Y];
    Chunk chunk = chunk_at(BLOCK_X, size, vocabulary);
    bool draws = temperature && is_positive(temperature[BLOCK_Y]);
    u32 most = 0, most_id = 0, least = 0;
    auto take = [&](u32 id, float z) {
        u32 key = z == z ? key_of(z) : 0xffffffffu; // a NaN counts as greater than all
        if (key > most) most = key, most_id = id;   // a thread's ids come in their order
        least = is_finite(key) && ~key > least ? ~key : least;
    };
    const float *z = logits + (u64)BLOCK_Y * vocabulary;
    if (size > 4 * THREADS)
        for_each<12>(z, chunk.first, chunk.stop, THREAD, THREADS, take);
    else
        for_each(z, chunk.first, chunk.stop, THREAD, THREADS, take);
    u64 best = block_most(order_of(most, most_id), scratch);
    if (THREAD == 0) row.greatest[BLOCK_X] = best;
    if (!draws) return;
    least = (u32)block_most(least, scratch);
    if (THREAD == 0) row.least[BLOCK_X] = least;
    for (u32 i = BLOCK_X * THREADS + THREAD; i < BINS; i += chunks * THREADS) row.counts[i] = 0, row.sums[i] = 0;
    if (BLOCK_X == 0 && THREAD == 0) row.num_listed = 0;
}

KERNEL(THREADS) argmax(const u64 *state, i32 *ids, u32 chunks) {
    grid_dependency_sync();
    SHARED u64 scratch[MAX_WAVES(THREADS)];
    u64 best = first_token(((const Row *)state)[BLOCK_X], chunks, scratch);
    if (THREAD == 0) ids[BLOCK_X] = is_finite(key_in(best)) ? (i32)id_in(best) : -1;
}

KERNEL(THREADS) sample_bins(const float *logits, const float *temperature, const i32 *top_k, const float *top_p, u64 *state, i32 *ids, u32 vocabulary, u32 size, u32 chunks) {
    grid_dependency_sync();
    SHARED Bins bins;
    SHARED u64 scratch[MAX_WAVES(THREADS)];
    Row &row = ((Row *)state)[BLOCK_Y];
    bool by_count = counts_tokens(top_k[BLOCK_Y], vocabulary), by_weight = top_p[BLOCK_Y] < 1.0f;
    bool drawn = is_positive(temperature[BLOCK_Y]), limited = drawn && (by_count || by_weight);
    if (BLOCK_X > 0 && !limited) return;

    u64 best = first_token(row, chunks, scratch);
    u32 top = key_in(best);
    bool finite = is_finite(top);
    if (BLOCK_X == 0 && THREAD == 0) {
        row.top = finite && drawn ? top : 0;
        if (!finite || !drawn) ids[BLOCK_Y] = finite ? (i32)id_in(best) : -1;
    }
    if (!finite || !limited) return; // the same for the whole block

    // Tokens fill all bins: a weight is 0 from a distance of 30 on, but under a high temperature all are near.
    u32 least = 0;
    for (u32 i = THREAD; i < chunks; i += THREADS) least = row.least[i] > least ? row.least[i] : least;
    least = (u32)block_most(least, scratch);
    Scale scale = scale_of(top, temperature[BLOCK_Y]);
    float unit = div_rn(BINS - 1, larger(-scaled(logit_of(~least), scale), 1e-4f));
    if (BLOCK_X == 0 && THREAD == 0) row.unit = unit;
    Chunk chunk = chunk_at(BLOCK_X, size, vocabulary);
    clear<THREADS>(bins);
    for_each(logits + (u64)BLOCK_Y * vocabulary, chunk.first, chunk.stop, THREAD, THREADS, [&](u32, float z) {
        float d = scaled(z, scale);
        u64 weight = weight_at(d);
        tally(bins, bin_of(d, unit), weight > 0, by_count, by_weight, weight);
    });
    barrier();
    for (u32 i = THREAD; i < BINS; i += THREADS) {
        u64 sum = wide(bins.low[i], bins.high[i]);
        if (bins.counts[i]) atomic_add(&row.counts[i], bins.counts[i]);
        if (sum) atomic_add(&row.sums[i], sum);
    }
}

struct Limits {
    u64 before_first, before_k, through_k;
    u32 first, last, k_bin, k_left;
};

// Which bins hold the ends of top_k and top_p. That of top_p depends on how much weight top_k keeps of its bin: it lies
// between where it would be if that were nothing, and if it were all.
DEVICE void find_limits(const Row &row, bool by_count, u32 k, bool by_weight, float p, Limits &limits, u64 (&scratch)[MAX_WAVES(THREADS)]) {
    const u32 run = BINS / THREADS;
    u64 sums[run], count = 0, sum = 0, all, weight;
    u32 counts[run];
    UNROLL for (u32 j = 0; j < run; ++j) {
        counts[j] = row.counts[THREAD * run + j];
        sums[j] = row.sums[THREAD * run + j];
        count += counts[j];
        sum += sums[j];
    }
    count = block_before(count, scratch, all);
    sum = block_before(sum, scratch, weight);
    if (THREAD == 0) limits = Limits{weight, weight, weight, NONE, NONE, NONE, 0};
    barrier();
    if (by_count && k < all) {
        u64 reached = sum;
        UNROLL for (u32 j = 0; j < run; ++j) {
            if (count < k && k <= count + counts[j]) {
                limits.k_bin = limits.first = limits.last = THREAD * run + j;
                limits.k_left = k - (u32)count;
                limits.before_first = limits.before_k = reached;
                limits.through_k = reached + sums[j];
            }
            count += counts[j];
            reached += sums[j];
        }
    }
    barrier();
    if (!by_weight) return;
    u64 least = share(p, limits.before_k), most = share(p, limits.through_k);
    least = least < 1 ? 1 : least;
    barrier();
    UNROLL for (u32 j = 0; j < run; ++j) {
        if (sum < least && least <= sum + sums[j]) limits.first = THREAD * run + j, limits.before_first = sum;
        if (sum < most && most <= sum + sums[j]) limits.last = THREAD * run + j;
        sum += sums[j];
    }
    barrier();
}

KERNEL(THREADS) sample_list(const float *logits, const float *temperature, const i32 *top_k, const float *top_p, const float *min_p, u64 *state, u32 vocabulary, u32 size) {
    grid_dependency_sync();
    SHARED u64 listed[LISTED];
    SHARED u64 scratch[MAX_WAVES(THREADS)];
    SHARED Limits limits;
    SHARED u32 num_listed, place;
    Row &row = ((Row *)state)[BLOCK_Y];
    if (row.top == 0) return; // the same for the whole block
    u32 k = (u32)top_k[BLOCK_Y];
    float p = top_p[BLOCK_Y];
    bool by_count = counts_tokens((i32)k, vocabulary), by_weight = p < 1.0f;
    find_limits(row, by_count, k, by_weight, p, limits, scratch);
    if (THREAD == 0) num_listed = 0;
    barrier();
    u32 first = limits.first, last = limits.last, k_bin = limits.k_bin;

    Scale scale = scale_of(row.top, temperature[BLOCK_Y]);
    float unit = by_count || by_weight ? row.unit : 0.0f; // without limits there are no bins
    u64 floor = floor_weight(min_p[BLOCK_Y]), kept = 0;
    Chunk chunk = chunk_at(BLOCK_X, size, vocabulary);
    for_each(logits + (u64)BLOCK_Y * vocabulary, chunk.first, chunk.stop, THREAD, THREADS, [&](u32 id, float z) {
        float d = scaled(z, scale);
        u32 bin = bin_of(d, unit);
        if (bin >= first && bin > last && bin != k_bin) return;
        u64 weight = weight_at(d);
        if (bin < first) {
            kept += weight >= floor ? weight : 0;
        } else if (weight) {
            u32 i = atomic_add(&num_listed, 1u);
            if (i < LISTED) listed[i] = order_of(key_of(z), id);
        }
    });
    kept = block_sum(kept, scratch);
    if (THREAD == 0) {
        row.kept[BLOCK_X] = kept;
        place = num_listed ? atomic_add(&row.num_listed, num_listed) : 0;
        if (BLOCK_X == 0) {
            row.before_first = limits.before_first;
            row.before_k = limits.before_k;
            row.first = first;
            row.last = last;
            row.k_bin = k_bin;
            row.k_left = limits.k_left;
        }
    }
    barrier();
    if (place + num_listed > LISTED) return;
    for (u32 i = THREAD; i < num_listed; i += THREADS) row.listed[place + i] = listed[i];
}

struct Found {
    u64 order, rest;
    u32 index;
};

#undef MIN_BLOCKS
#define MIN_BLOCKS 1

struct Draw {
    Bins bins;
    u64 listed[LISTED];
    u64 scratch[MAX_WAVES(DRAW_THREADS)];
    u32 low[MAX_CHUNKS], high[MAX_CHUNKS];
    Found found;
};

// The thread in whose part of the sum over all threads `target` lies; `target` is then counted from its begin.
DEVICE u32 pick(u64 before, u64 value, u64 &target, Found &found) {
    if (before <= target && target < before + value) found.index = THREAD, found.rest = target - before;
    barrier();
    u32 index = found.index;
    target = found.rest;
    barrier();
    return index;
}

// `order_of` the last listed token that the limits keep.
DEVICE u64 last_listed(const Row &row, Scale scale, float p, Draw &s) {
    u32 n = row.num_listed, length = 1;
    while (length < n) length *= 2;
    for (u32 i = THREAD; i < length; i += DRAW_THREADS) s.listed[i] = i < n ? row.listed[i] : 0;
    barrier();
    ROLLED for (u32 part = 2; part <= length; part *= 2) // a bitonic sort, descending
        ROLLED for (u32 apart = part / 2; apart > 0; apart /= 2) {
            for (u32 i = THREAD; i < length / 2; i += DRAW_THREADS) {
                u32 one = 2 * i - (i & (apart - 1)), other = one + apart;
                u64 a = s.listed[one], b = s.listed[other];
                if ((a < b) == ((one & part) == 0)) s.listed[one] = b, s.listed[other] = a;
            }
            barrier();
        }
    const u32 run = LISTED / DRAW_THREADS;
    u64 weights[run], others = 0, sum = 0, all;
    UNROLL for (u32 j = 0; j < run; ++j) {
        u32 i = THREAD * run + j;
        float d = scaled(logit_of(i < n ? key_in(s.listed[i]) : 0x007fffffu), scale);
        weights[j] = weight_at(d);
        others += i < n && bin_of(d, row.unit) != row.k_bin;
    }
    u32 k_first = (u32)block_sum(others, s.scratch), k_stop = k_first + row.k_left; // the bin of top_k is the last
    UNROLL for (u32 j = 0; j < run; ++j) {
        u32 i = THREAD * run + j;
        if (i >= k_stop) weights[j] = 0;
        if (i >= k_first) sum += weights[j];
    }
    u64 need = share(p, row.before_k + block_sum(sum, s.scratch)) - row.before_first;
    sum = 0;
    UNROLL for (u32 j = 0; j < run; ++j) sum += weights[j];
    u64 before = block_before(sum, s.scratch, all);
    UNROLL for (u32 j = 0; j < run; ++j) {
        if (before < need && need <= before + weights[j]) s.found.order = s.listed[THREAD * run + j];
        before += weights[j];
    }
    barrier();
    return s.found.order;
}

// `order_of` the token with which those from the first on reach `need`: each counts 1, or its weight. Found digit by digit,
// by as many passes over the row: where the list has too little room.
template <bool WEIGHTS> DEVICE u64 select(const float *z, u32 vocabulary, Scale scale, u64 need, Draw &s) {
    const u32 run = BINS / DRAW_THREADS;
    u64 prefix = 0, all;
    ROLLED for (u32 digit = 5; digit-- > 0;) {
        u32 shift = 11 * digit;
        clear<DRAW_THREADS>(s.bins);
        for_each(z, 0, vocabulary, THREAD, DRAW_THREADS, [&](u32 id, float x) {
            u64 order = order_of(key_of(x), id);
            bool is_near = order >> shift >> 11 == prefix;
            if (wave_ballot(is_near) == 0) return;
            u64 weight = weight_at(scaled(x, scale));
            tally(s.bins, (u32)(order >> shift) % BINS, is_near && weight, !WEIGHTS, WEIGHTS, weight);
        });
        barrier();
        u64 values[run], sum = 0;
        UNROLL for (u32 j = 0; j < run; ++j) {
            u32 bin = BINS - 1 - (THREAD * run + j);
            values[j] = WEIGHTS ? wide(s.bins.low[bin], s.bins.high[bin]) : s.bins.counts[bin];
            sum += values[j];
        }
        u64 before = block_before(sum, s.scratch, all);
        UNROLL for (u32 j = 0; j < run; ++j) {
            if (before < need && need <= before + values[j]) {
                s.found.index = BINS - 1 - (THREAD * run + j);
                s.found.rest = need - before;
            }
            before += values[j];
        }
        barrier();
        prefix = prefix << 11 | s.found.index;
        need = s.found.rest;
        barrier();
    }
    return prefix;
}

KERNEL(DRAW_THREADS) sample_draw(const float *logits, const float *temperature, const i32 *top_k, const float *top_p, const float *min_p, const u64 *seed, const u32 *choice, const u32 *position, u64 *state, i32 *ids, u32 vocabulary, u32 size, u32 chunks) {
    grid_dependency_sync();
    SHARED Draw s;
    const Row &row = ((const Row *)state)[BLOCK_X];
    if (row.top == 0) return; // the same for the whole block
    const float *z = logits + (u64)BLOCK_X * vocabulary;
    Scale scale = scale_of(row.top, temperature[BLOCK_X]);
    float p = top_p[BLOCK_X];
    u64 floor = floor_weight(min_p[BLOCK_X]), bits = random_bits(seed[BLOCK_X], choice[BLOCK_X], position[BLOCK_X]);

    u64 cut = 0; // `order_of` the last token that the limits keep
    auto kept = [&](u32 id, float x) {
        u64 weight = weight_at(scaled(x, scale));
        return order_of(key_of(x), id) >= cut && weight >= floor ? weight : 0;
    };
    Chunk part{0, vocabulary}; // where the id is
    u64 target, all;
    if (row.num_listed <= LISTED) {
        for (u32 i = THREAD; i < chunks; i += DRAW_THREADS) {
            s.low[i] = (u32)row.kept[i];
            s.high[i] = (u32)(row.kept[i] >> 32);
        }
        barrier();
        if (row.first != NONE) {
            cut = last_listed(row, scale, p, s);
            for (u32 i = THREAD; i < row.num_listed; i += DRAW_THREADS) {
                u64 order = s.listed[i], weight = kept(id_in(order), logit_of(key_in(order)));
                u32 chunk = id_in(order) / size;
                if (weight) add_wide(s.low[chunk], s.high[chunk], weight);
            }
            barrier();
        }
        u64 sum = THREAD < chunks ? wide(s.low[THREAD], s.high[THREAD]) : 0;
        u64 before = block_before(sum, s.scratch, all);
        target = mul_high(bits, all);
        part = chunk_at(pick(before, sum, target, s.found), size, vocabulary);
    } else {
        if (row.k_bin != NONE) cut = select<false>(z, vocabulary, scale, (u32)top_k[BLOCK_X], s);
        u64 sum = 0;
        if (p < 1.0f) {
            for_each(z, 0, vocabulary, THREAD, DRAW_THREADS, [&](u32 id, float x) {
                sum += order_of(key_of(x), id) >= cut ? weight_at(scaled(x, scale)) : 0;
            });
            cut = select<true>(z, vocabulary, scale, share(p, block_sum(sum, s.scratch)), s);
            sum = 0;
        }
        for_each(z, 0, vocabulary, THREAD, DRAW_THREADS, [&](u32 id, float x) { sum += kept(id, x); });
        target = mul_high(bits, block_sum(sum, s.scratch));
    }

    const u32 waves = DRAW_THREADS / WAVE;
    while (part.stop - part.first > DRAW_THREADS) { // the wave that has the id in its run
        u32 run = (part.stop - part.first + waves - 1) / waves, first = part.first + THREAD / WAVE * run;
        u32 stop = first + run < part.stop ? first + run : part.stop;
        u64 sum = 0;
        for_each(z, first, stop, LANE, WAVE, [&](u32 id, float x) { sum += kept(id, x); });
        sum = wave_sum(sum);
        sum = LANE == 0 ? sum : 0;
        u64 before = block_before(sum, s.scratch, all);
        part.first += pick(before, sum, target, s.found) / WAVE * run;
        part.stop = part.first + run < part.stop ? part.first + run : part.stop;
    }
    u32 id = part.first + THREAD;
    u64 weight = id < part.stop ? kept(id, z[id]) : 0;
    u64 before = block_before(weight, s.scratch, all);
    if (before <= target && target < before + weight) ids[BLOCK_X] = (i32)id;
}
