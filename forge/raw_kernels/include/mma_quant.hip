// The pieces of products of few rows of x with a quantized matrix by NVIDIA's mma.m16n8k16: `matmul_mma_quant`, `expert_mma_quant`.
//
// Codes are multiplied as they are, and their scales by the sums: what a weight takes is half an instruction, not two. A code n below
// an exponent is a float16 number by one instruction for two codes: 0x7400 | n is 16384 + 16 n, and 0x6400 | 16 n is 1024 + 16 n. So
// accumulators of a group of one scale begin with -16384 or -1024 times the sum of its x, the code of zero included, and become 16 times
// the sum of its codes times x. Codes of MXFP4 in a float16's place are numbers themselves, of 1/32768. Minima are multiplied by the sums of x of their groups, in one instruction for a line.
//
// A line is 256 weights of a row. Its planes go to LDS by asynchronous copies, STAGES - 1 lines ahead. Each wave reads only rows that its
// own lanes have copied. All waves need x: each places a line of 8 rows of it in the order in which lanes read it, with its sums.
// A word of four codes is two pairs, the first and the third, then the second and the fourth, because so codes come out of their words.
// -D FORMAT=ggml's number of the type; STAGES in LDS; X_PLACES of lines of 8 rows of x; LDS_BYTES=the size of both;
// TOKENS, TILES, BLOCK of matmul_epilogue. HAS_TAIL=1: the last line of a row, of MXFP4, is not whole.

#ifndef HAS_TAIL
#define HAS_TAIL 0
#endif

#define LINE_WEIGHTS 256
#define LINE_GROUPS 8
#define OCTETS (TOKENS / 8)
#define X_LINES (X_PLACES / OCTETS) // whose x is in LDS together: waves place 8 rows of one in turns
// Pieces of 16 bytes of a row's line, in each plane.
#define QUANT_PIECES (FORMAT == Q8_0 ? 16 : 8)
#define HIGH_PIECES (FORMAT == Q6_K ? 4 : FORMAT == Q5_K ? 2 : 0)
#define SCALE_PIECES (IS_K ? 1 : 0)
#define DELTA_PIECES (IS_K || FORMAT == MXFP4 || FORMAT == Q4_G128 ? 0 : HAS_OFFSET ? 2 : 1)
#define HAS_REST (FORMAT == Q6_K || FORMAT == MXFP4 || FORMAT == Q4_G128) // scales of blocks that are less than a piece
#define WAVE_ROWS (16 * TILES)
// A lane's words of the two steps of a group lie beside each other. Where they do not, lanes of a part have words of a step together.
#define IS_PAIRED (SIX_BIT_SCALES || FORMAT == Q8_0)
#define SCALES_OF_GROUP HALVES
#define LINE_SCALES (LINE_GROUPS * SCALES_OF_GROUP)
#define BLOCKS (FORMAT == Q8_0 ? 8 : 4) // of 32 bytes of codes: of one group, or of two
#define BLOCK_GROUPS (LINE_GROUPS / BLOCKS)
#define CODE_FACTOR (FORMAT == Q8_0 ? 1.0f : FORMAT == MXFP4 ? 1.0f / 32768 : 16.0f)

// A stage of a wave: plane after plane, in each the pieces of a row together.
#define HIGH_AT (WAVE_ROWS * QUANT_PIECES)
#define SCALES_AT (HIGH_AT + WAVE_ROWS * HIGH_PIECES)
#define DELTAS_AT (SCALES_AT + WAVE_ROWS * SCALE_PIECES)
typedef u32x4 WaveStage[DELTAS_AT + WAVE_ROWS * DELTA_PIECES];
typedef float TileSums[TILE_VALUES];
struct XLine {                      // of 8 rows
    u32x4 x[LINE_GROUPS][32];       // a lane's pairs of both steps
    TileSums begin[LINE_SCALES][4]; // of the accumulators, by the lane's part
    u32x2 sums[32];                 // a lane's sums of two groups, of 1/16 of x: as float16, and what that leaves
};
struct Memory {
    XLine x[X_PLACES];
    WaveStage stages[STAGES][WAVES];
};
static_assert(sizeof(Memory) == LDS_BYTES, "another size than the host takes");

