// Attention of several queries per sequence over its pages of the KV cache, as attention_prefill.hip, by NVIDIA's wgmma.
// Uses: tile_lines, tile_phases, tile_wgmma_wide
// Target: sm_90a
//
// One group of waves of a block copies (two producers), GROUPS compute (consumers), 64 rows each (FlashAttention-3, arXiv:2407.08608).
// A row is a query of one of PACKED heads that share a KV head. A producer copies tiles of KEYS keys, the other queries and tiles of
// values, into rings of STAGES in LDS, from the last that a row sees to the first; each stage has a barrier that says that it is full
// and one that it is empty. What all rows see of a page goes as boxes by the bulk copy engine, else each row by itself. A consumer
// multiplies queries by the keys of a tile while it weights the values of the tile before, and turns scores into weights in registers
// meanwhile. Consumers take turns to start products, so that one multiplies while another computes weights.
// A block takes tiles of queries in turns of `stride`, forth and back, the longest of each sequence first.
// -D HEAD_DIM, PAGE=positions of a page, BOX=positions of a box, a divisor of PAGE and of KEYS, or 0: no boxes; PACKED, KEYS, STAGES,
// BLOCK threads, LDS_BYTES.

#define GROUP (32 * GROUP_WAVES)
#define COPIERS (GROUP / 2) // threads of a producer
#define GROUPS (BLOCK / GROUP - 1)
#define ROWS (64 * GROUPS)
#define QUERIES (ROWS / PACKED)
#define LINES ((HEAD_DIM + 63) / 64)

struct Lds {
    GroupRows<ROWS> query[LINES];
    GroupRows<KEYS> keys[STAGES][LINES], values[STAGES][LINES];
    PhaseBarrier query_full, query_empty, keys_full[STAGES], keys_empty[STAGES], values_full[STAGES], values_empty[STAGES];
};
static_assert(sizeof(Lds) == LDS_BYTES, "another size than the host takes");
static_assert(BOX % 8 == 0 && (BOX == 0 || (KEYS % BOX == 0 && PAGE % BOX == 0)), "no such boxes");
static_assert(HEAD_DIM % 16 == 0 && KEYS % 16 == 0 && PACKED <= ROWS && GROUPS >= 2 && GROUPS <= 3, "no such tiles");

typedef RingPlace<STAGES> Place;

struct Batch {
    const i32 *starts, *lengths, *page_table;
    u32 rows, pages, groups, window; // of heads: groups of PACKED
    u32 stride;                      // blocks of the launch
};
// How far a wave has looked for spans.
struct Search {
    u32 turn, base, before; // the next turn; the first row of the WAVE at hand, and tiles of the rows before it
};
// Queries that a block takes together, and the positions that they see.
struct Span {
    const i32 *pages;
    u32 group, first, count;   // of heads; tokens
    u32 position, begin, end;  // of the first token; seen by any
    u32 first_tile, last_tile; // of keys
};
// The block's span of the next turn; whether there is one. Its number among all grows from turn to turn.
DEVICE bool find_span(const Batch &batch, Search &search, Span &span) {
    u32 index = search.turn * batch.stride + (search.turn % 2 ? batch.stride - 1 - BLOCK_X : BLOCK_X), tile = index / batch.groups;
    span.group = index % batch.groups;
    search.turn += 1;
    for (; search.base < batch.rows; search.base += WAVE) {
        u32 row = search.base + LANE, last = batch.rows - 1 < row ? batch.rows - 1 : row;
        u32 tokens = row < batch.rows ? (u32)(batch.starts[last + 1] - batch.starts[last]) : 0, tiles = (tokens + QUERIES - 1) / QUERIES;
        u32 sum = tiles; // of the sequences up to this one
        for (u32 d = 1; d < WAVE; d *= 2) {
            u32 before = shfl(sum, LANE < d ? LANE : LANE - d);
            sum += LANE < d ? 0 : before;
        }
        u64 behind = wave_ballot(search.before + sum > tile);
        if (behind) {
            u32 found = popcount((behind & (~behind + 1)) - 1), own = search.base + found;
            u32 in_row = search.before + shfl(sum, found) - 1 - tile; // the last tile, which sees most, first
            u32 first = (u32)batch.starts[own] + in_row * QUERIES, stop = (u32)batch.starts[own + 1];
            span.first = first, span.count = smaller(stop - first, (u32)QUERIES);
            span.position = (u32)batch.lengths[own] - (stop - first);
            span.end = span.position + span.count;
            span.begin = first_seen(span.position, batch.window);
            span.first_tile = span.begin / KEYS, span.last_tile = (span.end - 1) / KEYS;
            span.pages = batch.page_table + (u64)own * batch.pages;
            return true;
        }
        search.before += shfl(sum, WAVE - 1);
    }
    return false;
}

