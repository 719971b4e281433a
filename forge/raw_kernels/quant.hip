// Matrices in ggml's block types, as planes: the quants, their high bits, group scales and block scales of all blocks
// each lie together. Layouts within a block are those of ggml-common.h; quant.py splits the blocks.
//
// A unit is what a thread reads at once: 32 bytes of quants, or the 16 of a block of 4 bits. It holds GROUPS groups of 32
// weights, each with one scale and one offset or, in HALVES, two (weight = scale * (code - ZERO) - offset).
// Neighbouring threads read neighbouring units.
// -D FORMAT=ggml's number of the type; MOST=rows of x at most; ROWS=rows of the matrix that a team of TEAM threads takes;
// BLOCK=threads; AHEAD=units of each row that a thread reads before it needs them; OWN=groups of the one row of x at most, for
// quant_vector, or 0. And for that: IN=f16, or float: x is of the residual stream and is normalized here; OUT=float, or f16:
// activation(gate) * up of rows n and outer + n; SILU=1, or 0: the activation is GELU; CORE_BLOCKS=blocks that a
// multiprocessor holds.

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
#define SIX_BIT_SCALES (FORMAT == Q4_K || FORMAT == Q5_K) // 16 bytes of them, with the block's scale and minimum
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

// What a thread holds of a unit, as it lies in memory.
struct Unit {
    u32x4 quants[PIECES];
    u32x4 high[2]; // bits: of the unit, or of its block
    u32x4 scales;  // of its block
    u32 delta;     // float16 scale of the block; above it the minimum
};

DEVICE Unit read_unit(const Planes &p, u64 unit) {
    Unit u;
    u64 block = unit / UNITS_PER_BLOCK;
    UNROLL for (u32 i = 0; i < PIECES; ++i) u.quants[i] = ((const u32x4 *)p.quants)[unit * PIECES + i];
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

// Where in a row a group of its unit `k` begins.
DEVICE u32 group_start(u32 k, u32 group) {
#if FORMAT == Q6_K
    return k / 2 * 128 + k % 2 * 32 + group * 64;
#else
    return k * UNIT_WEIGHTS + group * 32;
#endif
}

// The w-th four of a group's 32 codes, one in each byte, signed. `index`: of the unit in its block.
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
    return pick_bytes(0xf6eaddcfu, 0xbfad9881u, place) & ~upper | pick_bytes(0x71594535u, 0x26190d01u, place) & upper;
#elif FORMAT != Q8_0
    return low;
#endif
}

// Scale and offset of a group or of one of its halves, the offset with the format's zero in it: weight = scale * code - offset.
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
#elif SIX_BIT_SCALES // both groups' at once, a byte each; the compiler computes what does not depend on `group` once
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
    u32 first = u.scales.v[1], second = u.scales.v[2]; // not chosen by index: newer compilers put the array in memory
    u32 low = (index < 2 ? first : second) >> 4 * (i % 4) & 15;
    u32 high = u.scales.v[0] >> 2 * i & 3;
    scale *= (float)(i32)(low | high << 4) - 32.0f;
#endif
    offset += scale * (float)ZERO;
}

// ---------------------------------------------------------------------------------------- products of few rows
// y = x @ weight.T by integer dot products of bytes: the codes times x, which becomes integers of 16 bits under one
// scale for the 32 numbers of a group, as two signed digits to the base 256. Rounding x so costs less than the
// float16 that it is kept in did: half a step is 1/65024 of the largest of the 32.

// The digits of a unit are pieces of 16 bytes: for each group two of high digits and two of low ones, then the groups' scales,
// each with the sum of the integers of the group or of its halves.
#define SCALES (4 * GROUPS)
#define DIGIT_PIECES (SCALES + (HALVES * GROUPS + 1) / 2 | 1) // odd: neighbouring units are in other banks of LDS

// Where a piece is: a unit's lie together in LDS; in memory each lies beside its neighbours', as lanes read them.
DEVICE u32 piece_at(u32 row, u32 k, u32 piece, u32 units) {
#if OWN
    return k * DIGIT_PIECES + piece;
#else
    return (row * DIGIT_PIECES + piece) * units + k;
#endif
}

