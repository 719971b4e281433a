// Matrices in ggml's block types as floats.
// Uses: quant_blocks, codebooks
//
// -D FORMAT=ggml's number of the type.

DEVICE void read_group(const Unit &u, u32 index, u32 group, float (&weight)[32]) {
    float scale[HALVES], offset[HALVES];
    UNROLL for (u32 h = 0; h < HALVES; ++h) group_scale(u, index, group, h, scale[h], offset[h]);
    UNROLL for (u32 i = 0; i < 32; ++i)
        weight[i] = scale[i / (32 / HALVES)] * (float)(i8)(four_codes(u, index, group, i / 4) >> 8 * (i % 4)) - offset[i / (32 / HALVES)];
}

// Some rows of a matrix as float16, for a product through BLAS. A thread's unit goes through LDS, so that neighbouring threads
// store neighbouring vectors of 8 numbers.
KERNEL(128) dequantize(
    const u8 *quants, // planes of the whole matrix, see quant_blocks.hip
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    f16 *y,    // (outer, inner)
    u32 first, // row of the matrix
    u32 outer, // rows
    u32 inner
) {
    SHARED f16x8 staged[128][4 * GROUPS + 1]; // an odd number of vectors: neighbouring rows are in other banks
    load_codebook<128>();
    if (HAS_CODEBOOK) lds_barrier();
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS, start = BLOCK_X * 128, count = outer * units;
    if (start + THREAD < count) {
        Unit unit = read_unit(planes, (u64)first * units + start + THREAD);
        UNROLL for (u32 g = 0; g < GROUPS; ++g) {
            float weight[32];
            read_group(unit, (start + THREAD) % units % UNITS_PER_BLOCK, g, weight);
            UNROLL for (u32 i = 0; i < 32; ++i) staged[THREAD][g * 4 + i / 8].v[i % 8] = to_f16(weight[i]);
        }
    }
    barrier();
    for (u32 i = THREAD; i < 128 * 4 * GROUPS; i += 128) {
        u32 unit = start + i / (4 * GROUPS), piece = i % (4 * GROUPS);
        if (unit >= count) break;
        u64 at = (u64)(unit / units) * inner + group_start(unit % units, piece / 4) + piece % 4 * 8;
        store(y + at, staged[i / (4 * GROUPS)][piece]);
    }
}

// Rows of a table by id, times a factor. A block per token.
KERNEL(64) quant_embed(
    const i32 *ids,   // (T,)
    const u8 *quants, // planes of the table (V, inner), see quant_blocks.hip
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    float *y, // (T, inner)
    u32 inner,
    float factor
) {
    load_codebook<64>();
    if (HAS_CODEBOOK) lds_barrier();
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS;
    float *row = y + (u64)BLOCK_X * inner;
    for (u32 k = THREAD; k < units; k += 64) {
        Unit unit = read_unit(planes, (u64)ids[BLOCK_X] * units + k);
        UNROLL for (u32 g = 0; g < GROUPS; ++g) {
            float weight[32];
            read_group(unit, k % UNITS_PER_BLOCK, g, weight);
            UNROLL for (u32 j = 0; j < 32; ++j) row[group_start(k, g) + j] = weight[j] * factor;
        }
    }
}
