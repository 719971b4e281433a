// Matrices in ggml's block types, as planes: quants, high bits, group scales (`scales`) and block scales (`deltas`) of all blocks lie
// together, plane by plane. ops/quant.py splits the blocks, whose layouts are those of ggml-common.h.
//
// A unit is what a thread reads at once: 32 bytes of quants, 16 bytes for types of up to 64 weights a block, 8 of Q1_0's, and 16 or 8
// for types with a codebook, where they are numbers of its entries. It holds GROUPS groups of 32 weights. A group has one scale and one offset, or two, one for each of its halves (HALVES). weight = scale * (code - ZERO) - offset.
// -D FORMAT=ggml's number of the type, or forge's from 1000 on.

#define F16 1
#define Q4_0 2
#define Q4_1 3
#define Q5_0 6
#define Q5_1 7
#define Q8_0 8
#define Q2_K 10
#define Q3_K 11
#define Q4_K 12
#define Q5_K 13
#define Q6_K 14
#define IQ2_XXS 16
#define IQ2_XS 17
#define IQ3_XXS 18
#define IQ1_S 19
#define IQ4_NL 20
#define IQ3_S 21
#define IQ2_S 22
#define IQ4_XS 23
#define IQ1_M 29
#define MXFP4 39
#define Q1_0 41
#define Q2_0 42
#define Q4_G32 1000
#define Q4_G128 1001

#define IS_K (FORMAT == Q2_K || FORMAT == Q3_K || FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K || FORMAT == IQ4_XS)
#define IS_IQ1 (FORMAT == IQ1_S || FORMAT == IQ1_M)
#define IS_IQ2 (FORMAT == IQ2_XXS || FORMAT == IQ2_XS || FORMAT == IQ2_S)
#define IS_IQ3 (FORMAT == IQ3_XXS || FORMAT == IQ3_S)
#define HAS_CODEBOOK (IS_IQ1 || IS_IQ2 || IS_IQ3)
#define TWO_BITS (FORMAT == Q2_K || FORMAT == Q3_K)
#define HAS_ZEROS (FORMAT == Q4_G32 || FORMAT == Q4_G128) // of GPTQ and AWQ: a code of zero for each block
#define HALF_BY_HALF (FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == IQ4_NL || FORMAT == IQ4_XS || FORMAT == MXFP4 || HAS_ZEROS)
#define SIX_BIT_SCALES (FORMAT == Q4_K || FORMAT == Q5_K) // 16 bytes, the block's scale and minimum included
#define HAS_OFFSET (FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q2_K || FORMAT == Q4_K || FORMAT == Q5_K || HAS_ZEROS)
#define NONLINEAR (FORMAT == IQ4_NL || FORMAT == IQ4_XS || FORMAT == MXFP4)
#define IS_SIGNED (FORMAT == Q8_0 || NONLINEAR || IS_IQ2 || IS_IQ3)
#define ZERO (FORMAT == Q4_0 ? 8 : FORMAT == Q5_0 ? 16 : FORMAT == Q3_K ? 4 : FORMAT == Q6_K ? 32 : IS_IQ1 ? 9 : FORMAT == Q1_0 || FORMAT == Q2_0 ? 1 : 0)
#define GROUPS (TWO_BITS ? 4 : IS_K || HAS_CODEBOOK || FORMAT == Q1_0 || FORMAT == Q2_0 ? 2 : 1)
#define HALVES (TWO_BITS || FORMAT == Q6_K || FORMAT == IQ2_XS || FORMAT == IQ2_S || FORMAT == IQ1_M ? 2 : 1)
#define UNITS_PER_BLOCK (TWO_BITS || FORMAT == Q1_0 ? 2 : IS_K || HAS_CODEBOOK || FORMAT == Q4_G128 ? 4 : 1)
#define UNIT_WEIGHTS (32 * GROUPS)
#define PIECES (IS_K || FORMAT == Q8_0 ? 2 : 1) // of 16 bytes

struct Planes {
    const u8 *quants, *high, *scales, *deltas;
};

// A unit in registers, as it lies in memory.
struct Unit {
    u32x4 quants[PIECES];
    u32x4 high[2]; // bits: of the unit, or of its block; signs of what a codebook has
    u32x4 scales;  // of its block
    u32 delta;     // float16 scale of the block; above it the minimum, or the code of zero
};