// Four neighbouring lanes make a group, 8 numbers each; all lanes of a wave call it, those with nothing to store too. NaN and
// infinity make the scale one of them.
DEVICE void make_digits(const u32x4 &x, u32x4 *digits, u32 i, u32 units, bool stores) {
    u32 part = i % 4, group = i / 4 % GROUPS, k = i / (4 * GROUPS) % units, row = i / (4 * GROUPS) / units;
    u32 largest = 0; // bits of a float16 without its sign are in the order of their values, with NaN on top
    UNROLL for (u32 j = 0; j < 8; ++j) {
        u32 bits = x.v[j / 2] >> 16 * (j % 2) & 0x7fffu;
        largest = bits > largest ? bits : largest;
    }
    for (u32 lane = 1; lane < 4; lane *= 2) {
        u32 other = shfl_xor(largest, lane);
        largest = other > largest ? other : largest;
    }
    float most = to_float(f16{(u16)largest}), inverse = most > 0.0f ? fast_divide(32512.0f, most) : 0.0f;
    u32x2 high, low;
    u32 total = 0;
    UNROLL for (u32 w = 0; w < 2; ++w) {
        high.v[w] = 0, low.v[w] = 0;
        UNROLL for (u32 j = 0; j < 4; ++j) {
            // The float 1.5 * 2**23 + n + 128 holds the integer n + 128 in its last bits, rounded to the nearest.
            f16 value{(u16)(x.v[w * 2 + j / 2] >> 16 * (j % 2))};
            u32 n = as_u32(fma_rn(to_float(value), inverse, 12583040.0f));
            high.v[w] |= (n >> 8 & 255) << 8 * j;
            low.v[w] |= (n & 255) << 8 * j;
            total += n;
        }
        low.v[w] ^= 0x80808080u; // less the 128 that was added to round the high digit
    }
    total -= 8 * as_u32(12583040.0f);
    total += shfl_xor(total, 1);
    u32 rest = shfl_xor(total, 2); // of the other half
    if (!stores) return;
    ((u32x2 *)&digits[piece_at(row, k, 4 * group + part / 2, units)])[part % 2] = high;
    ((u32x2 *)&digits[piece_at(row, k, 4 * group + 2 + part / 2, units)])[part % 2] = low;
    if (part) return;
    float scale = most * (1.0f / 32512.0f);
#if HALVES == 2
    ((f32x4 *)digits)[piece_at(row, k, SCALES + group, units)] = f32x4{{scale, (float)(i32)total, (float)(i32)rest, 0}};
#else
    ((f32x2 *)&digits[piece_at(row, k, SCALES + group / 2, units)])[group % 2] = f32x2{{scale, (float)(i32)(total + rest)}};
#endif
}

// Where in a row the 8 numbers begin that are made digits of `i`-th: in the order of units, groups and parts.
DEVICE u32 eight_start(u32 i) { return group_start(i / (4 * GROUPS), i / 4 % GROUPS) + i % 4 * 8; }

KERNEL(128) quant_digits(const f16 *x, u32 *x_digits, u32 rows, u32 inner) {
    u32 i = BLOCK_X * 128 + THREAD, in_row = inner / 8, count = rows * in_row;
    u32x4 eight = {};
    if (i < count) eight = *(const u32x4 *)(x + (u64)(i / in_row) * inner + eight_start(i % in_row));
    make_digits(eight, (u32x4 *)x_digits, i, inner / UNIT_WEIGHTS, i < count);
}