// A row of HEAD_DIM numbers, by LINE threads, into lines.
template <u32 N> DEVICE void copy_row(const f16 *from, bool there, u32 row, GroupRows<N> (&to)[LINES]) {
    u32 piece = THREAD % LINE;
    UNROLL for (u32 l = 0; l < LINES; ++l)
        if ((l * LINE + piece) * 8 < HEAD_DIM)
            copy_async(&to[l].v[row][line_place(row, piece)], (const u32x4 *)(from + (l * LINE + piece) * 8), there);
}
// Whether rows of a tile are seen by no query: they are zeros, and copied one by one as the rest of their box.
DEVICE bool is_cut(const Span &span, u32 tile) { return tile * KEYS < span.begin || (tile + 1) * KEYS > span.end; }

// Keys, or values, of all KV heads in memory.
struct Pages {
    const f16 *v;   // (N, P, G, D)
    const u64 *map; // of them
    u32 kv_heads;   // G
};
// Where the page table has a position, if a query sees some of so many from there on in its page.
DEVICE u32 slot_of(const Span &span, u32 at, u32 rows) {
    return at < span.end && at + rows > span.begin ? (u32)span.pages[at / PAGE] * PAGE + at % PAGE : 0;
}
// A row of a tile, whose place is `slot`, if a query sees it.
DEVICE void copy_position(const Pages &pages, u32 kv_head, const Span &span, u32 tile, u32 row, u32 slot, GroupRows<KEYS> (&to)[LINES]) {
    u32 at = tile * KEYS + row;
    bool there = at >= span.begin && at < span.end;
    copy_row(pages.v + ((u64)(there ? slot : 0) * pages.kv_heads + kv_head) * HEAD_DIM, there, row, to);
}
// A tile, by the threads of a producer.
DEVICE void copy_tile(const Pages &pages, u32 kv_head, const Span &span, u32 tile, GroupRows<KEYS> (&to)[LINES], PhaseBarrier &full) {
#if BOX
    const u32 step = 32 / LINE, together = GROUPS == 3 || BOX % (4 * step) ? 2 : 4; // as there are registers
    ROLLED for (u32 box = THREAD % COPIERS / 32; box < KEYS / BOX; box += COPIERS / 32) {
        u32 at = tile * KEYS + box * BOX, slot = slot_of(span, at, BOX);
        if (at >= span.begin && at + BOX <= span.end) {
            if (LANE == 0) {
                phase_expect(full, LINES * BOX * 128);
                UNROLL for (u32 l = 0; l < LINES; ++l) copy_box(to[l].v[box * BOX], pages.map, 64 * l, kv_head, slot, full);
            }
        } else {
            ROLLED for (u32 row = LANE / LINE; row < BOX; row += together * step)
                UNROLL for (u32 e = 0; e < together; ++e) copy_position(pages, kv_head, span, tile, box * BOX + row + e * step, slot + row + e * step, to);
        }
    }
#else
    const u32 step = COPIERS / LINE, together = GROUPS == 3 ? 2 : KEYS / step;
    ROLLED for (u32 first = THREAD % COPIERS / LINE; first < KEYS; first += together * step)
        UNROLL for (u32 e = 0; e < together; ++e) {
            u32 row = first + e * step;
            copy_position(pages, kv_head, span, tile, row, slot_of(span, tile * KEYS + row, 1), to);
        }
#endif
    phase_arrive_copied(full);
}