// Lanes that read together find their pieces in different banks: a row's piece lies in its plane where bits of the row exchange it.
template <u32 P> DEVICE u32 exchange_of(u32 row) { return IS_PAIRED ? P < 8 ? 0 : row % 4 * 2 : P == 8 ? row % 8 : P == 4 ? row / 2 % 4 : 0; }

// The pieces of a plane that a lane copies: where the next line's lie in device memory. row_of(tile, row) is the row of the matrix that
// is the row-th of a wave's tile; rows have so many pieces of 32 weights where the last line is not whole.
template <u32 P> struct Copies {
    static const u32 EACH = (WAVE_ROWS * P + TILE_WAVE - 1) / TILE_WAVE;
    const u32x4 *from[EACH];
};
template <u32 P, typename Rows> DEVICE void prepare_copies(Copies<P> &c, const Rows &row_of, const u8 *plane, u32 lines, u32 first, u32 pieces) {
    UNROLL for (u32 e = 0; e < Copies<P>::EACH; ++e) {
        u32 n = e * TILE_WAVE + LANE, row = n / P, of_matrix = row < WAVE_ROWS ? row_of(row / 16, row % 16) : 0;
        c.from[e] = (const u32x4 *)plane + (HAS_TAIL ? of_matrix * pieces + first * P : (of_matrix * lines + first) * P) + n % P;
    }
}
// there: pieces of the line that there are.
template <u32 P> DEVICE void copy_line(u32x4 *to, Copies<P> &c, u32 there) {
    u32 row = LANE / P, own = row * P + (LANE % P ^ exchange_of<P>(row));
    UNROLL for (u32 e = 0; e < Copies<P>::EACH; ++e) {
        const u32 further = e * TILE_WAVE / P, exchange = exchange_of<P>(further); // has no bit of that of `row`
        if (WAVE_ROWS * P % TILE_WAVE == 0 || LANE < WAVE_ROWS * P) copy_async(to + e * TILE_WAVE + (own ^ exchange), c.from[e], !HAS_TAIL || LANE % P < there);
        c.from[e] += P;
    }
}
struct LineCopies {
    Copies<QUANT_PIECES> quants;
#if HIGH_PIECES
    Copies<HIGH_PIECES> high;
#endif
#if SCALE_PIECES
    Copies<SCALE_PIECES> scales;
#endif
#if DELTA_PIECES
    Copies<DELTA_PIECES> deltas;
#endif
};
template <typename Rows> DEVICE void prepare_line(LineCopies &c, const Rows &row_of, const Planes &planes, u32 lines, u32 first, u32 pieces = 0) {
    prepare_copies(c.quants, row_of, planes.quants, lines, first, pieces);
#if HIGH_PIECES
    prepare_copies(c.high, row_of, planes.high, lines, first, pieces);
#endif
#if SCALE_PIECES
    prepare_copies(c.scales, row_of, planes.scales, lines, first, pieces);
#endif
#if DELTA_PIECES
    prepare_copies(c.deltas, row_of, planes.deltas, lines, first, pieces);
#endif
}
DEVICE void copy_weights(WaveStage &to, LineCopies &c, u32 there = QUANT_PIECES) {
    copy_line(to, c.quants, there);
#if HIGH_PIECES
    copy_line(to + HIGH_AT, c.high, there);
#endif
#if SCALE_PIECES
    copy_line(to + SCALES_AT, c.scales, there);
#endif
#if DELTA_PIECES
    copy_line(to + DELTAS_AT, c.deltas, there);
#endif
}

