// The sums of all slices of a product, in their order: added to y, or stored there; or activation(gate) * up.

#define SLICES_AT_ONCE 8 // whose loads are under way together
KERNEL(256) split_k_reduce(const float *parts, float *y, f16 *gated, u32 rows, u32 outer, u32 stride, u32 column, u32 accumulate, u32 gelu, u32 slices) {
    grid_dependency_sync();
    u32 outputs = gated ? outer / 2 : outer, i = BLOCK_X * 256 + THREAD, token = i / outputs, n = i % outputs;
    if (token >= rows) return;
    u64 at = (u64)token * outer + n, size = (u64)rows * outer;
    float sum = accumulate ? y[(u64)token * stride + column + n] : 0.0f, up = 0;
    for (u32 s = 0; s < slices; s += SLICES_AT_ONCE) {
        float more[SLICES_AT_ONCE], more_up[SLICES_AT_ONCE];
        UNROLL for (u32 i = 0; i < SLICES_AT_ONCE; ++i) {
            more[i] = s + i < slices ? parts[(s + i) * size + at] : 0.0f;
            more_up[i] = gated && s + i < slices ? parts[(s + i) * size + at + outputs] : 0.0f;
        }
        UNROLL for (u32 i = 0; i < SLICES_AT_ONCE; ++i) sum += more[i], up += more_up[i];
    }
    if (gated)
        gated[(u64)token * outputs + n] = to_f16((gelu ? gelu_tanh(sum) : silu(sum)) * up);
    else
        y[(u64)token * stride + column + n] = sum;
}