DEVICE Unit read_unit(const Planes &p, u64 unit) {
    Unit u;
    u64 block = unit / UNITS_PER_BLOCK;
#if IS_IQ1 || FORMAT == IQ2_S || FORMAT == Q1_0
    u32x2 entries = ((const u32x2 *)p.quants)[unit];
    UNROLL for (u32 i = 0; i < 2; ++i) u.quants[0].v[i] = entries.v[i];
#else
    UNROLL for (u32 i = 0; i < PIECES; ++i) u.quants[i] = load_streaming((const u32x4 *)p.quants + unit * PIECES + i);
#endif
#if IS_IQ1
    u.high[0].v[0] = ((const u32 *)p.high)[unit];
#elif FORMAT == IQ2_S || IS_IQ3
    u32x2 signs = ((const u32x2 *)p.high)[FORMAT == IQ3_S ? unit + block + 1 : unit];
    UNROLL for (u32 i = 0; i < 2; ++i) u.high[0].v[i] = signs.v[i];
#endif
#if FORMAT == IQ2_S // high bits of its entries, then scales
    UNROLL for (u32 i = 0; i < 2; ++i) u.scales.v[i] = ((const u16 *)p.scales)[unit + block * 4 + i * 4];
#elif FORMAT == IQ3_S
    u.high[0].v[2] = ((const u16 *)p.high)[unit + block * 16];
    u.scales.v[0] = p.scales[unit];
#elif FORMAT == IQ2_XS
    u.scales.v[0] = ((const u16 *)p.scales)[unit];
#elif FORMAT == IQ1_M
    u32x2 scales = ((const u32x2 *)p.scales)[block];
    UNROLL for (u32 i = 0; i < 2; ++i) u.scales.v[i] = scales.v[i];
#endif
#if FORMAT == Q5_0 || FORMAT == Q5_1
    u.high[0].v[0] = ((const u32 *)p.high)[block];
#elif FORMAT == Q5_K || FORMAT == Q3_K
    UNROLL for (u32 i = 0; i < 2; ++i) u.high[i] = ((const u32x4 *)p.high)[block * 2 + i];
#elif FORMAT == Q6_K
    UNROLL for (u32 i = 0; i < 2; ++i) u.high[i] = ((const u32x4 *)p.high)[unit / 2 * 2 + i];
#endif
#if SIX_BIT_SCALES
    u.scales = ((const u32x4 *)p.scales)[block];
    u.delta = u.scales.v[0];
#elif HAS_OFFSET
    u.delta = ((const u32 *)p.deltas)[block];
#elif FORMAT == MXFP4
    u.delta = p.deltas[block];
#elif FORMAT == IQ1_M // four bits of it above the scales of each unit
    u.delta = (scales.v[0] >> 12 & 0xf) | (scales.v[0] >> 24 & 0xf0) | (scales.v[1] >> 4 & 0xf00) | (scales.v[1] >> 16 & 0xf000);
#else
    u.delta = ((const u16 *)p.deltas)[block];
#endif
#if FORMAT == Q2_K || FORMAT == Q6_K
    u.scales = ((const u32x4 *)p.scales)[block];
#elif FORMAT == Q3_K
    UNROLL for (u32 i = 0; i < 3; ++i) u.scales.v[i] = ((const u32 *)p.scales)[block * 3 + i];
#elif FORMAT == IQ4_XS
    UNROLL for (u32 i = 0; i < 3; ++i) u.scales.v[i] = ((const u16 *)p.scales)[block * 3 + i];
#endif
    return u;
}

// Where in a row a group of the k-th unit begins.
DEVICE u32 group_start(u32 k, u32 group) {
#if FORMAT == Q6_K
    return k / 2 * 128 + k % 2 * 32 + group * 64;
#else
    return k * UNIT_WEIGHTS + group * 32;
#endif
}

#if HAS_CODEBOOK
DEVICE u32 codebook(u32 entry);
// Eight bits apart: bit i of the first four at the begin of byte i, of the last four in its middle. For this order they are multiplied.
DEVICE u32 spread_bits(u32 eight) {
    u32 seven = eight & 127; // of which no two meet
    return seven * 0x00204081u & 0x11111111u | eight << 21 & 0x10000000u;
}
// The same of 7 bits and one that makes the number of ones even.
DEVICE u32 spread_even(u32 seven) { return seven * 0x00204081u & 0x11111111u | popcount(seven) << 28 & 0x10000000u; }