// Which codes: the i-th group of a block of 32 bytes, and where in their bytes the codes of a step are.
DEVICE u32 group_of(u32 block, u32 i) { return FORMAT == Q6_K ? block / 2 * 4 + block % 2 + 2 * i : block * BLOCK_GROUPS + i; }
DEVICE bool is_upper(u32 group, u32 step) {
    return FORMAT == Q8_0 ? false : FORMAT == Q6_K ? group / 2 % 2 : HALF_BY_HALF ? step : group % 2;
}
// Two codes of zero as they are multiplied.
DEVICE u32 zero_codes(u32 group, u32 step) {
    return FORMAT == MXFP4 ? 0 : (FORMAT == Q8_0 ? 0x6480u : is_upper(group, step) ? 0x6400u | ZERO << 4 : 0x7400u | ZERO) * 0x10001u;
}

// Where in a stage a lane's words of the first row lie, by block of codes, and those of high bits.
struct Places {
    u32 quants[4][2], high[2][2];
};
DEVICE Places places_of_codes() {
    Places p;
    u32 row = LANE / 4, part = tile_part();
    UNROLL for (u32 i = 0; i < 4; ++i)
        UNROLL for (u32 s = 0; s < 2; ++s) {
            u32 piece = IS_PAIRED ? 2 * i + part / 2 : 2 * i + s, word = IS_PAIRED ? part % 2 * 2 + s : part;
            p.quants[i][s] = (row * QUANT_PIECES + (piece ^ exchange_of<QUANT_PIECES>(row))) * 4 + word;
#if HIGH_PIECES
            piece = IS_PAIRED ? part / 2 : i % 2 * 2 + s;
            p.high[i % 2][s] = (HIGH_AT + row * HIGH_PIECES + (piece ^ exchange_of<HIGH_PIECES>(row))) * 4 + word;
#endif
        }
    return p;
}

// A lane's codes of a row, of a block: words of both steps, or of both groups, and their high bits.
struct Codes {
    u32 quants[2], high[2];
};
DEVICE void read_words(u32 (&to)[2], const u32 *words, const u32 (&places)[2]) {
    if (IS_PAIRED) {
        u32x2 two = *(const u32x2 *)(words + places[0]);
        to[0] = two.v[0], to[1] = two.v[1];
    } else
        UNROLL for (u32 s = 0; s < 2; ++s) to[s] = words[places[s]];
}
DEVICE void read_codes(Codes &to, const WaveStage &stage, const Places &p, u32 row, u32 block) { // row: behind the lane's first
    const u32 *words = (const u32 *)stage;
    read_words(to.quants, words + (row * QUANT_PIECES + block / 4 * 8) * 4, p.quants[block % 4]);
#if HIGH_PIECES // of all blocks, or of two
    read_words(to.high, words + row * HIGH_PIECES * 4, p.high[FORMAT == Q6_K ? block / 2 : 0]);
#endif
}

// What stays in registers: an instruction has room for one constant.
struct Masks {
    u32 low, high, byte, exponent, e2m1; // exponent: that of 2 ** 23
};
// The j-th two codes of a step as float16.
DEVICE u32 two_codes(const Codes &codes, u32 block, u32 group, u32 step, u32 j, const Masks &masks) {
#if FORMAT == MXFP4 // a sign, then the last two bits of an exponent and the first of a fraction
    u32 nibble = codes.quants[group % 2];
    const u32 at = 8 * j + 4 * step;
    return and_or(at > 9 ? nibble >> (at - 9) : nibble << (9 - at), masks.e2m1, nibble << (12 - at) & 0x80008000u);
#else
    u32 word = codes.quants[HALF_BY_HALF ? group % 2 : step] >> 8 * j;
#endif
#if FORMAT == Q8_0
    return (word & masks.byte) ^ 0x64806480u;
#elif FORMAT != MXFP4
    const bool upper = is_upper(group, step);
    u32 two = and_or(word, upper ? masks.high : masks.low, upper ? 0x64006400u : 0x74007400u);
    u32 bits = codes.high[step];
#if FORMAT == Q6_K
    bits = j ? bits >> (4 + block % 2 * 2) : bits << (4 - block % 2 * 2);
    two = and_or(bits, upper ? 0x03000300u : 0x00300030u, two);
#elif FORMAT == Q5_K
    const u32 at = 2 * block + upper + 8 * j, to = upper ? 8 : 4;
    bits = at < to ? bits << (to - at) : bits >> (at - to);
    two = and_or(bits, upper ? 0x01000100u : 0x00100010u, two);
#endif
    return two;
#endif
}

