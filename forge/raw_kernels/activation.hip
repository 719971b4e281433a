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

// The error function by Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at most.
KERNEL(256) gelu_erf(
    const float *x, // (count,)
    f16 *y,         // (count,)
    u32 count
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i >= count) return;
    float z = larger(x[i], -x[i]) * 0.70710678f, t = fast_divide(1.0f, 1.0f + 0.3275911f * z);
    float rest = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
    float half = 0.5f * x[i] * rest * fast_exp(-z * z);
    y[i] = to_f16(x[i] < 0.0f ? half : x[i] - half);
}

KERNEL(256) xielu(
    const float *x, // (count,)
    f16 *y,         // (count,)
    float positive, // factor of x**2 where x > 0
    float negative, // factor of exp(x) - 1 - x elsewhere
    float beta,     // factor of x
    float eps,      // exponents are at most this
    u32 count
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i >= count) return;
    float z = x[i], below = fast_exp(smaller(z, eps)) - 1.0f - z;
    y[i] = to_f16((z > 0.0f ? positive * z * z : negative * below) + beta * z);
}

// The residual stream as the operand of a product, after split-K partials or another sum are added to it.
KERNEL(256) as_operand(
    float *x,            // (count,) in place
    const float *addend, // (partials, count) or null
    f16 *y,              // (count,)
    u32 count,
    u32 partials
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i >= count) return;
    float sum = x[i];
    for (u32 s = 0; s < partials; ++s) sum += addend[(u64)s * count + i];
    if (partials) x[i] = sum;
    y[i] = to_f16(sum);
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
    const float *x,      // (count,)
    const float *addend, // (partials, count)
    float *y,            // (count,)
    u32 count,
    u32 partials
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i >= count) return;
    float sum = x[i];
    for (u32 s = 0; s < partials; ++s) sum += addend[(u64)s * count + i];
    y[i] = sum;
}

KERNEL(256) add_and_scale(
    float *x,            // (count,) in place
    const float *addend, // (count,) or null
    float factor,        // of the sum
    u32 count
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i < count) x[i] = (x[i] + (addend ? addend[i] : 0.0f)) * factor;
}

KERNEL(256) sigmoid_gate(
    const f16 *x,         // (T, width)
    const float *product, // (partials, T, row_size) split-K partials; gates from `first` on
    f16 *y,               // (T, width) x * sigmoid(gate)
    u32 width,
    u32 shared_by,        // numbers of x that have one gate
    u32 first,
    u32 row_size,
    u32 rows,             // T
    u32 partials
) {
    grid_dependency_sync();
    u32 i = BLOCK_X * 256 + THREAD;
    if (i >= width) return;
    const float *gate = product + (u64)BLOCK_Y * row_size + first + i / shared_by;
    float sum = 0;
    for (u32 s = 0; s < partials; ++s) sum += gate[(u64)s * rows * row_size];
    u64 at = (u64)BLOCK_Y * width + i;
    y[at] = to_f16(fast_divide(to_float(x[at]), 1.0f + fast_exp(-sum)));
}