// The w-th four codes of a group from the codebook, in which an entry's byte has two weights. Codes of IQ1 are 8 times the weight, and 1 more or less.
DEVICE u32 codebook_codes(const Unit &u, u32 group, u32 w) {
    u32 l = w / 2; // of the group's four eights
    bool last = w % 2;
#if IS_IQ1
    u32 entry = (group ? u.quants[0].v[1] : u.quants[0].v[0]) >> 8 * l & 255;
#if FORMAT == IQ1_S
    u32 high = u.high[0].v[0] >> 16 * group;
    entry |= (high >> 3 * l & 7) << 8;
    u32 more = high & 0x8000 ? 0 : 0x02020202u;
#else
    u32 high = u.high[0].v[0] >> 16 * group >> 4 * l;
    entry |= high << 8 & 0x700;
    u32 more = high & 8 ? 0 : 0x02020202u;
#endif
    u32 eight = codebook(entry);
    return (last ? eight >> 2 : eight) & 0x18181818u | more;
#else
#if FORMAT == IQ2_XXS
    u32 rest = u.quants[0].v[2 * group + 1];
    u32 entry = u.quants[0].v[2 * group] >> 8 * l & 255, negative = spread_even(rest >> 7 * l & 127);
#elif FORMAT == IQ2_XS
    u32 both = u.quants[0].v[2 * group + l / 2] >> 16 * (l % 2);
    u32 entry = both & 511, negative = spread_even(both >> 9 & 127);
#elif FORMAT == IQ2_S
    u32 entry = u.quants[0].v[group] >> 8 * l & 255, bits = u.scales.v[0] >> (8 * group + 2 * l) & 3;
    entry |= bits << 8;
    u32 negative = spread_bits(u.high[0].v[group] >> 8 * l & 255);
#elif FORMAT == IQ3_XXS
    u32 rest = u.high[0].v[group];
    u32 entry = u.quants[0].v[2 * group + w / 4] >> 8 * (w % 4) & 255, negative = spread_even(rest >> 7 * l & 127);
#else
    u32 entry = u.quants[0].v[2 * group + w / 4] >> 8 * (w % 4) & 255;
    entry |= (u.high[0].v[2] >> (8 * group + w) & 1) << 8;
    u32 negative = spread_bits(u.high[0].v[group] >> 8 * l & 255);
#endif
#if IS_IQ2 // 8 25 43, and the same below zero
    return pick_8(u32x2{{0x002b1908u, 0x00d5e7f8u}}, codebook(entry) | negative << 2, last);
#else
    negative = (last ? negative >> 4 : negative) & 0x01010101u;
    return (codebook(entry) ^ negative * 255) + negative; // no byte is 0, so none is carried
#endif
#endif
}
#endif

#if FORMAT == MXFP4 // 0 1 2 3, 4 6 8 12, and the same below zero: E2M1 doubled
#define NONLINEAR_CODES (u32x4{{0x03020100u, 0x0c080604u, 0xfdfeff00u, 0xf4f8fafcu}})
#elif NONLINEAR // -127 -104 -83 -65, -49 -35 -22 -10, 1 13 25 38, 53 69 89 113
#define NONLINEAR_CODES (u32x4{{0xbfad9881u, 0xf6eaddcfu, 0x26190d01u, 0x71594535u}})
#endif

// The w-th four of a group's 32 codes, signed, one in each byte. `index` is the unit's place in its block.
DEVICE u32 four_codes(const Unit &u, u32 index, u32 group, u32 w) {
#if HAS_CODEBOOK
    return codebook_codes(u, group, w);
#elif FORMAT == Q1_0 // 0 or 2
    return ((group ? u.quants[0].v[1] : u.quants[0].v[0]) >> 4 * w & 15) * 0x00408102u & 0x02020202u;
#elif FORMAT == Q2_0 // of neighbours, in a byte
    u32 byte = (w / 4 ? group ? u.quants[0].v[3] : u.quants[0].v[1] : group ? u.quants[0].v[2] : u.quants[0].v[0]) >> 8 * (w % 4) & 255;
    byte |= byte << 12;
    return (byte | byte << 6) & 0x03030303u;
#elif FORMAT == Q8_0
    return u.quants[w / 4].v[w % 4];
#elif TWO_BITS
    u32 low = u.quants[w / 4].v[w % 4] >> 2 * group & 0x03030303u;
#elif NONLINEAR
    return pick_16(NONLINEAR_CODES, (group ? u.quants[PIECES - 1] : u.quants[0]).v[w % 4], w / 4);
#elif HALF_BY_HALF // 16 bytes for a group: the first 16 codes in their low halves
    u32 low = (group ? u.quants[PIECES - 1] : u.quants[0]).v[w % 4] >> w / 4 * 4 & 0x0f0f0f0fu;
#else // 32 bytes for two groups
    u32 low = u.quants[w / 4].v[w % 4] >> 4 * group & 0x0f0f0f0fu;
#endif
#if FORMAT == Q3_K
    return low | (u.high[w / 4].v[w % 4] >> (index * 4 + group) & 0x01010101u) << 2;
#elif FORMAT == Q5_0 || FORMAT == Q5_1 // four neighbouring bits, spread over the bytes
    u32 bits = u.high[0].v[0] >> 4 * w & 15;
    return low | (bits * 0x00204081u & 0x01010101u) << 4;
#elif FORMAT == Q5_K
    return low | (u.high[w / 4].v[w % 4] >> (index * 2 + group) & 0x01010101u) << 4;
#elif FORMAT == Q6_K
    return low | (u.high[w / 4].v[w % 4] >> (index % 2 * 2 + 4 * group) & 0x03030303u) << 4;
#elif FORMAT != Q8_0 && FORMAT != Q1_0 && FORMAT != Q2_0 && !HAS_CODEBOOK && !NONLINEAR
    return low;
#endif
}

