// The main loop of products of many rows of x with a quantized matrix, by waves with roles.
//
// One thread of the last group of waves (the producer) lets the bulk copy engine bring x, X_QUARTERS of a line of 256 numbers at a time,
// to a ring of X_STAGES in LDS; each stage has a barrier that says that it is full and one that it is empty. x lies in memory in an
// order of x_order. The other groups (consumers) never meet. Each of their waves copies lines of its own rows of the matrix, STAGES - 1 ahead,
// makes float16 of them in registers and multiplies; it makes the next weights while the last are multiplied.
// The inner dimension is a multiple of 256.
// -D FORMAT=ggml's number of the type; STAGES, X_STAGES of X_QUARTERS in LDS; LDS_BYTES; TOKENS, TILES, BLOCK=threads of consumers of matmul_epilogue;
// THREADS of a block; TILE_LIST=1: LDS holds two numbers of each row of x, too.

#define GROUP (TILE_WAVE * GROUP_WAVES)
static_assert(THREADS == BLOCK + GROUP, "a producer beside the consumers");

typedef GroupRows<TOKENS> XStage[X_QUARTERS]; // in x_order's order: quarters of a group follow each other
struct Memory {
    XStage x[X_STAGES];
    WaveStage stages[STAGES][WAVES];
    PhaseBarrier full[X_STAGES], empty[X_STAGES];
#ifdef TILE_LIST
    u32 places[TOKENS];
    float factors[TOKENS];
#endif
};
static_assert(sizeof(Memory) == LDS_BYTES, "another size than the host takes");

// By one thread, before a barrier of the block.
DEVICE void prepare_barriers(Memory &memory) {
    for (u32 s = 0; s < X_STAGES; ++s) phase_init(memory.full[s], 1), phase_init(memory.empty[s], WAVES);
    group_landed(); // for the bulk copy engine
}

typedef RingPlace<X_STAGES> Place;
static_assert(X_QUARTERS == 1 || X_QUARTERS == QUARTERS, "a quarter or a line");
DEVICE u32 x_quarter(u32 n) { return quarter_of(n).group * 2 + quarter_of(n).half; } // where the n-th lies in x

// x of the block's rows, by one thread. Of 64 rows a stage is one piece. With a list of tiles, of which many are not full, a piece has the
// rows that there are of 64 in a quarter, by eights.
DEVICE void produce(Memory &memory, const Product &p, const f16 *x, u32 lines, u32 begin, u32 end) {
    const u32 rows = TOKENS < X_ROWS ? TOKENS : X_ROWS; // of a piece
#ifdef TILE_LIST
    const u32 quarters = 1;
    u32 there = (p.rows - FIRST_TOKEN + 7) / 8 * 8, bytes = there * 128 * X_QUARTERS;
#else
    const u32 quarters = TOKENS == X_ROWS ? X_QUARTERS : 1, bytes = sizeof(XStage);
#endif
    Place place{0, 1}; // empty before the first phase
    ROLLED for (u32 line = begin; line < end; ++line)
        ROLLED for (u32 n = 0; n < QUARTERS; n += X_QUARTERS) {
            phase_wait(memory.empty[place.stage], place.parity);
            phase_expect(memory.full[place.stage], bytes);
            UNROLL for (u32 r = 0; r < TOKENS; r += rows) {
#ifdef TILE_LIST
                if (r >= there) continue;
                u32 row = FIRST_TOKEN + r, together = smaller(there - r, rows);
#else
                const u32 together = rows;
                u32 row = smaller(FIRST_TOKEN + r, (p.rows - 1) / rows * rows); // the last ones again behind them
#endif
                u32 quarter = (row / X_ROWS * lines + line) * QUARTERS + (X_QUARTERS == 1 ? x_quarter(n) : n);
                UNROLL for (u32 q = 0; q < X_QUARTERS; q += quarters)
                    copy_bulk(memory.x[place.stage][q].v[r], x + ((u64)(quarter + q) * X_ROWS + row % X_ROWS) * 64, quarters * together * 128, memory.full[place.stage]);
            }
            phase_arrive(memory.full[place.stage]);
            advance(place);
        }
}