DEVICE void copy_queries(const f16 *q, const Span &span, u32 heads, GroupRows<ROWS> (&to)[LINES]) {
    ROLLED for (u32 row = THREAD % COPIERS / LINE; row < ROWS; row += COPIERS / LINE) {
        u32 token = row / PACKED;
        bool there = token < span.count;
        u32 from = there ? (span.first + token) * heads + span.group * PACKED + row % PACKED : 0;
        copy_row(q + (u64)from * HEAD_DIM, there, row, to);
    }
}

// Tiles of keys, or queries and tiles of values, of all spans of the block.
DEVICE void produce(Lds &lds, const Batch &batch, bool is_values, const f16 *q, const Pages &pages) {
    Place place{0, 1}; // empty before the first phase
    u32 parity = 1, heads = batch.groups * PACKED;
    PhaseBarrier(&full)[STAGES] = is_values ? lds.values_full : lds.keys_full;
    PhaseBarrier(&empty)[STAGES] = is_values ? lds.values_empty : lds.keys_empty;
    GroupRows<KEYS>(&tiles)[STAGES][LINES] = is_values ? lds.values : lds.keys;
    if (BOX) map_ready(pages.map);
    Span span;
    Search search{};
    ROLLED while (find_span(batch, search, span)) {
        u32 kv_head = span.group * PACKED / (heads / pages.kv_heads);
        if (is_values) {
            phase_wait(lds.query_empty, parity);
            parity ^= 1;
            copy_queries(q, span, heads, lds.query);
            phase_arrive_copied(lds.query_full);
        }
        ROLLED for (u32 tile = span.last_tile + 1; tile-- > span.first_tile;) {
            phase_wait(empty[place.stage], place.parity);
            copy_tile(pages, kv_head, span, tile, tiles[place.stage], full[place.stage]);
            advance(place);
        }
    }
}

// The online softmax of a lane's two rows. l is the sum of the lane's own weights.
struct State {
    float m[2], l[2]; // greatest score so far, sum of exp(score - m)
    Sums<HEAD_DIM> acc;
};
struct Scores {
    float factor, scale, softcap; // of scores in the exponent of 2
    u32 window;
};

// Hides keys from `start` on that the rows, of these positions, do not see.
DEVICE void mask_scores(Sums<KEYS> &score, u32 start, const u32 (&position)[2], u32 window) {
    UNROLL for (u32 r = 0; r < 2; ++r) {
        i32 last = (i32)(position[r] - start - group_column(0)), first = window ? last - (i32)(position[r] - first_seen(position[r], window)) : -KEYS;
        UNROLL for (u32 i = 0; i < KEYS / 4; ++i) {
            i32 column = i / 2 * 8 + i % 2;
            if (column > last || column < first) score.v[i / 2][2 * r + i % 2] = NEG_INFINITY;
        }
    }
}
DEVICE void cap_scores(Sums<KEYS> &score, const Scores &how) {
    UNROLL for (u32 t = 0; t < KEYS / 8; ++t)
        UNROLL for (u32 i = 0; i < 4; ++i) score.v[t][i] = how.softcap * fast_tanh(fast_divide(score.v[t][i] * how.scale, how.softcap));
}
// Takes scores into m and l and makes them weights. keep: what acc is to be scaled by.
DEVICE void update_state(State &s, Sums<KEYS> &score, float factor, float (&keep)[2]) {
    UNROLL for (u32 r = 0; r < 2; ++r) {
        float some[2] = {s.m[r], s.m[r]}; // two maxima, so that instructions wait less for each other
        UNROLL for (u32 i = 0; i < KEYS / 4; ++i) some[i % 2] = fast_max(some[i % 2], score.v[i / 2][2 * r + i % 2]);
        float most = fast_max(some[0], some[1]);
        most = fast_max(most, shfl_xor(most, 1));
        most = fast_max(most, shfl_xor(most, 2));
        float base = most > NEG_INFINITY ? most * factor : 0.0f; // a row may have seen nothing yet
        keep[r] = fast_exp2(fma_rn(s.m[r], factor, -base));
        s.m[r] = most;
        s.l[r] *= keep[r];
        UNROLL for (u32 i = 0; i < KEYS / 4; ++i) {
            float &weight = score.v[i / 2][2 * r + i % 2];
            weight = fast_exp2(fma_rn(weight, factor, -base));
            s.l[r] += weight;
        }
    }
}

