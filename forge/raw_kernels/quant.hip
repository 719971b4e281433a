// Matrices in ggml's block types, as planes: the quants, their high bits, group scales and block scales of all blocks
// each lie together. Layouts within a block are those of ggml-common.h; quant.py splits the blocks.
//
// The common unit is 16 bytes of quants: GROUPS groups of 16 weights, each with one scale and one offset
// (weight = scale * (code - ZERO) - offset). A thread reads a unit at once, and neighbouring threads neighbouring units.
// -D FORMAT=ggml's number of the type; MOST=rows of x at most; ROWS=rows of the matrix that a team of TEAM threads takes;
// BLOCK=threads; OWN=groups of the one row of x whose digits a block makes itself, at most, or 0: quant_digits made them.

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
#define SIX_BIT_SCALES (FORMAT == Q4_K || FORMAT == Q5_K) // 16 bytes of them, with the block's scale and minimum
#define HAS_OFFSET (FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q2_K || FORMAT == Q4_K || FORMAT == Q5_K)
#define NONLINEAR (FORMAT == IQ4_NL || FORMAT == IQ4_XS)
#define ZERO (FORMAT == Q4_0 ? 8 : FORMAT == Q5_0 ? 16 : FORMAT == Q3_K ? 4 : FORMAT == Q6_K ? 32 : 0)
#define GROUPS (TWO_BITS ? 4 : 2)
#define UNITS_PER_BLOCK (TWO_BITS ? 4 : IS_K ? 8 : 1)

