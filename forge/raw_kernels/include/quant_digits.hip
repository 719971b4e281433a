// Integer dot products of bytes: the codes of a matrix in ggml's block types times a row x.
//
// Each group of 32 numbers of x becomes integers of 16 bits under one scale, held as two signed digits to the base 256. The rounding
// is finer than that of float16: half a step is 1/65024 of the group's largest number.
// -D ROWS=rows of the matrix that a team of threads computes.

// Digits of a unit of x in LDS, as pieces of 16 bytes: for each group two pieces of high digits and two of low digits, then for each
// group its scale and the sums of its integers, one for each half that has a scale of its own.
#define SCALES (4 * GROUPS)
#define DIGIT_PIECES (SCALES + (HALVES * GROUPS + 1) / 2 | 1) // odd, so that neighbouring units lie in other banks

// Codes of MXFP4 by 12 more, so that none is negative, by an instruction that takes its places as they lie: two neighbours are half a
// group apart, and so are the numbers of x in LDS.
#define CODES_APART (HAS_NIBBLE_PERM && FORMAT == MXFP4)
#if CODES_APART
#define DIGIT_ZERO 12
DEVICE u32 digit_codes(const Unit &u, u32, u32, u32 w) {
    u32 places = u.quants[0].v[w / 2] >> 16 * (w % 2), positive = in_register(0x0f0e0d0cu), negative = in_register(0x090a0b0cu);
    return nibble_perm(positive, 0x18141210u, places) | nibble_perm(negative, 0x00040608u, places ^ 0x88888888u);
}
#else
#define DIGIT_ZERO ZERO
DEVICE u32 digit_codes(const Unit &u, u32 index, u32 group, u32 w) { return four_codes(u, index, group, w); }
#endif

// Index of a piece of the k-th unit.
DEVICE u32 piece_at(u32 k, u32 piece) { return k * DIGIT_PIECES + piece; }

// Stores the digits of 8 numbers of x, the i-th in the order of eight_start. Four neighbouring lanes make a group. All lanes of a
// wave call it, also those that store nothing. A NaN or infinity in x makes the scale NaN or infinite. x counts `factor` times.
DEVICE void make_digits(const u32x4 &x, u32x4 *digits, u32 i, bool stores, float factor = 1.0f) {
    u32 part = i % 4, group = i / 4 % GROUPS, k = i / (4 * GROUPS);
    u32 largest = 0; // of the bits without the sign, which order as the values do, NaN on top
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
        low.v[w] ^= 0x80808080u; // takes away the 128 that rounded the high digit
    }
    total -= 8 * as_u32(12583040.0f);
    total += shfl_xor(total, 1);
    u32 rest = shfl_xor(total, 2); // the sum of the other half
#if CODES_APART // lanes of the first half have high digits of both halves in the end, the others low ones
    u32x4 apart;
    UNROLL for (u32 w = 0; w < 2; ++w) {
        u32 own = part < 2 ? high.v[w] : low.v[w], other = shfl_xor(part < 2 ? low.v[w] : high.v[w], 2);
        u32 first = part < 2 ? own : other, second = part < 2 ? other : own;
        apart.v[2 * w] = byte_perm(second, first, 0x05010400u);
        apart.v[2 * w + 1] = byte_perm(second, first, 0x07030602u);
    }
#endif
    if (!stores) return;
#if CODES_APART
    digits[piece_at(k, 4 * group + part / 2 * 2 + part % 2)] = apart;
#else
    ((u32x2 *)&digits[piece_at(k, 4 * group + part / 2)])[part % 2] = high;
    ((u32x2 *)&digits[piece_at(k, 4 * group + 2 + part / 2)])[part % 2] = low;
#endif
    if (part) return;
    float scale = most * (1.0f / 32512.0f) * factor;
#if HALVES == 2
    ((f32x4 *)digits)[piece_at(k, SCALES + group)] = f32x4{{scale, (float)(i32)total, (float)(i32)rest, 0}};
#else
    ((f32x2 *)&digits[piece_at(k, SCALES + group / 2)])[group % 2] = f32x2{{scale, (float)(i32)(total + rest)}};
#endif
}

// Where in a row the i-th 8 numbers begin, in the order of units, groups and quarters of a group.
DEVICE u32 eight_start(u32 i) { return group_start(i / (4 * GROUPS), i / 4 % GROUPS) + i % 4 * 8; }

// sum[r] += x . the k-th unit of row r.
DEVICE void multiply_unit(const Unit (&unit)[ROWS], float (&sum)[ROWS], const u32x4 *digits, u32 k) {
    u32 index = k % UNITS_PER_BLOCK;
    UNROLL for (u32 g = 0; g < GROUPS; ++g) {
        u32 code[ROWS][8];
        float scale[ROWS][HALVES], offset[ROWS][HALVES];
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            UNROLL for (u32 w = 0; w < 8; ++w) code[r][w] = digit_codes(unit[r], index, g, w);
            UNROLL for (u32 h = 0; h < HALVES; ++h) {
                group_scale(unit[r], index, g, h, scale[r][h], offset[r][h]);
                if (CODES_APART) offset[r][h] = scale[r][h] * (float)DIGIT_ZERO;
            }
        }
        u32x4 scales = digits[piece_at(k, SCALES + (HALVES == 2 ? g : g / 2))];
        u32 own = HALVES == 2 ? 0 : g % 2 * 2; // where the group's are in the piece
        i32 tops[ROWS], bottoms[ROWS];
        float product[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) tops[r] = 0, bottoms[r] = 0, product[r] = 0;
        UNROLL for (u32 h = 0; h < 2; ++h) {
            u32x4 top = digits[piece_at(k, 4 * g + h)], bottom = digits[piece_at(k, 4 * g + 2 + h)];
            UNROLL for (u32 r = 0; r < ROWS; ++r) {
                UNROLL for (u32 w = 0; w < 4; ++w) {
                    u32 four = code[r][4 * h + w];
                    tops[r] = dot4(four, top.v[w], tops[r]);
                    bottoms[r] = dot4(four, bottom.v[w], bottoms[r]);
                }
                if (HALVES == 1 && h == 0) continue;
                u32 part = HALVES == 2 ? h : 0;
                product[r] += scale[r][part] * (float)(tops[r] * 256 + bottoms[r]);
                if (HAS_OFFSET || DIGIT_ZERO) product[r] -= offset[r][part] * as_float(scales.v[own + 1 + part]);
                tops[r] = 0, bottoms[r] = 0;
            }
        }
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] += as_float(scales.v[own]) * product[r];
    }
}
