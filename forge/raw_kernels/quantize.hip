// Weights to ggml's blocks, or to their planes: formats/quantize.py and quantize_k.py, to the same bits.
// Uses: quantize_lines, quantize_formats
//
// -D FORMAT=ggml's number of the blocks' type, -D STORED=0 (float32), 1 (float16) or 30 (bfloat16).

#define BLOCK 128
SHARED u32 staged[BLOCK / PER_BLOCK * BLOCK_BYTES / 4];

// A thread has a group: a block of 32 weights, or a part of one of 256. Blocks are put together in LDS.
DEVICE void stage_blocks(const u8 *source, u32 groups) {
    u32 group = BLOCK_X * BLOCK + THREAD;
    float x[GROUP] = {};
    if (group < groups) read_weights(source, group, x);
    write_block(x, (u8 *)staged + THREAD / PER_BLOCK * BLOCK_BYTES);
    lds_barrier();
}

KERNEL(BLOCK) quantize(
    const u8 *source, // the weights, groups one behind the other
    u8 *blocks,
    u32 groups
) {
    stage_blocks(source, groups);
    u32 first = BLOCK_X * BLOCK, bytes = smaller(groups - first, (u32)BLOCK) / PER_BLOCK * BLOCK_BYTES;
    u8 *to = blocks + (u64)first / PER_BLOCK * BLOCK_BYTES;
    for (u32 i = THREAD; i < bytes / 4; i += BLOCK) ((u32 *)to)[i] = staged[i];
    for (u32 i = bytes / 4 * 4 + THREAD; i < bytes; i += BLOCK) to[i] = ((const u8 *)staged)[i];
}

// Bytes start to stop of all staged blocks: a plane's, from the block `first` on.
DEVICE void store_plane(u8 *plane, u32 first, u32 count, u32 start, u32 stop) {
    u32 width = stop - start, bytes = count * width;
    u8 *to = plane + (u64)first * width;
    bool in_words = (u64)to % 4 == 0;
    for (u32 i = 4 * THREAD; i < bytes; i += 4 * BLOCK) {
        u32 word = 0, length = smaller(bytes - i, 4u);
        for (u32 j = 0; j < length; ++j)
            word |= (u32)((const u8 *)staged)[(i + j) / width * BLOCK_BYTES + start + (i + j) % width] << 8 * j;
        if (in_words && length == 4) *(u32 *)(to + i) = word;
        else
            for (u32 j = 0; j < length; ++j) to[i + j] = (u8)(word >> 8 * j);
    }
}

KERNEL(BLOCK) quantize_planes(
    const u8 *source, // the weights, groups one behind the other
    u8 *quants,       // planes, see quant_blocks.hip
    u8 *high,
    u8 *scales,
    u8 *deltas,
    i32 *refused, // (1,) becomes 1 where weights have no block
    u32 groups
) {
    stage_blocks(source, groups);
    u32 start = BLOCK_X * BLOCK, first = start / PER_BLOCK, count = smaller(groups - start, (u32)BLOCK) / PER_BLOCK;
    store_plane(quants, first, count, QUANTS, QUANTS + QUANT_BYTES);
    if (HIGH_BYTES) store_plane(high, first, count, HIGH, HIGH + HIGH_BYTES);
    if (SCALE_BYTES) store_plane(scales, first, count, SCALES, SCALES + SCALE_BYTES);
    if (DELTA_BYTES) store_plane(deltas, first, count, DELTAS, DELTAS + DELTA_BYTES);
    if (THREAD < count && !is_sound((const u8 *)staged + THREAD * BLOCK_BYTES)) *refused = 1;
}
