// GEMV of a mixture of experts, second product: the weighted sum of what a row's experts make of their activations, of matrices in
// ggml's block types.
// Uses: quant_blocks, codebooks, quant_digits, matvec_row, expert_activation, expert_row
//
// The activations of all experts are one long row, whose parts lie in different matrices. Their weights become part of the scales of
// the digits.
// -D FORMAT, THREADS_PER_ROW, BLOCK, ROWS of matvec_quant; MAX_GROUPS=groups of 32 numbers of the long row; GATED=0 and SILU=1, without
// a meaning here.

#define TURNS ((MAX_GROUPS / GROUPS + THREADS_PER_ROW - 1) / THREADS_PER_ROW) // units of a long row that a thread reads

// Units of a team's rows from output `first` on. start: The unit's place in row 0 of its expert's matrix, whose rows have `each`.
DEVICE void read_units(Unit (&unit)[ROWS], const Planes &planes, u64 start, u32 first, u32 outer, u32 each) {
    UNROLL for (u32 r = 0; r < ROWS; ++r) unit[r] = read_unit(planes, start + team_row<float, ROWS>(first, r, outer) * each);
}

// All of a team's rows are on their way at once, from before the first product's end on.
KERNEL(BLOCK) expert_down_quant(
    const f16 *h,         // (M, all, F) of which the first U of each row
    const i32 *chosen,    // (M, all), stored before the launch in front of this one
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
    const u32 turns = (4 * MAX_GROUPS + BLOCK - 1) / BLOCK, units = MAX_GROUPS / GROUPS;
    const u32 in_block = BLOCK / THREADS_PER_ROW * ROWS;
    Planes planes{quants, high, scales, deltas};
    u32 inner = used * width, each = width / UNIT_WEIGHTS;
    u32 lane = THREAD % THREADS_PER_ROW, team = THREAD / THREADS_PER_ROW * ROWS;
    u32 first = BLOCK_X * in_block, stride = blocks * in_block;
    u32 at[turns]; // where the thread's numbers of h begin, eight each
    UNROLL for (u32 t = 0; t < turns; ++t) at[t] = eight_start(t * BLOCK + THREAD);
    Row<f16, turns> row;
    Unit unit[TURNS][ROWS];
    u64 start[TURNS];
    load_codebook<BLOCK>();
    h += (u64)BLOCK_Y * all * width, y += BLOCK_Y * outer, chosen += BLOCK_Y * all;
    if (weights) weights += BLOCK_Y * all;
    if (HAS_PDL) fence_device(); // experts, and weights that were fetched for them, are not as L1 may have them
    UNROLL for (u32 t = 0; t < TURNS; ++t) {
        u32 k = smaller(lane + t * THREADS_PER_ROW, units - 1), place = k / each;
        start[t] = (u64)chosen[place] * outer * each + (k - place * each);
    }
    UNROLL for (u32 t = 0; t < TURNS; ++t) read_units(unit[t], planes, start[t], first + team, outer, each);
    late_grid_dependency_sync();
    read_row(row, h, nullptr, at, inner);
    load_choice(experts, share, chosen, weights, used);
    lds_barrier();
    UNROLL for (u32 t = 0; t < turns; ++t)
        make_digits(row.x[t], digits, t * BLOCK + THREAD, at[t] < inner, at[t] < inner ? share[at[t] / width] : 0.0f);
    lds_barrier();

    for (u32 turn = 0; first < outer; first += stride, turn ^= 1) {
        u32 n = own_output<THREADS_PER_ROW, float, ROWS, BLOCK>(first, outer);
        Addends more = second_addends(experts, share, bias, y, n, outer, used, accumulate);
        float sum[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
        UNROLL for (u32 t = 0; t < TURNS; ++t) {
            u32 k = lane + t * THREADS_PER_ROW;
            if (k < units) multiply_unit(unit[t], sum, digits, k);
            if (first + stride < outer) read_units(unit[t], planes, start[t], first + stride + team, outer, each);
        }
        finish_vector<THREADS_PER_ROW>(sum, partial[turn], n, more, y, outer);
    }
}
