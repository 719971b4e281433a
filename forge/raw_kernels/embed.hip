// Rows of a table, by index. A block per row.
// -D VECTOR=4 where rows are multiples of 4 numbers, else 1.

struct alignas(2 * VECTOR) Halves {
    f16 v[VECTOR];
};
struct alignas(4 * VECTOR) Floats {
    float v[VECTOR];
};

KERNEL(512) embed(const i32 *ids, const f16 *table, float *y, u32 width, float factor) {
    const f16 *row = table + (u64)ids[BLOCK_X] * width;
    float *out = y + (u64)BLOCK_X * width;
    for (u32 i = THREAD * VECTOR; i < width; i += 512 * VECTOR) {
        Halves read = *(const Halves *)(row + i);
        Floats made;
        UNROLL for (u32 j = 0; j < VECTOR; ++j) made.v[j] = to_float(read.v[j]) * factor;
        *(Floats *)(out + i) = made;
    }
}

KERNEL(256) take_rows(const i32 *rows, const float *x, float *y, u32 width) {
    const float *row = x + (u64)rows[BLOCK_X] * width;
    float *out = y + (u64)BLOCK_X * width;
    for (u32 i = THREAD * VECTOR; i < width; i += 256 * VECTOR) *(Floats *)(out + i) = *(const Floats *)(row + i);
}
