// Sampling: the last token that the limits keep. The listed tokens are sorted. Tokens of the edge bin that are too many to be listed are
// counted where all are equal, else there is a radix select.

struct Found {
    u64 order, rest;
    u32 index;
};

struct Draw {
    Bins bins;
    u64 listed[2 * LISTED];
    u64 scratch[MAX_WAVES(DRAW_THREADS)];
    u32 low[MAX_CHUNKS], high[MAX_CHUNKS];
    Found found;
};

// The thread whose part of the sum over all threads holds `target`, which is then counted from the part's begin.
DEVICE u32 pick(u64 before, u64 value, u64 &target, Found &found) {
    if (before <= target && target < before + value) found.index = THREAD, found.rest = target - before;
    barrier();
    u32 index = found.index;
    target = found.rest;
    barrier();
    return index;
}

// The id at which a running sum over the tokens of a chunk exceeds `target`, each with weight_of(id, logit).
template <typename F> DEVICE u32 id_at(const float *z, Chunk part, u64 target, F weight_of, Draw &s) {
    const u32 waves = DRAW_THREADS / WAVE;
    u64 all;
    while (part.stop - part.first > DRAW_THREADS) { // the wave that has the id in its run
        u32 run = (part.stop - part.first + waves - 1) / waves, first = part.first + THREAD / WAVE * run;
        u32 stop = first + run < part.stop ? first + run : part.stop;
        u64 sum = 0;
        for_each(z, first, stop, LANE, WAVE, [&](u32 id, float x) { sum += weight_of(id, x); });
        sum = wave_sum(sum);
        sum = LANE == 0 ? sum : 0;
        u64 before = block_before(sum, s.scratch, all);
        part.first += pick(before, sum, target, s.found) / WAVE * run;
        part.stop = part.first + run < part.stop ? part.first + run : part.stop;
    }
    u32 id = part.first + THREAD;
    u64 weight = id < part.stop ? weight_of(id, z[id]) : 0;
    u64 before = block_before(weight, s.scratch, all);
    return part.first + pick(before, weight, target, s.found);
}

// The tokens of the edge bin, where all are equal and they are not listed. A count of 0: they are listed.
struct Equals {
    u32 key, count;
    u64 weight;
};

// The last token that the limits keep: a listed one, or of the equal ones the number `equals`, counted from 1.
struct Cut {
    u64 order, equals;
};

// There are n tokens to sort: those listed, and those of the edge bin unless they are equals.
DEVICE Cut last_kept(const Row &row, u32 n, Scale scale, float p, Equals equals, Draw &s) {
    u32 length = 1;
    while (length < n) length *= 2;
    for (u32 i = THREAD; i < length; i += DRAW_THREADS) {
        u32 edge = i - row.num_listed; // its number in the list of the edge bin
        s.listed[i] = i < row.num_listed ? row.listed[i] : i < n ? row.at_edge[edge] : 0;
    }
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
    const u32 run = 2 * LISTED / DRAW_THREADS;
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
    u64 in_k_bin = equals.count && row.k_bin != NONE ? row.k_left * equals.weight : block_sum(sum, s.scratch);
    u64 need = share(p, row.before_k + in_k_bin) - row.before_first;
    sum = 0;
    UNROLL for (u32 j = 0; j < run; ++j) sum += weights[j];
    u64 before = block_before(sum, s.scratch, all);
    if (equals.count && need > all) return Cut{0, (need - all + equals.weight - 1) / equals.weight};
    UNROLL for (u32 j = 0; j < run; ++j) {
        if (before < need && need <= before + weights[j]) s.found.order = s.listed[THREAD * run + j];
        before += weights[j];
    }
    barrier();
    return Cut{s.found.order, 0};
}

// `order_of` the token at which a running sum over the ordered tokens reaches `need`; each counts 1, or its weight. A radix select: one
// pass over the row for each digit. For rows whose list has too little room.
template <bool WEIGHTS> DEVICE u64 select(const float *z, u32 vocabulary, Scale scale, u64 need, Draw &s) {
    const u32 run = BINS / DRAW_THREADS;
    u64 prefix = 0, all;
    ROLLED for (u32 digit = 5; digit-- > 0;) {
        u32 shift = 11 * digit;
        clear<DRAW_THREADS>(s.bins);
        for_each(z, 0, vocabulary, THREAD, DRAW_THREADS, [&](u32 id, float x) {
            u64 order = order_of(ordered_key(x), id);
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
