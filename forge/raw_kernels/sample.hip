// The next token of each row, as ops/sampling.py defines it.
// Uses: sample_math, sample_bins, sample_state, sample_limits, sample_cut
//
// A row is divided into chunks of ids. Four launches draw its token, the first three with a block for each chunk:
//
// - sample_greatest: the greatest and the least logit of each chunk.
// - sample_bins: tokens fall into bins by (greatest logit - logit) / T, as wide as the row needs. Each bin gets its number of tokens
//   and their weight. Rows that draw nothing end here.
// - sample_list: finds the bins that are kept whole and those that hold the limits of top_k and top_p, and lists the tokens of the
//   latter. Each chunk gets the weight that is kept of it without the listed tokens, and how many tokens it has in the last of the bins.
// - sample_draw: a block per row sorts the listed tokens, or counts equal ones, which gives the limits, and draws a chunk, then an id.
//
// The greatest logit alone takes two launches, sample_greatest and argmax.
//
// A token of weight 0 is never drawn and counts nowhere, not even for top_k.

#undef MIN_BLOCKS
#define MIN_BLOCKS 3 // ops/sampling.py launches so many blocks for each multiprocessor

// `order_of` the first token of the row.
DEVICE u64 first_token(const Row &row, u32 chunks, u64 (&scratch)[MAX_WAVES(THREADS)]) {
    u64 best = 0;
    for (u32 i = THREAD; i < chunks; i += THREADS) best = row.greatest[i] > best ? row.greatest[i] : best;
    return block_most(best, scratch);
}

// The greatest and the least logit of each chunk. A block per chunk (x) and row (y).
KERNEL(THREADS) sample_greatest(
    const float *logits,      // (R, V)
    const float *temperature, // (R,) or null: argmax of all rows
    u64 *state,               // (R,) Row
    u32 vocabulary,           // V
    u32 size,                 // tokens of a chunk
    u32 chunks                // of a row
) {
    grid_dependency_sync();
    SHARED u64 scratch[MAX_WAVES(THREADS)];
    Row &row = ((Row *)state)[BLOCK_Y];
    Chunk chunk = chunk_at(BLOCK_X, size, vocabulary);
    bool draws = temperature && is_positive(temperature[BLOCK_Y]);
    u32 most = 0, most_id = 0, least = 0;
    auto take = [&](u32 id, float z) {
        u32 key = key_or_nan(z);
        if (key > most) most = key, most_id = id;   // a thread's ids come in their order
        least = is_finite(key) && ~key > least ? ~key : least;
    };
    const float *z = logits + (u64)BLOCK_Y * vocabulary;
    if (size > 4 * THREADS && size % 4 == 0 && vocabulary % 4 == 0) // rows and chunks begin with whole vectors
        for_each_vector<6>(z, chunk.first, chunk.stop, THREAD, THREADS, take);
    else if (size > 4 * THREADS)
        for_each<12>(z, chunk.first, chunk.stop, THREAD, THREADS, take);
    else
        for_each(z, chunk.first, chunk.stop, THREAD, THREADS, take);
    u64 best = block_most(order_of(most, most_id), scratch);
    if (THREAD == 0) row.greatest[BLOCK_X] = best;
    if (!draws) return;
    least = (u32)block_most(least, scratch);
    if (THREAD == 0) row.least[BLOCK_X] = least;
    for (u32 i = BLOCK_X * THREADS + THREAD; i < BINS; i += chunks * THREADS) row.counts[i] = 0, row.sums[i] = 0;
    if (BLOCK_X == 0 && THREAD == 0) row.num_listed = row.num_at_edge = 0;
}

// A block per row.
KERNEL(THREADS) argmax(
    const u64 *state, // (R,) Row
    i32 *ids,         // (R,) -1 where no logit is finite
    u32 chunks        // of a row
) {
    grid_dependency_sync();
    SHARED u64 scratch[MAX_WAVES(THREADS)];
    u64 best = first_token(((const Row *)state)[BLOCK_X], chunks, scratch);
    if (THREAD == 0) ids[BLOCK_X] = is_finite(key_in(best)) ? (i32)id_in(best) : -1;
}

