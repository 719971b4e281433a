// The next token of each row, exactly as ops/sampling.py defines it: integer sums, so that no order of addition matters,
// and float32 steps rounded one by one. A block per row; nothing is sorted: thresholds are found digit by digit.

#define THREADS 1024
#define BINS 2048 // of a digit of a key: 11, 11 and 10 bits

struct Shared {
    u64 bins[BINS];
    u64 sums[MOST_WAVES(THREADS)];
    u32 keys[MOST_WAVES(THREADS)];
    u32 ids[MOST_WAVES(THREADS)];
    u64 found_rest;
    u32 found_key;
};

// floor(2**42 * exp((z - greatest) / T)): `weights` of ops/sampling.py, step by step.
DEVICE u64 weight_of(float z, float greatest, float scale) {
    float d = larger(mul_rn(add_rn(z, -greatest), scale), -32.0f);
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

// Which tokens can be drawn: those with a key above `key`, and of those that have it the first `ties` by id.
struct Limit {
    u32 key;
    u64 ties;
};

// The limit at which the values of tokens from the greatest key on reach `need`: each counts 1, or its weight.
// `within` is a limit that holds already; its ties are counted together.
template <bool WEIGHTS>
DEVICE Limit select(const float *z, u32 vocabulary, float greatest, float scale, Limit within, u64 need, Shared &s) {
    u32 prefix = 0;
    u64 tie_weight = WEIGHTS ? weight_of(logit_of(within.key), greatest, scale) : 1;
    for (u32 digit = 0; digit < 3; ++digit) {
        u32 shift = digit == 0 ? 21 : digit == 1 ? 10 : 0, mask = digit == 2 ? 1023 : 2047;
        u32 fixed = digit == 0 ? 0u : digit == 1 ? ~0u << 21 : ~0u << 10; // bits that are known by now
        for (u32 i = THREAD; i < BINS; i += THREADS) s.bins[i] = 0;
        barrier();
        for (u32 i = THREAD; i < vocabulary; i += THREADS) {
            u32 key = key_of(z[i]);
            if ((key & fixed) != prefix || key <= within.key) continue;
            u64 value = WEIGHTS ? weight_of(z[i], greatest, scale) : 1;
            if (value) atomic_add(&s.bins[key >> shift & mask], value);
        }
        if (THREAD == 0 && within.ties && (within.key & fixed) == prefix)
            atomic_add(&s.bins[within.key >> shift & mask], within.ties * tie_weight);
        barrier();
        if (THREAD < WAVE) { // the first wave looks for the bin, from the top; each lane has a run of bins
            u32 run = BINS / WAVE, top = BINS - LANE * run;
            u64 own = 0;
            for (u32 i = 1; i <= run; ++i) own += s.bins[top - i];
            u64 before = own;
            for (u32 i = 1; i < WAVE; i *= 2) {
                u64 other = shfl(before, LANE >= i ? LANE - i : 0);
                before += LANE >= i ? other : 0;
            }
            before -= own;
            if (before < need && need <= before + own) {
                u32 bin = top;
                do before += s.bins[--bin];
                while (before < need);
                s.found_key = prefix | bin << shift;
                s.found_rest = need - (before - s.bins[bin]);
            }
        }
        barrier();
        prefix = s.found_key;
        need = s.found_rest;
        barrier();
    }
    if (WEIGHTS) { // as many ties as reach what is still needed
        u64 each = weight_of(logit_of(prefix), greatest, scale);
        need = (need + each - 1) / each;
    }
    return Limit{prefix, need};
}

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
    u64 fraction = (u64)(p * 4294967296.0f);
    fraction = fraction < 1 ? 1 : fraction > 4294967296ull ? 4294967296ull : fraction;
    return fraction * (total >> 32) + (fraction * (total & 0xffffffffu) + 0xffffffffu >> 32);
}

