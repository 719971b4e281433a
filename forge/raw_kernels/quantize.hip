// Weights to ggml's blocks: formats/quantize.py and quantize_k.py, to the same bits.
// Uses: quantize_lines, quantize_formats
//
// -D FORMAT=ggml's number of the blocks' type, -D STORED=0 (float32), 1 (float16) or 30 (bfloat16).

#define BLOCK 128
KERNEL(BLOCK) quantize(
    const u8 *source, // the weights, groups one behind the other
    u8 *blocks,
    u32 groups
) {
    // A thread has a group: a block of 32 weights, or a part of one of 256. Blocks are put together in LDS.
    SHARED u32 staged[BLOCK / PER_BLOCK * BLOCK_BYTES / 4];
    u8 *const out = (u8 *)staged + THREAD / PER_BLOCK * BLOCK_BYTES;
    u32 first = BLOCK_X * BLOCK, group = first + THREAD;
    float x[GROUP] = {};
    if (group < groups) read_weights(source, group, x);
    write_block(x, out);
    lds_barrier();
    u32 bytes = smaller(groups - first, (u32)BLOCK) / PER_BLOCK * BLOCK_BYTES;
    u8 *to = blocks + (u64)first / PER_BLOCK * BLOCK_BYTES;
    for (u32 i = THREAD; i < bytes / 4; i += BLOCK) ((u32 *)to)[i] = staged[i];
    for (u32 i = bytes / 4 * 4 + THREAD; i < bytes; i += BLOCK) to[i] = ((const u8 *)staged)[i];
}
