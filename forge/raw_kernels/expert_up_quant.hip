// GEMV of a mixture of experts, first product: one row of x times the first matrices, in ggml's block types, of the experts that were
// chosen for it, with a norm before and an activation behind it.
// Uses: quant_blocks, codebooks, quant_digits, matvec_row, expert_activation, expert_row
//
// -D FORMAT, THREADS_PER_ROW, BLOCK, IN of matvec_quant; ROWS, even with a gate; MAX_GROUPS=groups of 32 numbers of x; GATED=1, or 0:
// activations are of ups alone; SILU=1, without a meaning here.

#define TURNS ((MAX_GROUPS / GROUPS + THREADS_PER_ROW - 1) / THREADS_PER_ROW) // units of a row that a thread reads

// The k-th units of a team's rows from output `first` of an expert on. Past a row's end it is the last one again.
DEVICE void read_units(Unit (&unit)[ROWS], const Planes &planes, u64 matrix, u32 first, u32 k, u32 width) {
    const u32 units = MAX_GROUPS / GROUPS;
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        unit[r] = read_unit(planes, (matrix + team_row<Activation, ROWS>(first, r, width)) * units + smaller(k, units - 1));
}

// All of a team's rows are on their way at once. A block has outputs of one expert.
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
    u32 blocks         // of an expert
) {
    SHARED u32x4 digits[MAX_GROUPS / GROUPS * DIGIT_PIECES];
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], scratch[MAX_WAVES(BLOCK)];
    const u32 outputs = Outputs<Activation, ROWS>::per_team, turns = (4 * MAX_GROUPS + BLOCK - 1) / BLOCK;
    const u32 units = MAX_GROUPS / GROUPS, in_block = BLOCK / THREADS_PER_ROW * outputs;
    Planes planes{quants, high, scales, deltas};
    u32 lane = THREAD % THREADS_PER_ROW, team = THREAD / THREADS_PER_ROW * outputs, pair = BLOCK_Y * used + BLOCK_Z;
    u32 first = BLOCK_X * in_block, stride = blocks * in_block;
    u32 at[turns]; // where the thread's numbers of x begin, eight each
    UNROLL for (u32 t = 0; t < turns; ++t) at[t] = eight_start(t * BLOCK + THREAD);
    Row<IN, turns> row;
    Unit unit[TURNS][ROWS];
    load_codebook<BLOCK>();
    late_grid_dependency_sync();
    u64 matrix = (u64)chosen[pair] * FIRST_ROWS(width); // its first row
    read_row(row, x + BLOCK_Y * inner, norm, at, inner);
    UNROLL for (u32 t = 0; t < TURNS; ++t) read_units(unit[t], planes, matrix, first + team, lane + t * THREADS_PER_ROW, width);
    float factor = weights ? weights[pair] : 1.0f;
    h += (u64)pair * width;
    u32x4 eight[turns];
    finish_row(eight, row, eps, inner, scratch);
    UNROLL for (u32 t = 0; t < turns; ++t) make_digits(eight[t], digits, t * BLOCK + THREAD, at[t] < inner);
    lds_barrier();

    for (u32 turn = 0; first < width; first += stride, turn ^= 1) {
        u32 n = own_output<THREADS_PER_ROW, Activation, ROWS, BLOCK>(first, width);
        FirstAddends more = first_addends(matrix, factor, bias, n, width, activation);
        float sum[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
        UNROLL for (u32 t = 0; t < TURNS; ++t) {
            u32 k = lane + t * THREADS_PER_ROW;
            if (k < units) multiply_unit(unit[t], sum, digits, k);
            if (first + stride < width) read_units(unit[t], planes, matrix, first + stride + team, k, width);
        }
        finish_vector<THREADS_PER_ROW>(sum, partial[turn], n, more, (Activation *)h, width);
    }
}
