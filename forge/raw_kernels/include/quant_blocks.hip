// Matrices in ggml's block types, as planes: quants, high bits, group scales (`scales`) and block scales (`deltas`) of all blocks lie
// together, plane by plane. ops/quant.py splits the blocks, whose layouts are those of ggml-common.h.
//
// A unit is what a thread reads at once: 32 bytes of quants, or 16 bytes for types of 32 weights a block. It holds GROUPS groups of 32
// weights. A group has one scale and one offset, or two, one for each of its halves (HALVES). weight = scale * (code - ZERO) - offset.
// -D FORMAT=ggml's number of the type.

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
#define IQ4_NL 20
#define IQ4_XS 23

#define IS_K (FORMAT == Q2_K || FORMAT == Q3_K || FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K || FORMAT == IQ4_XS)
#define TWO_BITS (FORMAT == Q2_K || FORMAT == Q3_K)
#define HALF_BY_HALF (FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == IQ4_NL || FORMAT == IQ4_XS)
#define SIX_BIT_SCALES (FORMAT == Q4_K || FORMAT == Q5_K) // 16 bytes, the block's scale and minimum included
#define HAS_OFFSET (FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q2_K || FORMAT == Q4_K || FORMAT == Q5_K)
#define NONLINEAR (FORMAT == IQ4_NL || FORMAT == IQ4_XS)
#define ZERO (FORMAT == Q4_0 ? 8 : FORMAT == Q5_0 ? 16 : FORMAT == Q3_K ? 4 : FORMAT == Q6_K ? 32 : 0)
#define GROUPS (TWO_BITS ? 4 : IS_K ? 2 : 1)
#define HALVES (TWO_BITS || FORMAT == Q6_K ? 2 : 1)
#define UNITS_PER_BLOCK (TWO_BITS ? 2 : IS_K ? 4 : 1)
#define UNIT_WEIGHTS (32 * GROUPS)
#define PIECES (IS_K || FORMAT == Q8_0 ? 2 : 1) // of 16 bytes

struct Planes {
    const u8 *quants, *high, *scales, *deltas;
};

// A unit in registers, as it lies in memory.
struct Unit {
    u32x4 quants[PIECES];
    u32x4 high[2]; // bits: of the unit, or of its block
    u32x4 scales;  // of its block
    u32 delta;     // float16 scale of the block; above it the minimum
};

DEVICE Unit read_unit(const Planes &p, u64 unit) {
    Unit u;
    u64 block = unit / UNITS_PER_BLOCK;
    UNROLL for (u32 i = 0; i < PIECES; ++i) u.quants[i] = load_streaming((const u32x4 *)p.quants + unit * PIECES + i);
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

// The w-th four of a group's 32 codes, signed, one in each byte. `index` is the unit's place in its block.
DEVICE u32 four_codes(const Unit &u, u32 index, u32 group, u32 w) {
#if FORMAT == Q8_0
    return u.quants[w / 4].v[w % 4];
#elif TWO_BITS
    u32 low = u.quants[w / 4].v[w % 4] >> 2 * group & 0x03030303u;
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
#elif NONLINEAR // -127 -104 -83 -65, -49 -35 -22 -10, 1 13 25 38, 53 69 89 113
    u32 place = low & 0x07070707u, upper = (low >> 3 & 0x01010101u) * 255;
    return byte_perm(0xf6eaddcfu, 0xbfad9881u, place) & ~upper | byte_perm(0x71594535u, 0x26190d01u, place) & upper;
#elif FORMAT != Q8_0
    return low;
#endif
}

// Scale and offset of a group, or of one of its halves. The offset includes the format's ZERO: weight = scale * code - offset.
DEVICE void group_scale(const Unit &u, u32 index, u32 group, u32 half, float &scale, float &offset) {
    scale = to_float(f16{(u16)u.delta});
    float minimum = to_float(f16{(u16)(u.delta >> 16)});
    offset = 0;
#if FORMAT == Q4_1 || FORMAT == Q5_1
    offset = -minimum;
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
#endif
    offset += scale * (float)ZERO;
}
