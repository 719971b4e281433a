// Rows of a table, by index. A block per row.
// -D VECTOR=4 where rows are multiples of 4 numbers, else 1.

KERNEL(512) embed(
    const i32 *ids,   // (T,)
    const f16 *table, // (V, E)
    float *y,         // (T, E) table[ids] * factor
    u32 width,        // E
    float factor
) {
    const f16 *row = table + (u64)ids[BLOCK_X] * width;
    float *out = y + (u64)BLOCK_X * width;
    for (u32 i = THREAD * VECTOR; i < width; i += 512 * VECTOR) {
        Vec<f16, VECTOR> x = load<VECTOR>(row + i);
        Vec<float, VECTOR> r;
        UNROLL for (u32 j = 0; j < VECTOR; ++j) r.v[j] = to_float(x.v[j]) * factor;
        store(out + i, r);
    }
}

KERNEL(256) take_rows(
    const i32 *rows, // (R,)
    const float *x,  // (T, E)
    float *y,        // (R, E) x[rows]
    u32 width        // E
) {
    const float *row = x + (u64)rows[BLOCK_X] * width;
    float *out = y + (u64)BLOCK_X * width;
    for (u32 i = THREAD * VECTOR; i < width; i += 256 * VECTOR) store(out + i, load<VECTOR>(row + i));
}