// The scales of a row's line: float16 of each group, or whole numbers and one float16 of all.
struct Scales {
    u32 words[4], delta; // above delta the minimum
};
// What a row's line has of scales of blocks, less than a piece. It is read one line ahead.
struct Rest {
    u32 words[2];
};
DEVICE Rest load_rest(const u8 *deltas, u32 line) {
    Rest rest = {};
#if FORMAT == Q6_K
    rest.words[0] = ((const u16 *)deltas)[line];
#elif FORMAT == MXFP4 || FORMAT == Q4_G128
    u32x2 words = ((const u32x2 *)deltas)[line];
    UNROLL for (u32 i = 0; i < 2; ++i) rest.words[i] = words.v[i];
#endif
    return rest;
}
#if HAS_TAIL
// The same of a line whose blocks begin with a plane's `first`; there are so many of it, an even number.
DEVICE Rest load_some_rest(const u8 *deltas, u32 first, u32 there) {
    Rest rest = {};
    UNROLL for (u32 i = 0; i < 4; ++i)
        if (2 * i < there) rest.words[i / 2] |= (u32)((const u16 *)(deltas + first))[i] << i % 2 * 16;
    return rest;
}
#endif
DEVICE Scales read_scales(const WaveStage &stage, u32 row, const Rest &rest) {
    Scales s;
    s.delta = rest.words[0];
#if FORMAT == MXFP4 // exponents of halves of the scales: each byte 1 less, but where it is 0
    UNROLL for (u32 i = 0; i < 2; ++i)
        s.words[i] = rest.words[i] - (((rest.words[i] & 0x7f7f7f7fu) + 0x7f7f7f7fu | rest.words[i]) >> 7 & 0x01010101u);
    s.words[2] = s.words[3] = 0;
#endif
#if SIX_BIT_SCALES
    u32x4 all = stage[SCALES_AT + row];
    s.words[0] = all.v[1] & 0x3f3f3f3fu;
    s.words[1] = (all.v[3] & 0x0f0f0f0fu) | (all.v[1] >> 2 & 0x30303030u);
    s.words[2] = s.words[3] = 0;
    s.delta = all.v[0];
#elif FORMAT == Q6_K
    u32x4 all = stage[SCALES_AT + row];
    UNROLL for (u32 i = 0; i < 4; ++i) s.words[i] = all.v[i];
#elif DELTA_PIECES == 1
    u32x4 all = stage[DELTAS_AT + row];
    UNROLL for (u32 i = 0; i < 4; ++i) s.words[i] = all.v[i];
#elif FORMAT == Q4_G128 // and zeros
    UNROLL for (u32 i = 0; i < 4; ++i) s.words[i] = rest.words[i % 2];
#elif FORMAT != MXFP4
    UNROLL for (u32 i = 0; i < 4; ++i) s.words[i] = 0;
#endif
    return s;
}
DEVICE float scale_of(const Scales &s, const WaveStage &stage, u32 row, u32 group, u32 half, const Masks &masks) {
#if SIX_BIT_SCALES
    const u32 byte = group % 4;
    return as_float(byte_perm(masks.exponent, s.words[group / 4], 0x07050400u + byte)) - 8388608.0f;
#elif FORMAT == Q6_K // of 16 weights: those of a half follow each other, as groups do
    return (float)(i8)(s.words[group / 2] >> 8 * (group % 2 * 2 + half));
#elif FORMAT == MXFP4
    return as_float(byte_perm(0, s.words[group / 4], 0x00040404u | group % 4 << 24) >> 1);
#elif FORMAT == Q4_G128
    return to_float(f16{(u16)s.words[group / 4]});
#elif DELTA_PIECES == 1
    return to_float(f16{(u16)(s.words[group / 2] >> 16 * (group % 2))});
#else
    return to_float(f16{((const u16 *)&stage[DELTAS_AT + row * DELTA_PIECES])[2 * group]});
#endif
}
// Minima of the lane's part's two groups as float16: whole numbers, or negative as they are. Of codes of zero there are two pieces, the
// product with the scale rounded and what that leaves.
#define MINIMA_PIECES (HAS_ZEROS ? 2 : 1)
DEVICE void minima_of(const WaveStage &stage, u32 row, const Scales &s, u32 (&to)[MINIMA_PIECES]) {
    u32 part = tile_part();
#if SIX_BIT_SCALES
    const u32 *words = (const u32 *)&stage[SCALES_AT + row];
    u32 shift = part % 2 * 16, second = words[2] >> shift, last = words[3] >> shift;
    u32 minima = part < 2 ? second & 0x3f3f : (last >> 4 & 0x0f0f) | (second >> 2 & 0x3030);
    to[0] = add_f16x2(byte_perm(0x64006400u, minima, 0x07010500u), 0xe400e400u);
#else
#if FORMAT == Q4_G128
    u32 both = part / 2 ? s.words[1] : s.words[0];
    u32x2 two = u32x2{{both, both}};
#else
    u32x2 two = ((const u32x2 *)&stage[DELTAS_AT + row * DELTA_PIECES])[part];
#endif
    to[0] = byte_perm(two.v[1], two.v[0], 0x07060302u);
#if HAS_ZEROS
    u32 scales = byte_perm(two.v[1], two.v[0], 0x05040100u), zeros = add_f16x2(0x64006400u, 0xe400e400u + to[0]); // 1024 - (1024 + n)
    to[0] = fma_f16x2(scales, zeros, 0), to[1] = fma_f16x2(scales, zeros, to[0] ^ 0x80008000u);
#endif
#endif
}

