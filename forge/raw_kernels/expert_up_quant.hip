// GEMV of a mixture of experts, first product: one row of x times the first matrices, in ggml's block types, of the experts that were
// chosen for it, with a norm before and an activation behind it.
// Uses: quant_blocks, codebooks, quant_digits, matvec_row, expert_activation, expert_row
//
// -D FORMAT, THREADS_PER_ROW, BLOCK, MAX_GROUPS, IN of matvec_quant; ROWS, even with a gate; GATED=1, or 0: activations are of ups
// alone; SILU=1, without a meaning here.

// The k-th units of a team's rows from output `first` on. Past the end every thread reads the first unit.
DEVICE void read_units(
    Unit (&unit)[ROWS], const Planes &planes, const i32 (&experts)[MAX_USED], u32 first, u32 k, u32 units, u32 outer, u32 width
) {
    bool there = first < outer && k < units;
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        unit[r] = read_unit(planes, there ? first_row<ROWS>(experts, first, r, outer, width) * units + k : 0);
}

KERNEL(BLOCK) expert_up_quant(
    const IN *x,          // (M, K)
    const float *norm,    // (K,) weights of the RMS norm of x, or null
    float eps,            // of the norm
    const i32 *chosen,    // (M, U)
    const float *weights, // (M, U) factors of the products, or null
    const u8 *quants,     // planes of the matrices (X * 2F, K), an expert's gates, then its ups; or (X * F, K)
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // one for each row, or null
    f16 *h,            // (M, U, F)
    u32 inner,         // K, whole units
    u32 width,         // F
    u32 used,          // U
    u32 activation,    // see expert_activation
    u32 blocks         // of a row
) {
    SHARED u32x4 digits[MAX_GROUPS / GROUPS * DIGIT_PIECES];
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], scratch[MAX_WAVES(BLOCK)], share[MAX_USED];
    SHARED i32 experts[MAX_USED];
    const u32 outputs = Outputs<Activation, ROWS>::per_team, turns = (4 * MAX_GROUPS + BLOCK - 1) / BLOCK;
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS, outer = used * width;
    u32 lane = THREAD % THREADS_PER_ROW, team = THREAD / THREADS_PER_ROW * outputs;
    u32 first = BLOCK_X * (BLOCK / THREADS_PER_ROW) * outputs, stride = blocks * (BLOCK / THREADS_PER_ROW) * outputs;
    u32 at[turns]; // where the thread's numbers of x begin, eight each
    UNROLL for (u32 t = 0; t < turns; ++t) at[t] = eight_start(t * BLOCK + THREAD);
    Row<IN, turns> row;
    Unit next[ROWS];
    u32 ahead = first, start = 0; // outputs and units to read next
    load_codebook<BLOCK>();
    x += BLOCK_Y * inner, h += (u64)BLOCK_Y * outer, chosen += BLOCK_Y * used;
    if (weights) weights += BLOCK_Y * used;
    grid_dependency_sync();
    load_choice(experts, share, chosen, weights, used);
    read_row(row, x, norm, at, inner);
    lds_barrier();
    read_units(next, planes, experts, ahead + team, lane, units, outer, width);
    u32x4 eight[turns];
    finish_row(eight, row, eps, inner, scratch);
    UNROLL for (u32 t = 0; t < turns; ++t) make_digits(eight[t], digits, t * BLOCK + THREAD, at[t] < inner);
    lds_barrier();

    for (u32 turn = 0; first < outer; first += stride, turn ^= 1) {
        u32 n = own_output<THREADS_PER_ROW, Activation, ROWS, BLOCK>(first, outer);
        FirstAddends more = first_addends(experts, weights, bias, n, outer, width, activation);
        float sum[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
        for (u32 k = lane; k < units + lane; k += THREADS_PER_ROW) { // each thread of a team takes the same number of turns
            Unit unit[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) unit[r] = next[r];
            start += THREADS_PER_ROW;
            if (start >= units) start = 0, ahead += stride;
            read_units(next, planes, experts, ahead + team, start + lane, units, outer, width);
            if (k < units) multiply_unit(unit, sum, digits, k);
        }
        finish_vector<THREADS_PER_ROW>(sum, partial[turn], n, more, (Activation *)h, outer);
    }
}
