// Sampling: the last token that the limits keep, by a sort of the listed tokens, or by a radix select where they have too little room.

struct Found {
    u64 order, rest;
    u32 index;
};

struct Draw {
    Bins bins;
    u64 listed[LISTED];
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