// The products of a unit of each row of the matrix, the k-th of its row, with the rows of x are added to sum.
template <u32 M>
DEVICE void multiply_unit(const Unit (&unit)[ROWS], float (&sum)[ROWS][M], const u32x4 *digits, u32 k, u32 units, u32 rows) {
    u32 index = k % UNITS_PER_BLOCK;
    UNROLL for (u32 g = 0; g < GROUPS; ++g) {
        u32 code[ROWS][8];
        float scale[ROWS][HALVES], offset[ROWS][HALVES];
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            UNROLL for (u32 w = 0; w < 8; ++w) code[r][w] = four_codes(unit[r], index, g, w);
            UNROLL for (u32 h = 0; h < HALVES; ++h) group_scale(unit[r], index, g, h, scale[r][h], offset[r][h]);
        }
        UNROLL for (u32 m = 0; m < M; ++m) {
            if (m >= rows) continue; // not break: the loop is unrolled
            u32x4 scales = digits[piece_at(m, k, SCALES + (HALVES == 2 ? g : g / 2), units)];
            u32 own = HALVES == 2 ? 0 : g % 2 * 2; // where the group's are in the piece
            i32 tops[ROWS], bottoms[ROWS];
            float product[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) tops[r] = 0, bottoms[r] = 0, product[r] = 0;
            UNROLL for (u32 h = 0; h < 2; ++h) {
                u32x4 top = digits[piece_at(m, k, 4 * g + h, units)], bottom = digits[piece_at(m, k, 4 * g + 2 + h, units)];
                UNROLL for (u32 r = 0; r < ROWS; ++r) {
                    UNROLL for (u32 w = 0; w < 4; ++w) {
                        u32 four = code[r][4 * h + w];
                        tops[r] = dot4(four, top.v[w], tops[r]);
                        bottoms[r] = dot4(four, bottom.v[w], bottoms[r]);
                    }
                    if (HALVES == 1 && h == 0) continue;
                    u32 part = HALVES == 2 ? h : 0;
                    product[r] += scale[r][part] * (float)(tops[r] * 256 + bottoms[r]);
                    if (HAS_OFFSET || ZERO) product[r] -= offset[r][part] * as_float(scales.v[own + 1 + part]);
                    tops[r] = 0, bottoms[r] = 0;
                }
            }
            UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r][m] += as_float(scales.v[own]) * product[r];
        }
    }
}

KERNEL(BLOCK) quant_linear(const u32 *x_digits, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate) {
#if !OWN
    SHARED float partial[MOST_WAVES(BLOCK)][ROWS * MOST];
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS, lane = THREAD % TEAM;
    u32 first = (BLOCK_X * (BLOCK / TEAM) + THREAD / TEAM) * ROWS;
    u64 start[ROWS]; // the unit where a row begins; a row too many is computed and not stored
    UNROLL for (u32 r = 0; r < ROWS; ++r) start[r] = (u64)(first + r < outer ? first + r : outer - 1) * units;
    Unit next[AHEAD][ROWS];
    UNROLL for (u32 a = 0; a < AHEAD; ++a)
        if (lane + a * TEAM < units)
            UNROLL for (u32 r = 0; r < ROWS; ++r) next[a][r] = read_unit(planes, start[r] + lane + a * TEAM);

    float sum[ROWS][MOST];
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        UNROLL for (u32 m = 0; m < MOST; ++m) sum[r][m] = 0;
    for (u32 k = lane; k < units; k += TEAM) {
        Unit unit[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            unit[r] = next[0][r];
            UNROLL for (u32 a = 1; a < AHEAD; ++a) next[a - 1][r] = next[a][r];
        }
        if (k + AHEAD * TEAM < units)
            UNROLL for (u32 r = 0; r < ROWS; ++r) next[AHEAD - 1][r] = read_unit(planes, start[r] + k + AHEAD * TEAM);
        multiply_unit(unit, sum, (const u32x4 *)x_digits, k, units, rows);
    }
    finish_product<TEAM>(sum, partial, bias, y, rows, outer, stride, column, accumulate);
#endif
}

// A team's units of its rows from output `first` on. Past the end all threads read the matrix's first unit: loads without a
// branch let the compiler wait for those before them alone.
DEVICE void read_units(Unit (&unit)[ROWS], const Planes &planes, u32 first, u32 k, bool there, u32 units, u32 outer) {
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        unit[r] = read_unit(planes, there && k < units ? (u64)team_row<OUT, ROWS>(first, r, outer) * units + k : 0);
}