// A lane's numbers of a line of 8 rows of x. Rows past the last are zeros.
typedef u32x2 XNumbers[LINE_GROUPS][2];
// row_of_x(token) is where in x a token's row is.
template <typename Rows> DEVICE void read_x(XNumbers &numbers, const f16 *x, const Rows &row_of_x, u32 line, u32 first_token, u32 rows, u32 inner) {
    u32 token = first_token + LANE / 4;
    const f16 *from = x + (u64)row_of_x(token) * inner + line * LINE_WEIGHTS + tile_part() * (IS_PAIRED ? 8 : 4);
    UNROLL for (u32 g = 0; g < LINE_GROUPS; ++g) {
        numbers[g][0] = numbers[g][1] = u32x2{};
        if (token >= rows || (HAS_TAIL && line * LINE_WEIGHTS + g * 32 >= inner)) continue;
#if IS_PAIRED
        u32x4 both = *(const u32x4 *)(from + g * 32);
        numbers[g][0] = u32x2{{both.v[0], both.v[1]}}, numbers[g][1] = u32x2{{both.v[2], both.v[3]}};
#else
        UNROLL for (u32 s = 0; s < 2; ++s) numbers[g][s] = *(const u32x2 *)(from + g * 32 + s * 16);
#endif
    }
}
// The pairs of each lane, the begin of accumulators, and the sums of groups.
DEVICE void place_line(XLine &to, const XNumbers &numbers) {
    u32 part = tile_part(), row = LANE / 4;
    TileSums begin = {}, sums = {};
    UNROLL for (u32 g = 0; g < LINE_GROUPS; ++g) {
        u32 pairs[2][2];
        UNROLL for (u32 s = 0; s < 2; ++s)
            UNROLL for (u32 j = 0; j < 2; ++j)
                pairs[s][j] = byte_perm(numbers[g][s].v[1], numbers[g][s].v[0], j ? 0x07060302u : 0x05040100u);
        to.x[g][LANE] = u32x4{{pairs[0][0], pairs[0][1], pairs[1][0], pairs[1][1]}};
        UNROLL for (u32 s = 0; s < 2; ++s) { // row i of the sums is of the i-th scale
            const u32 i = g * SCALES_OF_GROUP + s % SCALES_OF_GROUP, zero = zero_codes(g, s) | 0x80008000u;
            u32 own = i % 8 == row ? zero : 0, a[4] = {i < 8 ? own : 0, i < 8 ? 0 : own, i < 8 ? own : 0, i < 8 ? 0 : own};
            if (!SIX_BIT_SCALES) mma_m16n8k16(begin, a, pairs[s]);
#if HAS_OFFSET
            u32 one = g == row ? 0x3c003c00u : 0, ones[4] = {one, 0, one, 0};
            mma_m16n8k16(sums, ones, pairs[s]);
#endif
        }
    }
    if (SIX_BIT_SCALES) UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) begin[i] = sums[i] * to_float(f16{(u16)(zero_codes(row, 0) | 0x8000)});
    UNROLL for (u32 h = 0; h < SCALES_OF_GROUP; ++h)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) to.begin[row + 8 * h][part][i] = begin[2 * h + i % 2];
