// Matrices in ggml's block types, as planes: the quants, their high bits, group scales and block scales of all blocks
// each lie together. Layouts within a block are those of ggml-common.h; quant.py splits the blocks.
//
// The common unit is 16 bytes of quants: GROUPS groups of 16 weights, each with one scale and one offset
// (weight = scale * code - offset). A thread reads a unit at once, and neighbouring threads neighbouring units.
// -D FORMAT=ggml's number of the type; MOST, ROWS, BLOCK as in linear.hip.

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
#define HAS_OFFSET (FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q2_K || FORMAT == Q4_K || FORMAT == Q5_K)
#define NONLINEAR (FORMAT == IQ4_NL || FORMAT == IQ4_XS)
#define GROUPS (TWO_BITS ? 4 : 2)
#if MOST > 8 // many sums already: the groups take turns with the registers that are left
#define GROUP_LOOP ROLLED
#else
#define GROUP_LOOP UNROLL
#endif
#define UNITS_PER_BLOCK (TWO_BITS ? 4 : IS_K ? 8 : 1)

TABLE signed char NONLINEAR_CODES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Planes {
    const u8 *quants, *high, *scales, *deltas;
};

// What a thread holds of a unit.
struct Unit {
    u32x4 quants, more; // `more`: the second 16 bytes of Q8_0, or the high bits
    u32 block, index;   // of all blocks of the matrix; of the units of the block
};

DEVICE Unit read_unit(const Planes &p, u64 unit) {
    Unit u;
    u.block = (u32)(unit / UNITS_PER_BLOCK);
    u.index = (u32)(unit % UNITS_PER_BLOCK);
    u64 block = u.block;
#if FORMAT == Q8_0
    u.quants = *(const u32x4 *)(p.quants + unit * 32);
    u.more = *(const u32x4 *)(p.quants + unit * 32 + 16);
#else
    u.quants = *(const u32x4 *)(p.quants + unit * 16);
#endif
#if FORMAT == Q5_0 || FORMAT == Q5_1
    u.more.v[0] = *(const u32 *)(p.high + block * 4);
#elif FORMAT == Q5_K || FORMAT == Q3_K
    u.more = *(const u32x4 *)(p.high + block * 32 + u.index % 2 * 16);
#elif FORMAT == Q6_K
    u.more = *(const u32x4 *)(p.high + block * 64 + u.index / 4 * 32 + u.index % 2 * 16);
#endif
    return u;
}

// Where in its block of weights a group of a unit begins.
DEVICE u32 group_start(const Unit &u, u32 group) {
#if TWO_BITS
    return u.index / 2 * 128 + group * 32 + u.index % 2 * 16;
#elif FORMAT == Q4_K || FORMAT == Q5_K
    return u.index / 2 * 64 + group * 32 + u.index % 2 * 16;
#elif FORMAT == Q6_K
    return u.index / 4 * 128 + u.index / 2 % 2 * 32 + group * 64 + u.index % 2 * 16;
#else
    return u.index * 32 + group * 16;
#endif
}

// Four codes of a group, one in each byte, before the format's zero is taken off.
DEVICE u32 four_codes(const Unit &u, u32 group, u32 w) {
    u32 word = u.quants.v[w];
#if FORMAT == Q8_0
    return (group ? u.more.v[w] : word) ^ 0x80808080u;
#elif FORMAT == Q2_K
    return word >> 2 * group & 0x03030303u;
#elif FORMAT == Q3_K
    return (word >> 2 * group & 0x03030303u) | (u.more.v[w] >> (u.index / 2 * 4 + group) & 0x01010101u) << 2;
#else
    u32 low = word >> 4 * group & 0x0f0f0f0fu;
#if FORMAT == Q5_0 || FORMAT == Q5_1 // four neighbouring bits, spread over the bytes
    u32 bits = u.more.v[0] >> (16 * group + 4 * w) & 15;
    return low | (bits * 0x00204081u & 0x01010101u) << 4;
#elif FORMAT == Q5_K
    return low | (u.more.v[w] >> (u.index / 2 * 2 + group) & 0x01010101u) << 4;
#elif FORMAT == Q6_K
    return low | (u.more.v[w] >> (u.index / 2 % 2 * 2 + 4 * group) & 0x03030303u) << 4;
#else
    return low;
#endif
#endif
}

