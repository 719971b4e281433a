// Products of one or few rows with matrices in ggml's block types, and these matrices as floats.
// Uses: _blocks
//
// Neighbouring threads read neighbouring units.
// -D FORMAT=ggml's number of the type; MOST=rows of x at most; ROWS=rows of the matrix that a team of TEAM threads takes;
// BLOCK=threads; AHEAD=units of each row that a thread reads before it needs them; OWN=groups of the one row of x whose
// digits a block makes itself, at most, or 0: quant_digits made them.

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
DEVICE void make_digits(const f16x8 &x, u32x4 *digits, u32 i, u32 units, bool stores) {
    u32 part = i % 4, group = i / 4 % GROUPS, k = i / (4 * GROUPS) % units, row = i / (4 * GROUPS) / units;
    u32 largest = 0; // bits of a float16 without its sign are in the order of their values, with NaN on top
    UNROLL for (u32 j = 0; j < 8; ++j) {
        u32 bits = x.v[j].bits & 0x7fffu;
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
            u32 n = as_u32(fma_rn(to_float(x.v[w * 4 + j]), inverse, 12583040.0f));
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

// Which 8 numbers of a row are made digits of `i`-th: in the order of units, groups and parts.
DEVICE f16x8 eight_of(const f16 *x, u32 i) {
    return *(const f16x8 *)(x + group_start(i / (4 * GROUPS), i / 4 % GROUPS) + i % 4 * 8);
}

KERNEL(128) quant_digits(const f16 *x, u32 *x_digits, u32 rows, u32 inner) {
    u32 i = BLOCK_X * 128 + THREAD, in_row = inner / 8, count = rows * in_row;
    f16x8 eight = {};
    if (i < count) eight = eight_of(x + (u64)(i / in_row) * inner, i % in_row);
    make_digits(eight, (u32x4 *)x_digits, i, inner / UNIT_WEIGHTS, i < count);
}

// One row of x: threads on a multiprocessor matter more than registers.
#undef RESIDENT
#define RESIDENT (MOST == 1 ? 1024 / BLOCK : 1)
KERNEL(BLOCK) quant_linear(const f16 *x, const u32 *x_digits, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, float *y, u32 rows, u32 inner, u32 outer, u32 stride, u32 column, u32 accumulate) {
    SHARED float partial[MOST_WAVES(BLOCK)][ROWS * MOST];
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS, lane = THREAD % TEAM;
    u32 first = (BLOCK_X * (BLOCK / TEAM) + THREAD / TEAM) * ROWS;
    u64 start[ROWS]; // the unit where a row begins; a row too many is computed and not stored
    UNROLL for (u32 r = 0; r < ROWS; ++r) start[r] = (u64)(first + r < outer ? first + r : outer - 1) * units;
    Unit next[AHEAD][ROWS];
#if OWN
    SHARED u32x4 digits[OWN / GROUPS * DIGIT_PIECES];
    const u32 turns = (4 * OWN + BLOCK - 1) / BLOCK;
    u32 eights = inner / 8;
    f16x8 eight[turns] = {};
    UNROLL for (u32 t = 0; t < turns; ++t)
        if (t * BLOCK + THREAD < eights) eight[t] = eight_of(x, t * BLOCK + THREAD);
#else
    const u32x4 *digits = (const u32x4 *)x_digits;
#endif
    UNROLL for (u32 a = 0; a < AHEAD; ++a)
        if (lane + a * TEAM < units)
            UNROLL for (u32 r = 0; r < ROWS; ++r) next[a][r] = read_unit(planes, start[r] + lane + a * TEAM);
#if OWN
    UNROLL for (u32 t = 0; t < turns; ++t) {
        u32 i = t * BLOCK + THREAD;
        make_digits(eight[t], digits, i, units, i < eights);
    }
    barrier();
#endif

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
        u32 index = k % UNITS_PER_BLOCK;
        UNROLL for (u32 g = 0; g < GROUPS; ++g) {
            u32 code[ROWS][8];
            float scale[ROWS][HALVES], offset[ROWS][HALVES];
            UNROLL for (u32 r = 0; r < ROWS; ++r) {
                UNROLL for (u32 w = 0; w < 8; ++w) code[r][w] = four_codes(unit[r], index, g, w);
                UNROLL for (u32 h = 0; h < HALVES; ++h) group_scale(unit[r], index, g, h, scale[r][h], offset[r][h]);
            }
            UNROLL for (u32 m = 0; m < MOST; ++m) {
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
    finish_product<TEAM>(sum, partial, bias, y, rows, outer, stride, column, accumulate);
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