#if HAS_OFFSET
    UNROLL for (u32 i = 0; i < 2; ++i) { // of group `row`, of tokens 2 * part + i
        float sum = sums[i] * 0.0625f;
        f16 most = to_f16(sum), rest = to_f16(sum - to_float(most));
        f16 *own = (f16 *)&to.sums[(part * 2 + i) * 4 + row / 2];
        own[row % 2] = most, own[2 + row % 2] = rest;
    }
#endif
}

// The wave's places of the lines from `first` on. It reads all before it writes the first.
#define WAVE_PLACES ((X_PLACES + WAVES - 1) / WAVES)
template <typename Rows> DEVICE void place_x(XLine *to, const f16 *x, const Rows &row_of_x, u32 first, u32 end, u32 rows, u32 inner) {
    u32 wave = THREAD / TILE_WAVE, places = smaller((end - first) * OCTETS, (u32)X_PLACES);
    if (wave >= places) return;
    XNumbers numbers[WAVE_PLACES];
    UNROLL for (u32 i = 0; i < WAVE_PLACES; ++i) {
        u32 place = wave + i * WAVES;
        if (i == 0 || place < places) read_x(numbers[i], x, row_of_x, first + place / OCTETS, place % OCTETS * 8, rows, inner);
    }
    UNROLL for (u32 i = 0; i < WAVE_PLACES; ++i)
        if (i == 0 || wave + i * WAVES < places) place_line(to[wave + i * WAVES], numbers[i]);
}

typedef Scales WaveScales[TILES][TILE_LANE_ROWS];

// The products of a block of codes with all rows of x, times its scales.
DEVICE void multiply_block(
    Sums &sum, const WaveStage &stage, const XLine *x, const WaveScales &scales, const Places &places, const Masks &masks, u32 block
) {
    u32 weights[TILES][BLOCK_GROUPS][2][4];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            Codes codes;
            read_codes(codes, stage, places, t * 16 + r * 8, block);
            UNROLL for (u32 i = 0; i < BLOCK_GROUPS; ++i)
                UNROLL for (u32 s = 0; s < 2; ++s)
                    UNROLL for (u32 j = 0; j < 2; ++j) weights[t][i][s][2 * j + r] = two_codes(codes, block, group_of(block, i), s, j, masks);
        }
    UNROLL for (u32 i = 0; i < BLOCK_GROUPS; ++i)
        UNROLL for (u32 m = 0; m < OCTETS; ++m) {
            const u32 group = group_of(block, i);
            u32x4 both = x[m].x[group][LANE];
            u32 pairs[2][2] = {{both.v[0], both.v[1]}, {both.v[2], both.v[3]}};
            UNROLL for (u32 h = 0; h < SCALES_OF_GROUP; ++h) {
                u32x4 begin = *(const u32x4 *)x[m].begin[group * SCALES_OF_GROUP + h][tile_part()];
                UNROLL for (u32 t = 0; t < TILES; ++t) {
                    TileSums products;
                    UNROLL for (u32 v = 0; v < TILE_VALUES; ++v) products[v] = as_float(begin.v[v]);
                    UNROLL for (u32 s = h; s < 2; s += SCALES_OF_GROUP) mma_m16n8k16(products, weights[t][i][s], pairs[s]);
                    UNROLL for (u32 v = 0; v < TILE_VALUES; ++v)
                        sum[t][m][v] += scale_of(scales[t][v / 2], stage, t * 16 + tile_row(v / 2), group, h, masks) * products[v];
                }
            }
        }
}

