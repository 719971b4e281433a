// Products of one row of x with a matrix in ggml's block types: y[n] = x . weight[n] (+ bias[n]) (+ what y holds), or gated.
// Uses: quant_blocks, matvec_row
//
// Neighbouring threads read neighbouring units of a row of the matrix.
// -D FORMAT=ggml's number of the type; ROWS=rows of the matrix that a team of THREADS_PER_ROW threads takes; BLOCK=threads;
// MIN_BLOCKS=blocks that a multiprocessor holds; MAX_GROUPS=groups of 32 numbers of x at most; IN=f16, or float: x is of the residual stream and is normalized here; OUT=float, or f16:
// activation(gate) * up of rows n and outer + n; SILU=1, or 0: the activation is GELU.

// y = x @ weight.T by integer dot products of bytes: the codes times x, which becomes integers of 16 bits under one
// scale for the 32 numbers of a group, as two signed digits to the base 256. Rounding x so costs less than the
// float16 that it is kept in did: half a step is 1/65024 of the largest of the 32.

// The digits of a unit are pieces of 16 bytes: for each group two of high digits and two of low ones, then the groups' scales,
// each with the sum of the integers of the group or of its halves.
#define SCALES (4 * GROUPS)
#define DIGIT_PIECES (SCALES + (HALVES * GROUPS + 1) / 2 | 1) // odd: neighbouring units are in other banks of LDS

// Where a piece of the k-th unit is.
DEVICE u32 piece_at(u32 k, u32 piece) { return k * DIGIT_PIECES + piece; }

// Four neighbouring lanes make a group, 8 numbers each; all lanes of a wave call it, those with nothing to store too. NaN and
// infinity make the scale one of them.
DEVICE void make_digits(const u32x4 &x, u32x4 *digits, u32 i, bool stores) {
    u32 part = i % 4, group = i / 4 % GROUPS, k = i / (4 * GROUPS);
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
    ((u32x2 *)&digits[piece_at(k, 4 * group + part / 2)])[part % 2] = high;
    ((u32x2 *)&digits[piece_at(k, 4 * group + 2 + part / 2)])[part % 2] = low;
    if (part) return;
    float scale = most * (1.0f / 32512.0f);
#if HALVES == 2
    ((f32x4 *)digits)[piece_at(k, SCALES + group)] = f32x4{{scale, (float)(i32)total, (float)(i32)rest, 0}};
#else
    ((f32x2 *)&digits[piece_at(k, SCALES + group / 2)])[group % 2] = f32x2{{scale, (float)(i32)(total + rest)}};
#endif
}

// Where in a row the 8 numbers begin that are made digits of `i`-th: in the order of units, groups and parts.
DEVICE u32 eight_start(u32 i) { return group_start(i / (4 * GROUPS), i / 4 % GROUPS) + i % 4 * 8; }

// The products of a unit of each row of the matrix, the k-th of its row, with x are added to sum.
DEVICE void multiply_unit(const Unit (&unit)[ROWS], float (&sum)[ROWS], const u32x4 *digits, u32 k) {
    u32 index = k % UNITS_PER_BLOCK;
    UNROLL for (u32 g = 0; g < GROUPS; ++g) {
        u32 code[ROWS][8];
        float scale[ROWS][HALVES], offset[ROWS][HALVES];
        UNROLL for (u32 r = 0; r < ROWS; ++r) {
            UNROLL for (u32 w = 0; w < 8; ++w) code[r][w] = four_codes(unit[r], index, g, w);
            UNROLL for (u32 h = 0; h < HALVES; ++h) group_scale(unit[r], index, g, h, scale[r][h], offset[r][h]);
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
                if (HAS_OFFSET || ZERO) product[r] -= offset[r][part] * as_float(scales.v[own + 1 + part]);
                tops[r] = 0, bottoms[r] = 0;
            }
        }
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] += as_float(scales.v[own]) * product[r];
    }
}

// A team's units of its rows from output `first` on. Past the end all threads read the matrix's first unit: loads without a
// branch let the compiler wait for those before them alone.
DEVICE void read_units(Unit (&unit)[ROWS], const Planes &planes, u32 first, u32 k, bool there, u32 units, u32 outer) {
    UNROLL for (u32 r = 0; r < ROWS; ++r)
        unit[r] = read_unit(planes, there && k < units ? (u64)team_row<OUT, ROWS>(first, r, outer) * units + k : 0);
}

// One row of x, whose digits each block makes itself; it goes on to other rows of the matrix, and their first units are on
// their way while sums are joined. Threads on a multiprocessor matter more than registers.
KERNEL(BLOCK) matvec_quant(const IN *x, const float *norm, float eps, const u8 *quants, const u8 *high, const u8 *scales, const u8 *deltas, const float *bias, OUT *y, u32 inner, u32 outer, u32 blocks, u32 accumulate) {
    SHARED u32x4 digits[MAX_GROUPS / GROUPS * DIGIT_PIECES];
    SHARED float partial[2][MAX_WAVES(BLOCK)][ROWS], scratch[MAX_WAVES(BLOCK)];
    const u32 outputs = Outputs<OUT, ROWS>::per_team, turns = (4 * MAX_GROUPS + BLOCK - 1) / BLOCK;
    Planes planes{quants, high, scales, deltas};
    u32 units = inner / UNIT_WEIGHTS, lane = THREAD % THREADS_PER_ROW, team = THREAD / THREADS_PER_ROW * outputs;
    u32 first = BLOCK_X * (BLOCK / THREADS_PER_ROW) * outputs, stride = blocks * (BLOCK / THREADS_PER_ROW) * outputs;
    u32 at[turns]; // of eight numbers of x: in the order of units, groups and parts
    UNROLL for (u32 t = 0; t < turns; ++t) at[t] = eight_start(t * BLOCK + THREAD);
    Row<IN, turns> row;
    Unit next[ROWS];
    u32 ahead = first, start = 0; // the outputs and the units that are read next
    if (STARTS_EARLY) read_units(next, planes, ahead + team, lane, ahead < outer, units, outer);
    grid_dependency_sync();
    read_row(row, x, norm, at, inner);
    if (!STARTS_EARLY) read_units(next, planes, ahead + team, lane, ahead < outer, units, outer); // x is needed first
    u32x4 eight[turns];
    finish_row(eight, row, eps, inner, scratch);
    UNROLL for (u32 t = 0; t < turns; ++t) make_digits(eight[t], digits, t * BLOCK + THREAD, at[t] < inner);
    lds_barrier();

    for (u32 turn = 0; first < outer; first += stride, turn ^= 1) {
        u32 n = own_output<THREADS_PER_ROW, OUT, ROWS, BLOCK>(first, outer);
        Addends more{};
        if (n < outer) more = read_addends(y, n, bias, outer, accumulate);
        float sum[ROWS];
        UNROLL for (u32 r = 0; r < ROWS; ++r) sum[r] = 0;
        for (u32 k = lane; k < units + lane; k += THREADS_PER_ROW) { // as many times for each thread of a team
            Unit unit[ROWS];
            UNROLL for (u32 r = 0; r < ROWS; ++r) unit[r] = next[r];
            start += THREADS_PER_ROW;
            if (start >= units) start = 0, ahead += stride;
            read_units(next, planes, ahead + team, start + lane, ahead < outer, units, outer);
            if (k < units) multiply_unit(unit, sum, digits, k);
        }
        finish_vector<THREADS_PER_ROW, SILU>(sum, partial[turn], n, more, y, outer);
    }
}