// acc / l of the lane's rows as float16. Four lanes share a row; each gathers whole vectors of it. A head's sink is one more weight of l,
// without a value (arXiv:2309.17453).
DEVICE void store_rows(State &s, const Span &span, const float *sinks, float factor, u32 first_row, u32 heads, f16 *out) {
    UNROLL for (u32 r = 0; r < 2; ++r) {
        u32 row = first_row + group_row(r), token = row / PACKED, lane = LANE % 4;
        f16 *to = out + ((u64)(span.first + token) * heads + span.group * PACKED + row % PACKED) * HEAD_DIM;
        float l = s.l[r] + shfl_xor(s.l[r], 1);
        l += shfl_xor(l, 2);
        if (sinks) l += fast_exp2(sinks[span.group * PACKED + row % PACKED] * LOG2E - s.m[r] * factor);
        float scale = fast_divide(1.0f, l);
        UNROLL for (u32 t = 0; t < HEAD_DIM / 8; t += 4) {
            u32x4 w;
            UNROLL for (u32 i = 0; i < 4; ++i) {
                const float *pair = &s.acc.v[t + i < HEAD_DIM / 8 ? t + i : 0][2 * r];
                w.v[i] = to_f16x2(pair[0] * scale, pair[1] * scale);
            }
            UNROLL for (u32 step = 1; step < 4; step *= 2) // a transposition of four words in each of four lanes
                UNROLL for (u32 i = 0; i < 2; ++i) {
                    u32 &low = w.v[step == 1 ? 2 * i : i], &high = w.v[(step == 1 ? 2 * i : i) + step];
                    u32 other = shfl_xor(lane & step ? low : high, step);
                    (lane & step ? low : high) = other;
                }
            if (token < span.count && t + lane < HEAD_DIM / 8) store((u32 *)(to + (t + lane) * 8), w);
        }
    }
}

DEVICE void consume(Lds &lds, const Batch &batch, const Scores &how, const float *sinks, f16 *out) {
    u32 own = shfl(THREAD / GROUP - 1, 0), first_row = own * 64, next = own + 1 == GROUPS ? 0 : own + 1;
    bool says = LANE == 0; // one lane of each wave arrives
    Place keys{0, 0}, values{0, 0};
    u32 parity = 0;
    if (next == 0) named_arrive(1, 2 * GROUP);
    Span span;
    Search search{};
    ROLLED while (find_span(batch, search, span)) {
        u32 position[2] = {span.position + (first_row + group_row(0)) / PACKED, span.position + (first_row + group_row(1)) / PACKED};
        State state;
        Sums<KEYS> score;
        Weights<KEYS> weights;
        float keep[2];
        UNROLL for (u32 r = 0; r < 2; ++r) state.m[r] = NEG_INFINITY, state.l[r] = 0;
        UNROLL for (u32 t = 0; t < HEAD_DIM / 8; ++t)
            UNROLL for (u32 i = 0; i < 4; ++i) state.acc.v[t][i] = 0;
        auto weigh = [&](u32 tile) {
            u32 start = tile * KEYS;
            if (how.softcap > 0.0f) cap_scores(score, how);
            if (start + KEYS - 1 > span.position || (how.window && start < first_seen(span.end - 1, how.window))) mask_scores(score, start, position, how.window);
            update_state(state, score, how.factor, keep);
        };

        auto multiply = [&]() { group_scores<HEAD_DIM>(score, lds.query, first_row, lds.keys[keys.stage]); };
        phase_wait(lds.query_full, parity);
        parity ^= 1;
        phase_wait(lds.keys_full[keys.stage], keys.parity);
        group_landed();
        group_begin();
        multiply();
        group_commit();
        group_wait<0>();
        arrived(score);
        if (says) phase_arrive(lds.keys_empty[keys.stage]);
        advance(keys);
        weigh(span.last_tile);
        pack_weights(score, weights);
        if (span.last_tile > span.first_tile) phase_wait(lds.keys_full[keys.stage], keys.parity);
        ROLLED for (u32 tile = span.last_tile; tile > span.first_tile; --tile) {
            phase_wait(lds.values_full[values.stage], values.parity);
            if (!BOX || is_cut(span, tile) || is_cut(span, tile - 1)) group_landed();
            named_wait(1 + own, 2 * GROUP);
            group_begin();
            multiply();
            group_commit();
            group_weighted(state.acc, weights, lds.values[values.stage]);
            group_commit();
            named_arrive(1 + next, 2 * GROUP);
            group_wait<1>();
            arrived(score);
            if (says) phase_arrive(lds.keys_empty[keys.stage]);
            advance(keys);
            weigh(tile - 1);
            arrived(score);
            // Here, although the next turn is early enough: the compiler moves the wait for values up to a branch, over the weights.
            if (tile - 1 > span.first_tile) phase_wait(lds.keys_full[keys.stage], keys.parity);
            group_wait<0>();
            arrived(state.acc);
            if (says) phase_arrive(lds.values_empty[values.stage]);
            advance(values);
            UNROLL for (u32 t = 0; t < HEAD_DIM / 8; ++t)
                UNROLL for (u32 i = 0; i < 4; ++i) state.acc.v[t][i] *= keep[i / 2];
            pack_weights(score, weights);
        }
        if (says) phase_arrive(lds.query_empty);
        phase_wait(lds.values_full[values.stage], values.parity);
        if (!BOX || is_cut(span, span.first_tile)) group_landed();
        group_begin();
        group_weighted(state.acc, weights, lds.values[values.stage]);
        group_commit();
        group_wait<0>();
        arrived(state.acc);
        if (says) phase_arrive(lds.values_empty[values.stage]);
        advance(values);
        store_rows(state, span, sinks, how.factor, first_row, batch.groups * PACKED, out);
    }
}

