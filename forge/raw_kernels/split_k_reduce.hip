// The split-K partials of a product, summed in their order: added to y, stored there, or activation(gate) * up.

#define PARTIALS_AT_ONCE 8 // loads in flight

KERNEL(256) split_k_reduce(
    const float *partials, // (splits, M, N)
    float *y,              // (M, stride) columns from `column` on
    f16 *gated,            // (M, N / 2) activation(gate) * up, or null; then y is not used
    u32 rows,              // M
    u32 outer,             // N
    u32 stride,            // numbers from one row of y to the next
    u32 column,
    u32 accumulate, // 0 or 1: y is added to
    u32 gelu,       // 0 or 1: the activation is GELU, else SiLU
    u32 splits
) {
    grid_dependency_sync();
    u32 outputs = gated ? outer / 2 : outer, i = BLOCK_X * 256 + THREAD, token = i / outputs, n = i % outputs;
    if (token >= rows) return;
    u64 at = (u64)token * outer + n, size = (u64)rows * outer;
    float sum = accumulate ? y[(u64)token * stride + column + n] : 0.0f, up = 0;
    for (u32 s = 0; s < splits; s += PARTIALS_AT_ONCE) {
        float more[PARTIALS_AT_ONCE], more_up[PARTIALS_AT_ONCE];
        UNROLL for (u32 i = 0; i < PARTIALS_AT_ONCE; ++i) {
            more[i] = s + i < splits ? partials[(s + i) * size + at] : 0.0f;
            more_up[i] = gated && s + i < splits ? partials[(s + i) * size + at + outputs] : 0.0f;
        }
        UNROLL for (u32 i = 0; i < PARTIALS_AT_ONCE; ++i) sum += more[i], up += more_up[i];
    }
    if (gated)
        gated[(u64)token * outputs + n] = to_f16(activate(sum, gelu) * up);
    else
        y[(u64)token * stride + column + n] = sum;
}