#define ZERO (FORMAT == Q4_0 ? 8 : FORMAT == Q5_0 ? 16 : FORMAT == Q8_0 ? 128 : FORMAT == Q3_K ? 4 : FORMAT == Q6_K ? 32 : 0)

// The 16 codes of a group, as floats.
DEVICE void read_codes(const Unit &u, u32 group, float (&code)[16]) {
    UNROLL for (u32 w = 0; w < 4; ++w) {
        u32 four = four_codes(u, group, w);
        UNROLL for (u32 i = 0; i < 4; ++i)
            code[4 * w + i] = NONLINEAR ? (float)NONLINEAR_CODES[four >> 8 * i & 15] : byte_float(four, i, ZERO);
    }
}

// The scales of a unit's block as they lie in memory, read in few pieces before they are taken apart.
struct Scales {
    u32 word[3];
    float delta, minimum;
};

DEVICE Scales read_scales(const Planes &p, const Unit &u) {
    Scales s = {};
    u64 block = u.block;
#if HAS_OFFSET
    u32 both = *(const u32 *)(p.deltas + block * 4);
    s.delta = to_float(f16{(u16)both});
    s.minimum = to_float(f16{(u16)(both >> 16)});
#else
    s.delta = to_float(*(const f16 *)(p.deltas + block * 2));
#endif
#if FORMAT == Q3_K || FORMAT == Q4_K || FORMAT == Q5_K
    UNROLL for (u32 i = 0; i < 3; ++i) s.word[i] = *(const u32 *)(p.scales + block * 12 + 4 * i);
#elif FORMAT == IQ4_XS
    UNROLL for (u32 i = 0; i < 3; ++i) s.word[i] = *(const u16 *)(p.scales + block * 6 + 2 * i);
#endif
    return s;
}

// Scale and offset of a group.
DEVICE void group_scale(const Planes &p, const Unit &u, const Scales &s, u32 group, float &scale, float &offset) {
    scale = s.delta;
    offset = 0;
    u32 i = group_start(u, group) / 16; // the how-manieth 16 weights of the block
#if FORMAT == Q4_1 || FORMAT == Q5_1
    offset = -s.minimum;
#elif FORMAT == Q2_K
    u32 both = p.scales[(u64)u.block * 16 + i];
    scale *= (float)(both & 15);
    offset = s.minimum * (float)(both >> 4);
#elif FORMAT == Q3_K
    u32 low = (i & 4 ? s.word[1] : s.word[0]) >> (8 * (i % 4) + (i < 8 ? 0 : 4)) & 15;
    u32 high = s.word[2] >> (8 * (i % 4) + i / 4 * 2) & 3;
    scale *= (float)(i32)(low | high << 4) - 32.0f;
#elif FORMAT == Q4_K || FORMAT == Q5_K
    u32 shift = 8 * (i / 2 % 4);
    u32 first = s.word[0] >> shift, second = s.word[1] >> shift, rest = s.word[2] >> shift;
    bool early = i < 8;
    scale *= (float)(early ? first & 63 : (rest & 15) | (first >> 2 & 48));
    offset = s.minimum * (float)(early ? second & 63 : (rest >> 4 & 15) | (second >> 2 & 48));
#elif FORMAT == Q6_K
    scale *= (float)(i8)p.scales[(u64)u.block * 16 + i];
#elif FORMAT == IQ4_XS
    u32 low = (u.index < 4 ? s.word[1] : s.word[2]) >> 4 * (u.index % 4) & 15, high = s.word[0] >> 2 * u.index & 3;
    scale *= (float)(i32)(low | high << 4) - 32.0f;
#endif
}

