// GEMV of a mixture of experts, second product, of float16 matrices: see expert_down_quant.
// Uses: matvec_row, expert_activation, expert_row
//
// -D BLOCK, PIECES, ROWS of expert_up_f16, of the row of all experts' activations; GATED=0 and SILU=1, without a meaning here.

KERNEL(BLOCK) expert_down_f16(
    const f16 *h,         // (M, all, F) of which the first U of each row
    const i32 *chosen,    // (M, all)
    const float *weights, // (M, all) or null: all are 1
    const f16 *matrix,    // (X * N, F)
    const float *bias,    // (X * N,) or null
    float *y,             // (M, N)
    u32 width,            // F, a multiple of 8
    u32 used,             // U
    u32 all,              // experts of a row
    u32 outer,            // N
    u32 accumulate,       // 0 or 1: y is added to
    u32 blocks            // of a row
) {
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], share[MAX_USED];
    SHARED i32 experts[MAX_USED];
    u32 at[PIECES], inner = used * width;
    UNROLL for (u32 p = 0; p < PIECES; ++p) at[p] = (p * BLOCK + THREAD) * 8;
    Row<f16, PIECES> row;
    h += (u64)BLOCK_Y * all * width, y += BLOCK_Y * outer, chosen += BLOCK_Y * all;
    if (weights) weights += BLOCK_Y * all;
    late_grid_dependency_sync(); // the next launch may be of other experts, in blocks
    load_choice(experts, share, chosen, weights, used);
    read_row(row, h, nullptr, at, inner);
    lds_barrier();
    for (u32 first = BLOCK_X * ROWS, turn = 0; first < outer; first += blocks * ROWS, turn ^= 1) {
        u32 n = own_output<BLOCK, float, ROWS, BLOCK>(first, outer);
        Addends more = second_addends(experts, share, bias, y, n, outer, used, accumulate);
        float sum[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
        UNROLL for (u32 p = 0; p < PIECES; ++p) {
            u32 place = at[p] < inner ? at[p] / width : 0, k = at[p] - place * width;
            UNROLL for (u32 r = 0; r < ROWS; ++r) {
                u64 from = ((u64)experts[place] * outer + team_row<float, ROWS>(first, r, outer)) * width;
                u32x4 w = {};
                if (at[p] < inner) w = load_streaming((const u32x4 *)(matrix + from + k));
                float part = 0;
                UNROLL for (u32 i = 0; i < 8; ++i) part += unpack(w, i) * unpack(row.x[p], i);
                sum[r] += share[place] * part;
            }
        }
        finish_vector<BLOCK>(sum, partial[turn], n, more, y, outer);
    }
}
