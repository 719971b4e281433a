// GEMV of a mixture of experts, second product: the weighted sum of what a row's experts make of their activations, of matrices in
// ggml's block types.
// Uses: quant_blocks, codebooks, quant_digits, matvec_row, expert_activation, expert_row
//
// The activations of all experts are one long row, whose parts lie in different matrices. Their weights become part of the scales of
// the digits.
// -D FORMAT, THREADS_PER_ROW, BLOCK, ROWS, MAX_GROUPS of matvec_quant; GATED=0 and SILU=1, without a meaning here.

// The k-th units of a team's rows from output `first` on; `each` units are of one expert. Past the end every thread reads the first.
DEVICE void read_units(
    Unit (&unit)[ROWS], const Planes &planes, const i32 (&experts)[MAX_USED], u32 first, u32 k, u32 units, u32 outer, u32 each
) {
    bool there = first < outer && k < units;
    u32 place = there ? k / each : 0;
    u64 matrix = (u64)experts[place] * outer;
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        unit[r] = read_unit(planes, there ? (matrix + team_row<float, ROWS>(first, r, outer)) * each + (k - place * each) : 0);
}

KERNEL(BLOCK) expert_down_quant(
    const f16 *h,         // (M, all, F) of which the first U of each row
    const i32 *chosen,    // (M, all)
    const float *weights, // (M, all) or null: all are 1
    const u8 *quants,     // planes of the matrices (X * N, F)
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // (X * N,) or null
    float *y,          // (M, N)
    u32 width,         // F, whole units
    u32 used,          // U
    u32 all,           // experts of a row
    u32 outer,         // N
    u32 accumulate,    // 0 or 1: y is added to
    u32 blocks         // of a row
) {
    SHARED u32x4 digits[MAX_GROUPS / GROUPS * DIGIT_PIECES];
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], share[MAX_USED];
    SHARED i32 experts[MAX_USED];
    const u32 turns = (4 * MAX_GROUPS + BLOCK - 1) / BLOCK;
    Planes planes{quants, high, scales, deltas};
    u32 inner = used * width, units = inner / UNIT_WEIGHTS, each = width / UNIT_WEIGHTS;
    u32 lane = THREAD % THREADS_PER_ROW, team = THREAD / THREADS_PER_ROW * ROWS;
    u32 first = BLOCK_X * (BLOCK / THREADS_PER_ROW) * ROWS, stride = blocks * (BLOCK / THREADS_PER_ROW) * ROWS;
    u32 at[turns]; // where the thread's numbers of h begin, eight each
    UNROLL for (u32 t = 0; t < turns; ++t) at[t] = eight_start(t * BLOCK + THREAD);
    Row<f16, turns> row;
    Unit next[ROWS];
    u32 ahead = first, start = 0; // outputs and units to read next
    load_codebook<BLOCK>();
    h += (u64)BLOCK_Y * all * width, y += BLOCK_Y * outer, chosen += BLOCK_Y * all;
    if (weights) weights += BLOCK_Y * all;
    grid_dependency_sync();
    load_choice(experts, share, chosen, weights, used);
    read_row(row, h, nullptr, at, inner);
    lds_barrier();
    read_units(next, planes, experts, ahead + team, lane, units, outer, each);
    UNROLL for (u32 t = 0; t < turns; ++t)
        make_digits(row.x[t], digits, t * BLOCK + THREAD, at[t] < inner, at[t] < inner ? share[at[t] / width] : 0.0f);
    lds_barrier();

    for (u32 turn = 0; first < outer; first += stride, turn ^= 1) {
        u32 n = own_output<THREADS_PER_ROW, float, ROWS, BLOCK>(first, outer);
        Addends more = second_addends(experts, share, bias, y, n, outer, used, accumulate);
        float sum[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
        for (u32 k = lane; k < units + lane; k += THREADS_PER_ROW) { // each thread of a team takes the same number of turns
            Unit unit[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) unit[r] = next[r];
            start += THREADS_PER_ROW;
            if (start >= units) start = 0, ahead += stride;
            read_units(next, planes, experts, ahead + team, start + lane, units, outer, each);
            if (k < units) multiply_unit(unit, sum, digits, k);
        }
        finish_vector<THREADS_PER_ROW>(sum, partial[turn], n, more, y, outer);
    }
}
