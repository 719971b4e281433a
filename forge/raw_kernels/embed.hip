// Rows of a table, by index. A block per row.

KERNEL(256) embed(const i32 *ids, const f16 *table, float *y, u32 width, float factor) {
    const f16 *row = table + (u64)ids[BLOCK_X] * width;
    float *out = y + (u64)BLOCK_X * width;
    for (u32 i = THREAD; i < width; i += 256) out[i] = to_float(row[i]) * factor;
}

KERNEL(256) take_rows(const i32 *rows, const float *x, float *y, u32 width) {
    const float *row = x + (u64)rows[BLOCK_X] * width;
    float *out = y + (u64)BLOCK_X * width;
    for (u32 i = THREAD; i < width; i += 256) out[i] = row[i];
}