// Half of a scale that is a byte, the exponent of a float: codes of E2M1 are doubled. What is subnormal counts as zero.
DEVICE float half_of_power(u32 exponent) { return as_float((exponent ? exponent - 1 : 0) << 23); }

// Scale and offset of a group, or of one of its halves. The offset includes the format's ZERO: weight = scale * code - offset.
DEVICE void group_scale(const Unit &u, u32 index, u32 group, u32 half, float &scale, float &offset) {
#if FORMAT == MXFP4
    scale = half_of_power(u.delta);
#else
    scale = to_float(f16{(u16)u.delta});
#endif
    float minimum = to_float(f16{(u16)(u.delta >> 16)});
    offset = 0;
#if FORMAT == Q4_1 || FORMAT == Q5_1
    offset = -minimum;
#elif HAS_ZEROS
    offset = scale * (float)(u.delta >> 16);
#elif FORMAT == Q2_K
    u32 first = u.scales.v[0], second = u.scales.v[1], third = u.scales.v[2], last = u.scales.v[3];
    u32 both = (group / 2 ? index ? last : second : index ? third : first) >> 8 * (group % 2 * 2 + half);
    scale *= (float)(both & 15);
    offset = minimum * (float)(both >> 4 & 15);
#elif FORMAT == Q3_K
    u32 byte = group % 2 * 2 + half;
    u32 low = (group / 2 ? u.scales.v[1] : u.scales.v[0]) >> (8 * byte + 4 * index) & 15;
    u32 high = u.scales.v[2] >> (8 * byte + 4 * index + group / 2 * 2) & 3;
    scale *= (float)(i32)(low | high << 4) - 32.0f;
#elif SIX_BIT_SCALES // of both groups, a byte each; the compiler computes once what does not depend on `group`
    u32 shift = index % 2 * 16;
    u32 first = u.scales.v[1] >> shift, second = u.scales.v[2] >> shift, rest = u.scales.v[3] >> shift;
    bool early = index < 2;
    u32 scales = early ? first & 0x3f3f : (rest & 0x0f0f) | (first >> 2 & 0x3030);
    u32 minima = early ? second & 0x3f3f : (rest >> 4 & 0x0f0f) | (second >> 2 & 0x3030);
    scale *= (float)(scales >> 8 * group & 255);
    offset = minimum * (float)(minima >> 8 * group & 255);
#elif FORMAT == Q6_K
    u32 first = u.scales.v[0], second = u.scales.v[1], third = u.scales.v[2], last = u.scales.v[3];
    scale *= (float)(i8)((group ? index / 2 ? last : second : index / 2 ? third : first) >> 8 * (index % 2 * 2 + half));
#elif FORMAT == IQ4_XS
    u32 i = index * 2 + group;
    u32 first = u.scales.v[1], second = u.scales.v[2]; // not indexed, because newer compilers then put the array in memory
    u32 low = (index < 2 ? first : second) >> 4 * (i % 4) & 15;
    u32 high = u.scales.v[0] >> 2 * i & 3;
    scale *= (float)(i32)(low | high << 4) - 32.0f;
#elif FORMAT == IQ2_XXS
    scale *= (0.5f + (float)(u.quants[0].v[2 * group + 1] >> 28)) * 0.25f;
#elif FORMAT == IQ3_XXS
    scale *= (0.5f + (float)(u.high[0].v[group] >> 28)) * 0.5f;
#elif FORMAT == IQ2_XS || FORMAT == IQ2_S
    u32 both = (FORMAT == IQ2_S ? u.scales.v[1] : u.scales.v[0]) >> (8 * group + 4 * half) & 15;
    scale *= (0.5f + (float)both) * 0.25f;
#elif FORMAT == IQ3_S
    scale *= (float)(u.scales.v[0] >> 4 * group << 1 & 30 | 1);
#elif FORMAT == IQ1_S
    scale *= (float)(u.high[0].v[0] >> (16 * group + 11) & 14 | 1) * 0.125f;
#elif FORMAT == IQ1_M
    u32 four = (index / 2 ? u.scales.v[1] : u.scales.v[0]) >> (16 * (index % 2) + 6 * group + 3 * half);
    scale *= (float)(four << 1 & 14 | 1) * 0.125f;
#endif
    offset += scale * (float)ZERO;
}