KERNEL(THREADS) sample(const float *logits, const float *temperature, const i32 *top_k, const float *top_p, const float *min_p, const u64 *seed, const u32 *choice, const u32 *position, i32 *ids, u32 vocabulary) {
    SHARED Shared s;
    u32 row = BLOCK_X;
    const float *z = logits + (u64)row * vocabulary;

    // The greatest logit and its first id. A NaN counts as greater than all.
    u32 best = 0, best_id = 0xffffffffu;
    for (u32 i = THREAD; i < vocabulary; i += THREADS) {
        u32 key = z[i] == z[i] ? key_of(z[i]) : 0xffffffffu;
        if (key > best) best = key, best_id = i;
    }
    for (u32 i = WAVE / 2; i > 0; i /= 2) {
        u32 key = shfl_xor(best, i), id = shfl_xor(best_id, i);
        if (key > best || (key == best && id < best_id)) best = key, best_id = id;
    }
    if (LANE == 0) s.keys[THREAD / WAVE] = best, s.ids[THREAD / WAVE] = best_id;
    barrier();
    for (u32 w = 0; w < THREADS / WAVE; ++w)
        if (s.keys[w] > best || (s.keys[w] == best && s.ids[w] < best_id)) best = s.keys[w], best_id = s.ids[w];
    barrier();
    float greatest = logit_of(best), t = temperature[row];
    bool drawn = as_u32(t) - 1 < 0x7f800000u; // t > 0, also where it is subnormal
    bool finite = best > 0x007fffffu && best < 0xff800000u; // between the keys of the infinities
    if (!finite || !drawn) { // the same for the whole block
        if (THREAD == 0) ids[row] = finite ? (i32)best_id : -1;
        return;
    }
    float scale = div_rn(1.0f, larger(t, 1.3234889800848443e-23f)); // 2**-76

    Limit limit{0, 0}; // everything
    u32 k = (u32)top_k[row];
    if (k > 0 && k < vocabulary) limit = select<false>(z, vocabulary, greatest, scale, limit, k, s);
    if (top_p[row] < 1.0f) {
        u64 sum = 0;
        for (u32 i = THREAD; i < vocabulary; i += THREADS)
            if (key_of(z[i]) > limit.key) sum += weight_of(z[i], greatest, scale);
        sum = block_sum(sum, s.sums);
        if (limit.ties) sum += limit.ties * weight_of(logit_of(limit.key), greatest, scale);
        limit = select<true>(z, vocabulary, greatest, scale, limit, share(top_p[row], sum), s);
    }
    float least = smaller(min_p[row], 1.0f) * 4398046511104.0f; // 2**42
    u64 floor_weight = (u64)least;
    if ((float)floor_weight < least) floor_weight += 1;

    // Each wave has a run of ids: its sum without ties, and its ties.
    u32 waves = THREADS / WAVE, wave = THREAD / WAVE;
    u32 run = (vocabulary + waves - 1) / waves, first = wave * run;
    u32 stop = first + run < vocabulary ? first + run : vocabulary;
    u64 sum = 0;
    u32 ties = 0;
    for (u32 i = first + LANE; i < stop; i += WAVE) {
        u32 key = key_of(z[i]);
        if (key > limit.key) {
            u64 weight = weight_of(z[i], greatest, scale);
            sum += weight >= floor_weight ? weight : 0;
        }
        ties += key == limit.key;
    }
    sum = wave_sum(sum);
    ties = wave_sum(ties);
    if (LANE == 0) s.sums[wave] = sum, s.ids[wave] = ties;
    barrier();
    u64 tie_weight = limit.ties ? weight_of(logit_of(limit.key), greatest, scale) : 0;
    if (tie_weight < floor_weight) tie_weight = 0;
    u64 total = 0, before = 0, left = limit.ties, left_here = 0;
    for (u32 w = 0; w < waves; ++w) {
        if (w == wave) before = total, left_here = left;
        u64 taken = s.ids[w] < left ? s.ids[w] : left;
        total += s.sums[w] + taken * tie_weight;
        left -= taken;
    }
    u64 taken = ties < left_here ? ties : left_here;
    u64 target = mul_high(random_bits(seed[row], choice[row], position[row]), total);
    if (target < before || target >= before + sum + taken * tie_weight) return; // another wave has the token

    for (u32 start = first; start < stop; start += WAVE) {
        u32 i = start + LANE;
        u32 key = i < stop ? key_of(z[i]) : 0;
        bool tie = i < stop && key == limit.key;
        u64 tied = wave_ballot(tie);
        u64 lower = tied & ((1ull << LANE) - 1);
        u32 order = bit_count(lower);
        u64 weight = 0;
        if (i < stop && key > limit.key) {
            weight = weight_of(z[i], greatest, scale);
            if (weight < floor_weight) weight = 0;
        } else if (tie && order < left_here) {
            weight = tie_weight;
        }
        u64 reached = weight;
        for (u32 j = 1; j < WAVE; j *= 2) {
            u64 other = shfl(reached, LANE >= j ? LANE - j : 0);
            reached += LANE >= j ? other : 0;
        }
        u64 sum_here = shfl(reached, WAVE - 1);
        if (target < before + sum_here) {
            if (weight && target >= before + reached - weight && target < before + reached) ids[row] = (i32)i;
            return;
        }
        before += sum_here;
        u32 count = bit_count(tied);
        left_here -= count < left_here ? count : left_here;
    }
}