#if HAS_OFFSET
// The minima of a line times 1/16 of the sums of x.
DEVICE void add_minima(Sums &sum, const WaveStage &stage, const XLine *x, const WaveScales &scales) {
    UNROLL for (u32 t = 0; t < TILES; ++t) {
        u32 low[MINIMA_PIECES], upper[MINIMA_PIECES];
        minima_of(stage, t * 16 + tile_row(0), scales[t][0], low), minima_of(stage, t * 16 + tile_row(1), scales[t][1], upper);
        UNROLL for (u32 i = 0; i < MINIMA_PIECES; ++i) {
            u32 a[4] = {low[i], upper[i], low[i], upper[i]};
            UNROLL for (u32 m = 0; m < OCTETS; ++m) mma_m16n8k16(sum[t][m], a, x[m].sums[LANE].v);
        }
    }
}
DEVICE void take_minima(Sums &sum, const WaveStage &stage, const XLine *x, const WaveScales &scales) {
    Sums minima;
    clear_sums(minima);
    add_minima(minima, stage, x, scales);
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 m = 0; m < OCTETS; ++m)
            UNROLL for (u32 v = 0; v < TILE_VALUES; ++v)
                sum[t][m][v] -= to_float(f16{(u16)(scales[t][v / 2].delta >> 16)}) * (16 * CODE_FACTOR) * minima[t][m][v];
}
#endif

// Adds the products of a line with all rows of x. What is subtracted for minima beside a scale of each group is in `minima`.
DEVICE void multiply_line(
    Sums &sum, Sums &minima, const WaveStage &stage, const XLine *x, const WaveScales &scales, const Places &places, const Masks &masks
) {
#if IS_K
    Sums of_line; // before the scales of blocks
    clear_sums(of_line);
#else
    Sums &of_line = sum;
#endif
    UNROLL for (u32 block = 0; block < BLOCKS; ++block) multiply_block(of_line, stage, x, scales, places, masks, block);
#if HAS_OFFSET && IS_K
    take_minima(sum, stage, x, scales);
#elif HAS_OFFSET
    add_minima(minima, stage, x, scales);
#endif
#if IS_K
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 m = 0; m < OCTETS; ++m)
            UNROLL for (u32 v = 0; v < TILE_VALUES; ++v)
                sum[t][m][v] += to_float(f16{(u16)scales[t][v / 2].delta}) * of_line[t][m][v];
#endif
}
// What the sums of all lines stand for.
DEVICE void finish_sums(Sums &sum, const Sums &minima) {
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 m = 0; m < OCTETS; ++m)
            UNROLL for (u32 v = 0; v < TILE_VALUES; ++v) {
                sum[t][m][v] *= 1 / CODE_FACTOR;
#if HAS_OFFSET && !IS_K
                sum[t][m][v] += 16 * minima[t][m][v];
#endif
            }
}
DEVICE Masks masks_of(u32 nothing) { // 0, as no compiler knows: so each thread keeps these constants in registers
    return Masks{0x000f000fu | nothing, 0x00f000f0u | nothing, 0x00ff00ffu | nothing, 0x4b000000u | nothing, 0x0e000e00u | nothing};
}