// store(sum) is what a wave does with its sums.
template <typename Store>
DEVICE void consume(Memory &memory, const Product &product, const Planes &planes, u32 lines, u32 begin, u32 end, const Store &store) {
    const u32 wave = kept(THREAD / TILE_WAVE);
    bool says = LANE == 0; // one lane of each wave arrives
    const OwnPlace own = own_place();
    LineCopies copies;
    prepare_line(copies, product, lines);
    u32 own_rows[TILES][TILE_LANE_ROWS];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) own_rows[t][r] = matrix_row(product, t, tile_row(r));
    UNROLL for (u32 s = 0; s + 1 < STAGES; ++s) {
        if (begin + s < end) copy_weights(memory.stages[s][wave], copies, planes, begin + s);
        commit_copies();
    }
    Rests rests, next_rests;
    if (begin < end) load_rests(next_rests, planes, own_rows, lines, begin);
    Sums sum;
    clear_sums(sum);
    const Masks masks = masks_of();
    u32 weights[2][4][4]; // of the quarter that is multiplied, and of the next
    u32 at = 0, emptied = 0; // stages: of weights; of x, the next to be given back
    Place place{0, 0};
    auto give_back = [&]() {
        wave_sync();
        if (says) phase_arrive(memory.empty[emptied]);
        emptied = emptied + 1 == X_STAGES ? 0 : emptied + 1;
    };
    Codes codes[TILES][TILE_LANE_ROWS];
    Factors factors[TILES][TILE_LANE_ROWS];
    // Weights of a line's p-th product: of a tile, a quarter.
    auto make_weights = [&](u32 p) {
        const u32 n = p / TILES, t = p % TILES;
        const WaveStage &stage = memory.stages[at][wave];
        Quarter q = quarter_of(n);
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            u32 row = t * 16 + 8 * r, pairs[4][2];
            if (FORMAT == Q8_0 || n % 2 == 0) read_codes(codes[t][r], stage, own, row, q);
            if (HALVES == 2 || !IS_K ? n % 2 == 0 : n == 0) factors[t][r] = factors_of(stage, rests[t][r], own, row, q);
            dequantize_quarter(codes[t][r], q, factors[t][r], masks, pairs);
            UNROLL for (u32 i = 0; i < 4; ++i)
                UNROLL for (u32 j = 0; j < 2; ++j) weights[p % 2][i][2 * j + r] = pairs[i][j];
        }
    };
    // Waits for a line, lets another come to the place of the line before it, and makes its first weights. Behind the last it makes any.
    auto begin_line = [&](u32 line) {
        wait_copies<STAGES - 2>();
        wave_sync();
        u32 next = line + STAGES - 1;
        if (next < end) copy_weights(memory.stages[at == 0 ? STAGES - 1 : at - 1][wave], copies, planes, next);
        commit_copies();
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) rests[t][r] = next_rests[t][r];
        if (line + 1 < end) load_rests(next_rests, planes, own_rows, lines, line + 1);
        make_weights(0);
    };
    begin_line(begin);
    grid_dependency_sync();
    if (begin < end) phase_wait(memory.full[place.stage], place.parity);
    ROLLED for (u32 line = begin; line < end; ++line) {
        const u32 products = QUARTERS * TILES;
        UNROLL for (u32 p = 0; p < products; ++p) {
            group_multiply(sum[p % TILES], weights[p % 2], memory.x[place.stage][0], X_QUARTERS == 1 ? 0 : x_quarter(p / TILES));
            const bool ends = (p + 1) % (TILES * X_QUARTERS) == 0; // the stage of x
            if (ends) advance(place);
            group_await_but<1>(); // the product before this one has ended
            if (p % (TILES * X_QUARTERS) == 0 && p > 0) give_back();
            if (ends && p + 1 < products) phase_wait(memory.full[place.stage], place.parity);
            if (p + 1 == products) at = at + 1 == STAGES ? 0 : at + 1;
            if (p + 1 < products) make_weights(p + 1);
            else begin_line(line + 1);
        }
        // Here, although the next turn is early enough: the compiler moves the wait for all products up to a branch, over the weights.
        if (line + 1 < end) phase_wait(memory.full[place.stage], place.parity);
        // All: the compiler follows products through no loop that waits for memory, and would let each end by itself.
        UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
        give_back();
    }
    store(sum);
}