// One row of x, whose digits each block makes itself; it goes on to other rows of the matrix, and their first units are on
// their way while sums are joined. Threads on a multiprocessor matter more than registers.
#undef RESIDENT
#define RESIDENT CORE_BLOCKS
KERNEL(BLOCK) quant_vector(const IN *x, const float *norm, float eps, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, OUT *y, u32 inner, u32 outer, u32 blocks, u32 accumulate) {
#if OWN
    SHARED u32x4 digits[OWN / GROUPS * DIGIT_PIECES];
    SHARED float partial[2][MOST_WAVES(BLOCK)][ROWS], scratch[MOST_WAVES(BLOCK)];
    const u32 outputs = Outputs<OUT, ROWS>::per_team, turns = (4 * OWN + BLOCK - 1) / BLOCK;
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS, lane = THREAD % TEAM, team = THREAD / TEAM * outputs;
    u32 first = BLOCK_X * (BLOCK / TEAM) * outputs, stride = blocks * (BLOCK / TEAM) * outputs;
    u32 at[turns]; // of eight numbers of x: in the order of units, groups and parts
    UNROLL for (u32 t = 0; t < turns; ++t) at[t] = eight_start(t * BLOCK + THREAD);
    Row<IN, turns> row;
    read_row(row, x, norm, at, inner);
    Unit next[AHEAD][ROWS];
    u32 ahead = first, start = 0; // the outputs and the units that are read next
    UNROLL for (u32 a = 0; a < AHEAD; ++a) {
        read_units(next[a], planes, ahead + team, start + lane, ahead < outer, units, outer);
        start += TEAM;
        if (start >= units) start = 0, ahead += stride;
    }
    u32x4 eight[turns];
    finish_row(eight, row, eps, inner, scratch);
    UNROLL for (u32 t = 0; t < turns; ++t) make_digits(eight[t], digits, t * BLOCK + THREAD, units, at[t] < inner);
    lds_barrier();

    for (u32 turn = 0; first < outer; first += stride, turn ^= 1) {
        u32 n = own_output<TEAM, OUT, ROWS, BLOCK>(first, outer);
        Addends more{};
        if (n < outer) more = read_addends(y, n, bias, outer, accumulate);
        float sum[ROWS][1], total[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r][0] = 0;
        for (u32 k = lane; k < units + lane; k += TEAM) { // as many times for each thread of a team
            Unit unit[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) {
                unit[r] = next[0][r];
                UNROLL for (u32 a = 1; a < AHEAD; ++a) next[a - 1][r] = next[a][r];
            }
            read_units(next[AHEAD - 1], planes, ahead + team, start + lane, ahead < outer, units, outer);
            start += TEAM;
            if (start >= units) start = 0, ahead += stride;
            if (k < units) multiply_unit(unit, sum, digits, k, units, 1);
        }
        UNROLL for (u32 r = 0; r < ROWS; ++r) total[r] = sum[r][0];
        finish_vector<TEAM, SILU>(total, partial[turn], n, more, y, outer);
    }
#endif
}
#undef RESIDENT
#define RESIDENT 1

// ------------------------------------------------------------------------------------------- weights as floats
DEVICE void read_group(const Unit &u, u32 index, u32 group, float (&weight)[32]) {
    float scale[HALVES], offset[HALVES];
    UNROLL for (u32 h = 0; h < HALVES; ++h) group_scale(u, index, group, h, scale[h], offset[h]);
    UNROLL for (u32 i = 0; i < 32; ++i)
        weight[i] = scale[i / (32 / HALVES)] * (float)(i8)(four_codes(u, index, group, i / 4) >> 8 * (i % 4)) - offset[i / (32 / HALVES)];
}

// Some rows of the matrix as float16 (outer, inner): for a product through BLAS. What a thread takes apart goes through LDS, so
// that neighbouring threads store neighbouring pieces of 8 numbers.
KERNEL(128) dequantize(const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, f16 *y, u32 first, u32 outer, u32 inner) {
    SHARED f16x8 staged[128][4 * GROUPS + 1]; // an odd number of pieces: neighbouring rows are in other banks
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
        *(f16x8 *)(y + at) = staged[i / (4 * GROUPS)][piece];
    }
}

// The rows of a table that ids name, times a factor, as float32 (T, inner). A block per token.
KERNEL(64) quant_embed(const i32 *ids, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, float *y, u32 inner, float factor) {
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS;
    float *row = y + (u64)BLOCK_X * inner;
    for (u32 k = THREAD; k < units; k += 64) {
        Unit unit = read_unit(planes, (u64)ids[BLOCK_X] * units + k);
        for (u32 g = 0; g < GROUPS; ++g) {
            float weight[32];
            read_group(unit, k % UNITS_PER_BLOCK, g, weight);
            UNROLL for (u32 j = 0; j < 32; ++j) row[group_start(k, g) + j] = weight[j] * factor;
        }
    }
}