KERNEL(BLOCK) attention_wgmma(
    const f16 *q,          // (T, H, D)
    const f16 *k_pages,    // (N, P, G, D)
    const f16 *v_pages,    // (N, P, G, D)
    const u64 *k_map,      // of k_pages, for boxes, or null
    const u64 *v_map,      // of v_pages
    const i32 *starts,     // (B + 1,) first token of each sequence
    const i32 *lengths,    // (B,) positions, these tokens included
    const i32 *page_table, // (B, pages)
    f16 *out,              // (T, H, D)
    u32 rows,              // B
    u32 heads,             // H
    u32 kv_heads,          // G
    u32 pages,             // of a row of page_table
    u32 stride,            // blocks of the launch
    float scale,           // of the scores
    u32 window,            // positions that are seen, or 0: all
    float softcap,         // or 0: none
    const float *sinks     // (H,) or null
) {
    DYNAMIC_SHARED(Lds, shared, 1);
    Lds &lds = shared[0];
    Batch batch{starts, lengths, page_table, rows, pages, heads / PACKED, window, stride};
    if (THREAD == 0) {
        const u32 waves = GROUPS * GROUP_WAVES;
        phase_init(lds.query_full, COPIERS), phase_init(lds.query_empty, waves);
        for (u32 s = 0; s < STAGES; ++s) {
            phase_init(lds.keys_full[s], COPIERS), phase_init(lds.keys_empty[s], waves);
            phase_init(lds.values_full[s], COPIERS), phase_init(lds.values_empty[s], waves);
        }
        group_landed(); // for the bulk copy engine
    }
    barrier();
    if (THREAD < GROUP) {
        give_registers<GROUPS == 2 ? 40 : 32>();
        bool is_values = shfl(THREAD, 0) >= COPIERS;
        produce(lds, batch, is_values, q, Pages{is_values ? v_pages : k_pages, is_values ? v_map : k_map, kv_heads});
    } else {
        take_registers<GROUPS == 2 ? 232 : 160>();
        consume(lds, batch, Scores{softcap > 0.0f ? LOG2E : scale * LOG2E, scale, softcap, window}, SINKS ? sinks : nullptr, out);
    }
}
