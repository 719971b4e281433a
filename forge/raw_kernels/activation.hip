// Activations of float32 products into float16 inputs of the next product, the soft cap of logits, and a sum.

// Four numbers per thread where rows are multiples of four.
KERNEL(256) act_and_mul(
    const float *gate_up, // (T, 2F) gates, then ups
    f16 *y,               // (T, F) activation(gate) * up
    u32 width,            // F
    u32 gelu              // 0 or 1: the activation is GELU, else SiLU
) {
    grid_dependency_sync();
    const float *gate = gate_up + (u64)BLOCK_Y * 2 * width, *up = gate + width;
    f16 *out = y + (u64)BLOCK_Y * width;
    u32 i = (BLOCK_X * 256 + THREAD) * 4;
    if (width % 4 == 0) {
        if (i >= width) return;
        f32x4 g = load<4>(gate + i), u = load<4>(up + i);
        Vec<f16, 4> r;
        UNROLL for (u32 j = 0; j < 4; ++j) r.v[j] = to_f16(activate(g.v[j], gelu) * u.v[j]);
        store(out + i, r);
    } else {
        for (u32 j = i; j < smaller(i + 4, width); ++j) out[j] = to_f16(activate(gate[j], gelu) * up[j]);
    }
}

KERNEL(256) gelu(
    const float *x, // (count,)
    f16 *y,         // (count,)
    u32 count
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i < count) y[i] = to_f16(gelu_tanh(x[i]));
}

KERNEL(256) soft_cap(
    float *x,  // (count,) logits, in place
    float cap, // logits end within (-cap, cap)
    u32 count
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i < count) x[i] = cap * fast_tanh(fast_divide(x[i], cap));
}

KERNEL(256) add(
    const float *x,     // (count,)
    const float *delta, // (count,)
    float *y,           // (count,)
    u32 count
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i < count) y[i] = x[i] + delta[i];
}
