// Embeddings of each layer's own: what they are made of, and the gate by which they enter the residual stream.

// A wave takes the numbers of one token in one layer.
KERNEL(256) per_layer_inputs(
    const float *projected, // (groups, size)
    const float *embedded,  // (groups, size)
    const float *weight,    // (size,) of the norm
    float *y,               // (groups, size) (norm of projected + embedded) / sqrt(2)
    u32 groups,             // tokens * layers
    u32 size,
    float eps
) {
    grid_dependency_sync();
    u32 group = BLOCK_X * (256 / WAVE) + THREAD / WAVE;
    bool there = group < groups; // the wave takes part in the shuffles anyway
    const float *from = projected + (u64)group * size;
    float squares = 0;
    for (u32 i = LANE; i < size; i += WAVE) {
        float x = there ? from[i] : 0.0f;
        squares += x * x;
    }
    float scale = rms_scale(fast_divide(wave_sum(squares), (float)size), eps);
    if (!there) return;
    for (u32 i = LANE; i < size; i += WAVE)
        y[(u64)group * size + i] = (from[i] * scale * weight[i] + embedded[(u64)group * size + i]) * 0.70710678118654752f;
}

// A block takes a token.
KERNEL(256) per_layer_gate(
    const float *gate,   // (T, size) products of the normalized stream
    const float *x,      // (T, width) the stream
    const float *inputs, // (T, row_size) of all layers
    f16 *y,              // (T, size) gelu(gate * root mean square of x) * inputs
    u32 size,
    u32 width,           // E
    u32 row_size,        // of inputs
    u32 first,           // number of the layer in a row of inputs
    float eps
) {
    SHARED float of_wave[8]; // in waves of 32
    grid_dependency_sync();
    const float *row = x + (u64)BLOCK_X * width;
    float squares = 0;
    for (u32 i = THREAD; i < width; i += 256) squares += row[i] * row[i];
    squares = wave_sum(squares);
    if (LANE == 0) of_wave[THREAD / WAVE] = squares;
    barrier();
    float total = 0;
    for (u32 w = 0; w < 256 / WAVE; ++w) total += of_wave[w];
    float mean = fast_divide(total, (float)width) + eps, root = mean * fast_rsqrt(mean);
    for (u32 i = THREAD; i < size; i += 256) {
        u64 at = (u64)BLOCK_X * size + i;
        y[at] = to_f16(gelu_tanh(gate[at] * root) * inputs[(u64)BLOCK_X * row_size + first + i]);
    }
}
