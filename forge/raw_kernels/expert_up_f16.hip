// GEMV of a mixture of experts, first product, of float16 matrices: see expert_up_quant.
// Uses: matvec_row, expert_activation, expert_row
//
// A block computes ROWS rows at a time; its threads share the inner dimension, and each holds its vectors of x in registers.
// -D BLOCK=threads; PIECES=vectors of 8 numbers of a row that a thread takes; IN; ROWS, even with a gate; GATED, SILU of
// expert_up_quant.

KERNEL(BLOCK) expert_up_f16(
    const IN *x,          // (M, K)
    const float *norm,    // (K,) weights of the RMS norm of x, or null
    float eps,            // of the norm
    const i32 *chosen,    // (M, U)
    const float *weights, // (M, U) factors of the products, or null
    const f16 *matrix,    // (X * 2F, K), an expert's gates, then its ups; or (X * F, K)
    const float *bias,    // one for each row, or null
    f16 *h,               // (M, U, F)
    u32 inner,            // K, a multiple of 8
    u32 width,            // F
    u32 used,             // U
    u32 activation,       // see expert_activation
    u32 blocks            // of an expert
) {
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], scratch[MAX_WAVES(BLOCK)];
    const u32 outputs = Outputs<Activation, ROWS>::per_team;
    u32 at[PIECES], pair = BLOCK_Y * used + BLOCK_Z;
    UNROLL for (u32 p = 0; p < PIECES; ++p) at[p] = (p * BLOCK + THREAD) * 8;
    Row<IN, PIECES> row;
    u32x4 own[PIECES];
    h += (u64)pair * width;
    late_grid_dependency_sync();
    u64 first_row = (u64)chosen[pair] * FIRST_ROWS(width); // of the expert
    float factor = weights ? weights[pair] : 1.0f;
    read_row(row, x + BLOCK_Y * inner, norm, at, inner);
    finish_row(own, row, eps, inner, scratch);
    for (u32 first = BLOCK_X * outputs, turn = 0; first < width; first += blocks * outputs, turn ^= 1) {
        u32 n = own_output<BLOCK, Activation, ROWS, BLOCK>(first, width);
        FirstAddends more = first_addends(first_row, factor, bias, n, width, activation);
        float sum[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            const f16 *from = matrix + (first_row + team_row<Activation, ROWS>(first, r, width)) * inner;
            sum[r] = 0;
            UNROLL for (u32 p = 0; p < PIECES; ++p) {
                u32x4 w = {};
                if (at[p] < inner) w = load_streaming((const u32x4 *)(from + at[p]));
                UNROLL for (u32 i = 0; i < 8; ++i) sum[r] += unpack(w, i) * unpack(own[p], i);
            }
        }
        finish_vector<BLOCK>(sum, partial[turn], n, more, (Activation *)h, width);
    }
}
