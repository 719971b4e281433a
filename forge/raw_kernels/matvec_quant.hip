// GEMV: one row of x times a matrix in ggml's block types, with a norm before it or a gated activation behind it.
// Uses: quant_blocks, codebooks, quant_digits, matvec_row
//
// A team of THREADS_PER_ROW threads computes ROWS rows, and neighbouring threads read neighbouring units of a row.
// -D FORMAT=ggml's number of the type; ROWS; THREADS_PER_ROW; BLOCK=threads; MAX_GROUPS=groups of 32 numbers of x at most; AHEAD; IN=f16,
// or float: x is the residual stream and is normalized here; OUT=float, or f16: activation(gate) * up; SILU=1, or 0: the activation
// is GELU. PART=0, or 1 and 2 of launches that compute parts of y from the same x: the later ones, 2, run beside the first.

// The k-th units of a team's rows from output `first` on. Past a row's end it is the last one again, which another lane reads too.
DEVICE void read_units(Unit (&unit)[ROWS], const Planes &planes, u32 first, u32 k, u32 units, u32 outer) {
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        unit[r] = read_unit(planes, (u64)team_row<OUT, ROWS>(first, r, outer) * units + smaller(k, units - 1));
}

// Each block makes the digits of x itself. AHEAD units of each of a team's rows are under way, the first of them before x is there. It
// goes on to other rows of the matrix, whose first units are under way during the reductions.
KERNEL(BLOCK) matvec_quant(
    const IN *x,       // (K,)
    const float *norm, // (K,) weights of the RMS norm of x, or null
    float eps,         // of the norm
    const u8 *quants,  // planes of the matrix (N, K); gated: (2N, K) gates, then ups
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // (N,) or (2N,), or null
    OUT *y,            // (N,)
    u32 inner,         // K, whole units
    u32 outer,         // N
    u32 blocks,        // of the launch
    u32 accumulate     // 0 or 1: y is added to
) {
    SHARED u32x4 digits[MAX_GROUPS / GROUPS * DIGIT_PIECES];
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], scratch[MAX_WAVES(BLOCK)];
    const u32 outputs = Outputs<OUT, ROWS>::per_team, turns = (4 * MAX_GROUPS + BLOCK - 1) / BLOCK;
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS, lane = THREAD % THREADS_PER_ROW, team = THREAD / THREADS_PER_ROW * outputs;
    u32 first = BLOCK_X * (BLOCK / THREADS_PER_ROW) * outputs, stride = blocks * (BLOCK / THREADS_PER_ROW) * outputs;
    u32 at[turns]; // where the thread's numbers of x begin, eight each
    UNROLL for (u32 t = 0; t < turns; ++t) at[t] = eight_start(t * BLOCK + THREAD);
    Row<IN, turns> row;
    Unit unit[AHEAD][ROWS];
    u32 ahead = first, start = 0; // outputs and units to read next
    auto read_next = [&](Unit(&next)[ROWS]) {
        if (ahead < outer) read_units(next, planes, ahead + team, start + lane, units, outer);
        start += THREADS_PER_ROW;
        if (start >= units) start = 0, ahead += stride;
    };
    load_codebook<BLOCK>();
    if (PART == 2 && HAS_PDL) start_next_launch(), fence_device();
    if (HAS_PDL)
        UNROLL for (u32 a = 0; a < AHEAD; ++a) read_next(unit[a]);
    if (PART == 0) grid_dependency_sync();
    if (PART == 1) late_grid_dependency_sync();
    read_row(row, x, norm, at, inner);
    if (!HAS_PDL) // x is needed first
        UNROLL for (u32 a = 0; a < AHEAD; ++a) read_next(unit[a]);
    u32x4 eight[turns];
    finish_row(eight, row, eps, inner, scratch);
    UNROLL for (u32 t = 0; t < turns; ++t) make_digits(eight[t], digits, t * BLOCK + THREAD, at[t] < inner);
    lds_barrier();

    float sum[ROWS];
    UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
    u32 k = 0, turn = 0, n = own_output<THREADS_PER_ROW, OUT, ROWS, BLOCK>(first, outer);
    Addends more{};
    if (n < outer) more = read_addends(y, n, bias, outer, accumulate);
    while (first < outer)
        UNROLL for (u32 a = 0; a < AHEAD; ++a) {
            if (first >= outer) break;
            Unit now[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) now[r] = unit[a][r];
            read_next(unit[a]);
            if (k + lane < units) multiply_unit(now, sum, digits, k + lane);
            k += THREADS_PER_ROW;
            if (k < units) continue;
            finish_vector<THREADS_PER_ROW>(sum, partial[turn], n, more, y, outer);
            UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
            k = 0, turn ^= 1, first += stride;
            n = own_output<THREADS_PER_ROW, OUT, ROWS, BLOCK>(first, outer);
            if (n < outer) more = read_addends(y, n, bias, outer, accumulate);
        }
    if (PART == 2) grid_dependency_sync();
}