KERNEL(BLOCK) quant_linear(const f16 *x, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate) {
    SHARED float partial[MOST_WAVES(BLOCK)][ROWS * MOST];
    Planes planes{quants, high, scales, deltas};
    u32 first = BLOCK_X * ROWS, units = inner / (16 * GROUPS);
    float sum[ROWS][MOST];
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        UNROLL for (u32 m = 0; m < MOST; ++m) sum[r][m] = 0;

    for (u32 k = THREAD; k < units; k += BLOCK) {
        Unit unit[ROWS];
        Scales scales_of[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            u32 n = first + r < outer ? first + r : outer - 1; // a row too many is computed and not stored
            unit[r] = read_unit(planes, (u64)n * units + k);
            scales_of[r] = read_scales(planes, unit[r]);
        }
        GROUP_LOOP for (u32 g = 0; g < GROUPS; ++g) {
            float code[ROWS][16], scale[ROWS], offset[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) {
                read_codes(unit[r], g, code[r]);
                group_scale(planes, unit[r], scales_of[r], g, scale[r], offset[r]);
            }
            u32 at = k / UNITS_PER_BLOCK * (16 * GROUPS * UNITS_PER_BLOCK);
            Unit place = unit[0];
            place.index = k % UNITS_PER_BLOCK;
            at += group_start(place, g);
            const f16 *from = x + at;
            UNROLL for (u32 m = 0; m < MOST; ++m, from += inner) {
                if (m >= rows) continue; // not break: the loop is unrolled
                f16x8 low = *(const f16x8 *)from, top = *(const f16x8 *)(from + 8);
                float dot[ROWS], total = 0;
                UNROLL for (u32 r = 0; r < ROWS; ++r) dot[r] = 0;
                UNROLL for (u32 i = 0; i < 16; ++i) {
                    float v = to_float(i < 8 ? low.v[i % 8] : top.v[i % 8]);
                    if (HAS_OFFSET) total += v;
                    UNROLL for (u32 r = 0; r < ROWS; ++r) dot[r] += code[r][i] * v;
                }
                UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r][m] += scale[r] * dot[r] - offset[r] * total;
            }
        }
    }
    finish_product(sum, partial, bias, y, first, rows, outer, stride, column, accumulate);
}

// Some rows of the matrix as float16 (outer, inner): for a product through BLAS.
KERNEL(256) dequantize(const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, f16 *y, u32 first, u32 outer, u32 inner) {
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / (16 * GROUPS);
    u64 i = (u64)BLOCK_X * 256 + THREAD;
    if (i >= (u64)outer * units) return;
    Unit unit = read_unit(planes, (u64)first * units + i);
    Scales own = read_scales(planes, unit);
    f16 *out = y + i / units * inner + i % units / UNITS_PER_BLOCK * (16 * GROUPS * UNITS_PER_BLOCK);
    UNROLL for (u32 g = 0; g < GROUPS; ++g) {
        float code[16], scale, offset;
        read_codes(unit, g, code);
        group_scale(planes, unit, own, g, scale, offset);
        f16x8 part[2];
        UNROLL for (u32 j = 0; j < 16; ++j) part[j / 8].v[j % 8] = to_f16(scale * code[j] - offset);
        f16x8 *to = (f16x8 *)(out + group_start(unit, g));
        to[0] = part[0];
        to[1] = part[1];
    }
}

// The rows of a table that ids name, times a factor, as float32 (T, inner). A block per token.
KERNEL(64) quant_embed(const i32 *ids, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, float *y, u32 inner, float factor) {
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / (16 * GROUPS);
    float *row = y + (u64)BLOCK_X * inner;
    for (u32 k = THREAD; k < units; k += 64) {
        Unit unit = read_unit(planes, (u64)ids[BLOCK_X] * units + k);
        Scales own = read_scales(planes, unit);
        float *out = row + k / UNITS_PER_BLOCK * (16 * GROUPS * UNITS_PER_BLOCK);
        for (u32 g = 0; g < GROUPS; ++g) {
            float code[16], scale, offset;
            read_codes(unit, g, code);
            group_scale(planes, unit, own, g, scale, offset);
            UNROLL for (u32 j = 0; j < 16; ++j) out[group_start(unit, g) + j] = (scale * code[j] - offset) * factor;
        }
    }
}