TABLE i8 NONLINEAR_CODES[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

struct Planes {
    const u8 *quants, *high, *scales, *deltas;
};

// What a thread holds of a unit, as it lies in memory.
struct Unit {
    u32x4 quants, more; // `more`: the second 16 bytes of Q8_0, or the high bits
    u32x4 scales;       // of its block, or its own
    u32 delta;          // float16 scale of the block; above it the minimum
};

DEVICE Unit read_unit(const Planes &p, u64 unit) {
    Unit u;
    u64 block = unit / UNITS_PER_BLOCK;
    u32 index = (u32)unit % UNITS_PER_BLOCK;
#if FORMAT == Q8_0
    u.quants = *(const u32x4 *)(p.quants + unit * 32);
    u.more = *(const u32x4 *)(p.quants + unit * 32 + 16);
#else
    u.quants = *(const u32x4 *)(p.quants + unit * 16);
#endif
#if FORMAT == Q5_0 || FORMAT == Q5_1
    u.more.v[0] = *(const u32 *)(p.high + block * 4);
#elif FORMAT == Q5_K || FORMAT == Q3_K
    u.more = *(const u32x4 *)(p.high + block * 32 + index % 2 * 16);
#elif FORMAT == Q6_K
    u.more = *(const u32x4 *)(p.high + block * 64 + index / 4 * 32 + index % 2 * 16);
#endif
#if SIX_BIT_SCALES
    u.scales = *(const u32x4 *)(p.scales + block * 16);
    u.delta = u.scales.v[0];
#elif HAS_OFFSET
    u.delta = *(const u32 *)(p.deltas + block * 4);
#else
    u.delta = *(const u16 *)(p.deltas + block * 2);
#endif
#if FORMAT == Q2_K || FORMAT == Q6_K
    u.scales = *(const u32x4 *)(p.scales + block * 16);
#elif FORMAT == Q3_K
    UNROLL for (u32 i = 0; i < 3; ++i) u.scales.v[i] = *(const u32 *)(p.scales + block * 12 + 4 * i);
#elif FORMAT == IQ4_XS
    UNROLL for (u32 i = 0; i < 3; ++i) u.scales.v[i] = *(const u16 *)(p.scales + block * 6 + 2 * i);
#endif
    return u;
}

// Where in a row a group of its unit `k` begins.
DEVICE u32 group_start(u32 k, u32 group) {
    u32 index = k % UNITS_PER_BLOCK, block = k / UNITS_PER_BLOCK * (16 * GROUPS * UNITS_PER_BLOCK);
#if TWO_BITS
    return block + index / 2 * 128 + group * 32 + index % 2 * 16;
#elif SIX_BIT_SCALES
    return block + index / 2 * 64 + group * 32 + index % 2 * 16;
#elif FORMAT == Q6_K
    return block + index / 4 * 128 + index / 2 % 2 * 32 + group * 64 + index % 2 * 16;
#else
    return block + index * 32 + group * 16;
#endif
}

// Four codes of a group, one in each byte, signed. `index`: of the unit in its block.
DEVICE u32 four_codes(const Unit &u, u32 index, u32 group, u32 w) {
    u32 word = u.quants.v[w];
#if FORMAT == Q8_0
    return group ? u.more.v[w] : word;
#elif FORMAT == Q2_K
    return word >> 2 * group & 0x03030303u;
#elif FORMAT == Q3_K
    return (word >> 2 * group & 0x03030303u) | (u.more.v[w] >> (index / 2 * 4 + group) & 0x01010101u) << 2;
#else
    u32 low = word >> 4 * group & 0x0f0f0f0fu;
#if FORMAT == Q5_0 || FORMAT == Q5_1 // four neighbouring bits, spread over the bytes
    u32 bits = u.more.v[0] >> (16 * group + 4 * w) & 15;
    return low | (bits * 0x00204081u & 0x01010101u) << 4;
#elif FORMAT == Q5_K
    return low | (u.more.v[w] >> (index / 2 * 2 + group) & 0x01010101u) << 4;
#elif FORMAT == Q6_K
    return low | (u.more.v[w] >> (index / 2 % 2 * 2 + 4 * group) & 0x03030303u) << 4;
#elif NONLINEAR
    u32 codes = 0;
    UNROLL for (u32 i = 0; i < 4; ++i) codes |= (u32)(u8)NONLINEAR_CODES[low >> 8 * i & 15] << 8 * i;
    return codes;
#else
    return low;
#endif
#endif
}

// Scale and offset of a group, the offset with the format's zero in it: weight = scale * code - offset.
DEVICE void group_scale(const Unit &u, u32 index, u32 group, float &scale, float &offset) {
    scale = to_float(f16{(u16)u.delta});
    float minimum = to_float(f16{(u16)(u.delta >> 16)});
    offset = 0;
#if FORMAT == Q4_1 || FORMAT == Q5_1
    offset = -minimum;
#elif FORMAT == Q2_K
    u32 both = (index / 2 ? u.scales.v[2 + group / 2] : u.scales.v[group / 2]) >> 8 * (group % 2 * 2 + index % 2);
    scale *= (float)(both & 15);
    offset = minimum * (float)(both >> 4 & 15);
#elif FORMAT == Q3_K
    u32 i = group_start(index, group) / 16; // the how-manieth 16 weights of the block
    u32 low = (i & 4 ? u.scales.v[1] : u.scales.v[0]) >> (8 * (i % 4) + (i < 8 ? 0 : 4)) & 15;
    u32 high = u.scales.v[2] >> (8 * (i % 4) + i / 4 * 2) & 3;
    scale *= (float)(i32)(low | high << 4) - 32.0f;
#elif SIX_BIT_SCALES // both groups' at once, a byte each; the compiler computes what does not depend on `group` once
    u32 shift = index / 2 % 2 * 16;
    u32 first = u.scales.v[1] >> shift, second = u.scales.v[2] >> shift, rest = u.scales.v[3] >> shift;
    bool early = index < 4;
    u32 scales = early ? first & 0x3f3f : (rest & 0x0f0f) | (first >> 2 & 0x3030);
    u32 minima = early ? second & 0x3f3f : (rest >> 4 & 0x0f0f) | (second >> 2 & 0x3030);
    scale *= (float)(scales >> 8 * group & 255);
    offset = minimum * (float)(minima >> 8 * group & 255);
#elif FORMAT == Q6_K
    scale *= (float)(i8)((index / 4 ? u.scales.v[2 + group] : u.scales.v[group]) >> 8 * (index % 4));
#elif FORMAT == IQ4_XS
    u32 low = (index < 4 ? u.scales.v[1] : u.scales.v[2]) >> 4 * (index % 4) & 15;
    u32 high = u.scales.v[0] >> 2 * index & 3;
    scale *= (float)(i32)(low | high << 4) - 32.0f;
#endif
    offset += scale * (float)ZERO;
}

// ---------------------------------------------------------------------------------------- products of few rows
// y = x @ weight.T by integer dot products of bytes: the codes times x, which becomes integers of 16 bits under one
// scale for the 16 numbers of a group, as two signed digits to the base 256. Rounding x so costs less than the
// float16 that it is kept in did: half a step is 1/65024 of the largest of the 16.

struct Sixteen {
    f16x8 part[2];
};

// The digits of 16 numbers, their scale, and the sum of the integers. NaN and infinity make the scale one of them.
struct Digits {
    u32x4 high, low;
    f32x2 scale_sum;
};

DEVICE Sixteen read_sixteen(const f16 *from) { return {{*(const f16x8 *)from, *(const f16x8 *)(from + 8)}}; }

DEVICE Digits to_digits(const Sixteen &x) {
    u32 largest = 0; // bits of a float16 without its sign are in the order of their values, with NaN on top
    UNROLL for (u32 i = 0; i < 16; ++i) {
        u32 bits = x.part[i / 8].v[i % 8].bits & 0x7fffu;
        largest = bits > largest ? bits : largest;
    }
    float most = to_float(f16{(u16)largest}), inverse = most > 0.0f ? 32512.0f / most : 0.0f;
    Digits d;
    u32 total = 0;
    UNROLL for (u32 w = 0; w < 4; ++w) {
        u32 high = 0, low = 0;
        UNROLL for (u32 i = 0; i < 4; ++i) {
            // The float 1.5 * 2**23 + n + 128 holds the integer n + 128 in its last bits, rounded to the nearest.
            u32 n = as_u32(fma_rn(to_float(x.part[w / 2].v[w % 2 * 4 + i]), inverse, 12583040.0f));
            high |= (n >> 8 & 255) << 8 * i;
            low |= (n & 255) << 8 * i;
            total += n;
        }
        d.high.v[w] = high;
        d.low.v[w] = low ^ 0x80808080u; // less the 128 that was added to round the high digit
    }
    d.scale_sum.v[0] = most * (1.0f / 32512.0f);
    d.scale_sum.v[1] = (float)(i32)(total - 16 * as_u32(12583040.0f));
    return d;
}

// The digits of all rows of x, in the order in which units are read: high and low u32 (M, GROUPS, units, 4), scales
// with sums float (M, GROUPS, units, 2).
KERNEL(128) quant_digits(const f16 *x, u32 *x_high, u32 *x_low, float *x_scale_sum, u32 rows, u32 inner) {
    u32 i = BLOCK_X * 128 + THREAD, units = inner / (16 * GROUPS);
    if (i >= rows * units * GROUPS) return;
    u32 k = i % units, g = i / units % GROUPS, m = i / units / GROUPS;
    Digits d = to_digits(read_sixteen(x + (u64)m * inner + group_start(k, g)));
    ((u32x4 *)x_high)[i] = d.high;
    ((u32x4 *)x_low)[i] = d.low;
    ((f32x2 *)x_scale_sum)[i] = d.scale_sum;
}

KERNEL(BLOCK) quant_linear(const f16 *x, const u32 *x_high, const u32 *x_low, const float *x_scale_sum, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate) {
    SHARED float partial[MOST_WAVES(BLOCK)][ROWS * MOST];
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / (16 * GROUPS), lane = THREAD % TEAM;
    u32 first = (BLOCK_X * (BLOCK / TEAM) + THREAD / TEAM) * ROWS;
    u64 start[ROWS]; // the unit where a row begins; a row too many is computed and not stored
    UNROLL for (u32 r = 0; r < ROWS; ++r) start[r] = (u64)(first + r < outer ? first + r : outer - 1) * units;
    Unit next[ROWS]; // read a turn ahead
#if OWN
    SHARED u32x4 own_high[OWN], own_low[OWN];
    SHARED f32x2 own_scale_sum[OWN];
    Sixteen ahead = {}; // of x; asked for before the weights, which would keep it waiting
    if (THREAD < units * GROUPS) ahead = read_sixteen(x + group_start(THREAD / GROUPS, THREAD % GROUPS));
#else
    const u32x4 *own_high = (const u32x4 *)x_high, *own_low = (const u32x4 *)x_low;
    const f32x2 *own_scale_sum = (const f32x2 *)x_scale_sum;
#endif
    if (lane < units)
        UNROLL for (u32 r = 0; r < ROWS; ++r) next[r] = read_unit(planes, start[r] + lane);
#if OWN
    for (u32 i = THREAD; i < units * GROUPS; i += BLOCK) {
        Digits d = to_digits(ahead);
        u32 later = i + BLOCK, at = i % GROUPS * units + i / GROUPS;
        if (later < units * GROUPS) ahead = read_sixteen(x + group_start(later / GROUPS, later % GROUPS));
        own_high[at] = d.high;
        own_low[at] = d.low;
        own_scale_sum[at] = d.scale_sum;
    }
    barrier();
#endif

    float sum[ROWS][MOST];
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        UNROLL for (u32 m = 0; m < MOST; ++m) sum[r][m] = 0;
    for (u32 k = lane; k < units; k += TEAM) {
        Unit unit[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) unit[r] = next[r];
        if (k + TEAM < units)
            UNROLL for (u32 r = 0; r < ROWS; ++r) next[r] = read_unit(planes, start[r] + k + TEAM);
        u32 index = k % UNITS_PER_BLOCK;
        UNROLL for (u32 g = 0; g < GROUPS; ++g) {
            u32 code[ROWS][4];
            float scale[ROWS], offset[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) {
                UNROLL for (u32 w = 0; w < 4; ++w) code[r][w] = four_codes(unit[r], index, g, w);
                group_scale(unit[r], index, g, scale[r], offset[r]);
            }
            UNROLL for (u32 m = 0; m < MOST; ++m) {
                if (m >= rows) continue; // not break: the loop is unrolled
                u32 at = (m * GROUPS + g) * units + k;
                u32x4 top = own_high[at], bottom = own_low[at];
                f32x2 scale_sum = own_scale_sum[at];
                UNROLL for (u32 r = 0; r < ROWS; ++r) {
                    i32 tops = 0, bottoms = 0;
                    UNROLL for (u32 w = 0; w < 4; ++w) {
                        tops = dot4(code[r][w], top.v[w], tops);
                        bottoms = dot4(code[r][w], bottom.v[w], bottoms);
                    }
                    float product = scale[r] * (float)(tops * 256 + bottoms);
                    if (HAS_OFFSET || ZERO) product -= offset[r] * scale_sum.v[1];
                    sum[r][m] += scale_sum.v[0] * product;
                }
            }
        }
    }
    finish_product<TEAM>(sum, partial, bias, y, rows, outer, stride, column, accumulate);
}

// ------------------------------------------------------------------------------------------- weights as floats
DEVICE void read_group(const Unit &u, u32 index, u32 group, float (&weight)[16]) {
    float scale, offset;
    group_scale(u, index, group, scale, offset);
    UNROLL for (u32 w = 0; w < 4; ++w) {
        u32 four = four_codes(u, index, group, w);
        UNROLL for (u32 i = 0; i < 4; ++i) weight[4 * w + i] = scale * (float)(i8)(four >> 8 * i) - offset;
    }
}

// Some rows of the matrix as float16 (outer, inner): for a product through BLAS.
KERNEL(256) dequantize(const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, f16 *y, u32 first, u32 outer, u32 inner) {
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / (16 * GROUPS);
    u64 i = (u64)BLOCK_X * 256 + THREAD;
    if (i >= (u64)outer * units) return;
    Unit unit = read_unit(planes, (u64)first * units + i);
    UNROLL for (u32 g = 0; g < GROUPS; ++g) {
        float weight[16];
        read_group(unit, (u32)(i % units) % UNITS_PER_BLOCK, g, weight);
        f16x8 part[2];
        UNROLL for (u32 j = 0; j < 16; ++j) part[j / 8].v[j % 8] = to_f16(weight[j]);
        f16x8 *to = (f16x8 *)(y + i / units * inner + group_start((u32)(i % units), g));
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
        for (u32 g = 0; g < GROUPS; ++g) {
            float weight[16];
            read_group(unit, k % UNITS_PER_BLOCK, g, weight);
            UNROLL for (u32 j = 0; j < 16; ++j) row[group_start(k, g) + j] = weight[j] * factor;
        }
    }
}