// Counts and weights of the bins. A block per chunk (x) and row (y). Rows that draw nothing get their id.
KERNEL(THREADS) sample_bins(
    const float *logits,      // (R, V)
    const float *temperature, // (R,) 0: the greatest logit
    const i32 *top_k,         // (R,)
    const float *top_p,       // (R,)
    u64 *state,               // (R,) Row
    i32 *ids,                 // (R,) -1 where no logit is finite
    u32 vocabulary,           // V
    u32 size,                 // tokens of a chunk
    u32 chunks                // of a row
) {
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

// Lists the tokens near the limits of top_k and top_p. A block per chunk (x) and row (y).
KERNEL(THREADS) sample_list(
    const float *logits,      // (R, V)
    const float *temperature, // (R,)
    const i32 *top_k,         // (R,)
    const float *top_p,       // (R,)
    const float *min_p,       // (R,)
    u64 *state,               // (R,) Row
    u32 vocabulary,           // V
    u32 size                  // tokens of a chunk
) {
    grid_dependency_sync();
    SHARED u64 listed[LISTED], at_edge[LISTED];
    SHARED u64 scratch[MAX_WAVES(THREADS)];
    SHARED Limits limits;
    SHARED u32 num_listed, num_at_edge, place, edge_place;
    Row &row = ((Row *)state)[BLOCK_Y];
    if (row.top == 0) return; // the same for the whole block
    u32 k = (u32)top_k[BLOCK_Y];
    float p = top_p[BLOCK_Y];
    bool by_count = counts_tokens((i32)k, vocabulary), by_weight = p < 1.0f;
    find_limits(row, by_count, k, by_weight, p, limits, scratch);
    if (THREAD == 0) num_listed = num_at_edge = 0;
    barrier();
    u32 first = limits.first, last = limits.last, edge = limits.k_bin != NONE ? limits.k_bin : last;

    Scale scale = scale_of(row.top, temperature[BLOCK_Y]);
    float unit = by_count || by_weight ? row.unit : 0.0f; // without limits there are no bins
    u64 floor = floor_weight(min_p[BLOCK_Y]), kept = 0;
    u32 most = 0, least = 0;
    Chunk chunk = chunk_at(BLOCK_X, size, vocabulary);
    for_each(logits + (u64)BLOCK_Y * vocabulary, chunk.first, chunk.stop, THREAD, THREADS, [&](u32 id, float z) {
        float d = scaled(z, scale);
        u32 bin = bin_of(d, unit), key = ordered_key(z);
        u64 weight = bin <= last || bin == edge ? weight_at(d) : 0;
        if (bin < first) kept += weight >= floor ? weight : 0;
        bool is_near = bin >= first && weight, is_at_edge = is_near && bin == edge;
        if (is_at_edge) {
            most = key > most ? key : most;
            least = ~key > least ? ~key : least;
        }
        append(listed, LISTED, num_listed, is_near && !is_at_edge, order_of(key, id));
        append(at_edge, LISTED, num_at_edge, is_at_edge, order_of(key, id));
    });
    kept = block_sum(kept, scratch);
    most = (u32)block_most(most, scratch);
    least = (u32)block_most(least, scratch);
    if (THREAD == 0) {
        row.kept[BLOCK_X] = kept;
        row.edge_counts[BLOCK_X] = num_at_edge;
        row.edge_most[BLOCK_X] = most;
        row.edge_least[BLOCK_X] = least;
        place = num_listed ? atomic_add(&row.num_listed, num_listed) : 0;
        edge_place = num_at_edge ? atomic_add(&row.num_at_edge, num_at_edge) : 0;
        if (BLOCK_X == 0) {
            row.before_first = limits.before_first;
            row.before_k = limits.before_k;
            row.first = first;
            row.last = last;
            row.k_bin = limits.k_bin;
            row.k_left = limits.k_left;
        }
    }
    barrier();
    if (place + num_listed <= LISTED)
        for (u32 i = THREAD; i < num_listed; i += THREADS) row.listed[place + i] = listed[i];
    if (edge_place + num_at_edge <= LISTED)
        for (u32 i = THREAD; i < num_at_edge; i += THREADS) row.at_edge[edge_place + i] = at_edge[i];
}

#undef MIN_BLOCKS
#define MIN_BLOCKS 1

// Draws the ids. A block per row.
KERNEL(DRAW_THREADS) sample_draw(
    const float *logits,      // (R, V)
    const float *temperature, // (R,)
    const i32 *top_k,         // (R,)
    const float *top_p,       // (R,)
    const float *min_p,       // (R,)
    const u64 *seed,          // (R,) the key of Philox
    const u32 *choice,        // (R,) its counter, with the position
    const u32 *position,      // (R,)
    u64 *state,               // (R,) Row
    i32 *ids,                 // (R,)
    u32 vocabulary,           // V
    u32 size,                 // tokens of a chunk
    u32 chunks                // of a row
) {
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
        return order_of(ordered_key(x), id) >= cut && weight >= floor ? weight : 0;
    };
    Chunk part{0, vocabulary}; // where the id is
    u64 target, all;
    Equals equals{0, 0, 0};
    if (row.num_at_edge > LISTED) {
        u32 most = (u32)block_most(THREAD < chunks ? row.edge_most[THREAD] : 0, s.scratch);
        u32 least = (u32)block_most(THREAD < chunks ? row.edge_least[THREAD] : 0, s.scratch);
        if (most == ~least) equals = Equals{most, row.num_at_edge, weight_at(scaled(logit_of(most), scale))};
    }
    if (row.num_listed <= LISTED && (row.num_at_edge <= LISTED || equals.count)) {
        for (u32 i = THREAD; i < chunks; i += DRAW_THREADS) {
            s.low[i] = (u32)row.kept[i];
            s.high[i] = (u32)(row.kept[i] >> 32);
        }
        barrier();
        if (row.first != NONE) {
            u32 n = row.num_listed + (equals.count ? 0 : row.num_at_edge);
            Cut last = last_kept(row, n, scale, p, equals, s);
            cut = last.order;
            if (last.equals) { // the same for the whole block
                u64 count = THREAD < chunks ? row.edge_counts[THREAD] : 0, before = block_before(count, s.scratch, all);
                u64 left = last.equals - 1;
                u32 chunk = pick(before, count, left, s.found);
                u64 here = THREAD < chunk ? count : THREAD == chunk ? left + 1 : 0;
                u64 weight = equals.weight >= floor ? here * equals.weight : 0;
                if (weight) add_wide(s.low[THREAD], s.high[THREAD], weight);
                auto is_equal = [&](u32, float x) { return (u64)(ordered_key(x) == equals.key); };
                cut = order_of(equals.key, id_at(z, chunk_at(chunk, size, vocabulary), left, is_equal, s));
            }
            for (u32 i = THREAD; i < n; i += DRAW_THREADS) {
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
                sum += order_of(ordered_key(x), id) >= cut ? weight_at(scaled(x, scale)) : 0;
            });
            cut = select<true>(z, vocabulary, scale, share(p, block_sum(sum, s.scratch)), s);
            sum = 0;
        }
        for_each(z, 0, vocabulary, THREAD, DRAW_THREADS, [&](u32 id, float x) { sum += kept(id, x); });
        target = mul_high(bits, block_sum(sum, s.scratch));
    }

    u32 id = id_at(z, part, target, kept, s);
    if (THREAD == 0) ids[BLOCK_X] = (i32)id;
}
