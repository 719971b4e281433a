// Lines of 256 weights of a quantized matrix: into LDS by asynchronous copies, and from there into registers as float16, as the lanes
// of a wave hold them for wgmma. For products whose inner dimension is a multiple of 256.
// A line's numbers are in an order of their own: a lane has a part, 64 of the 256, and a step of 16 numbers is four of each part, the
// first and the third as a pair, then the second and the fourth, because so codes come out of their words. A quarter is four steps.
// -D FORMAT=ggml's number of the type; STAGES in LDS; TILES, BLOCK of matmul_epilogue.

#define LINE_WEIGHTS 256
#define PARTS 4
#define IS_NIBBLES (FORMAT == Q4_0 || FORMAT == Q4_1 || FORMAT == Q4_K || HAS_ZEROS)
#define AT_TOP (FORMAT == Q4_1 || FORMAT == Q4_K) // of a float16's 10 bits, as Factors say
// Pieces of 16 bytes of a row's line, in each plane. What is no whole piece is a Rest.
#define QUANT_PIECES (TWO_BITS ? 4 : FORMAT == Q8_0 ? 16 : 8)
#define HIGH_PIECES (FORMAT == Q6_K ? 4 : FORMAT == Q3_K || FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == Q5_K ? 2 : 0)
#define SCALE_PIECES (SIX_BIT_SCALES || FORMAT == Q2_K || FORMAT == Q6_K ? 1 : 0)
#define DELTA_PIECES (IS_K || FORMAT == MXFP4 || FORMAT == Q4_G128 ? 0 : HAS_OFFSET ? 2 : 1)
#define HAS_REST ((IS_K || FORMAT == MXFP4 || FORMAT == Q4_G128) && !SIX_BIT_SCALES)
#define WAVE_ROWS (16 * TILES)
#define QUARTERS 4                                           // of a line: 16 weights of each part, half of a group of 32

// A stage of a wave: plane after plane, in each the pieces of a row together.
#define HIGH_AT (WAVE_ROWS * QUANT_PIECES)
#define SCALES_AT (HIGH_AT + WAVE_ROWS * HIGH_PIECES)
#define DELTAS_AT (SCALES_AT + WAVE_ROWS * SCALE_PIECES)
typedef u32x4 WaveStage[DELTAS_AT + WAVE_ROWS * DELTA_PIECES];

// The place of a row's piece in its plane: lanes that read together find their pieces in different banks. That of row + 8 is 8 P further.
template <u32 P> DEVICE u32 piece_place(u32 row, u32 piece) {
    return row * P + (P == 16 ? piece ^ piece / 8 ^ row % 2 * 2 : P == 8 ? piece ^ row % 8 : piece);
}

// The pieces of a plane that a lane copies: where the first line's lie in device memory, and the place of the first of them in LDS.
template <u32 P> struct Copies {
    static const u32 EACH = (WAVE_ROWS * P + TILE_WAVE - 1) / TILE_WAVE;
    u32 first[EACH], place; // in pieces
};
template <u32 P> DEVICE void prepare_copies(Copies<P> &c, const Product &product, u32 lines) {
    c.place = kept(piece_place<P>(LANE / P, LANE % P));
    UNROLL for (u32 e = 0; e < Copies<P>::EACH; ++e) {
        u32 n = e * TILE_WAVE + LANE, row = n / P;
        c.first[e] = kept(row < WAVE_ROWS ? matrix_row(product, row / 16, row % 16) * lines * P + n % P : 0);
    }
}
template <u32 P> DEVICE void copy_line(u32x4 *to, const Copies<P> &c, const u8 *plane, u32 line) {
    const u32x4 *from = kept((const u32x4 *)plane + line * P); // so that each address is one instruction
    UNROLL for (u32 e = 0; e < Copies<P>::EACH; ++e) {
        u32 place = e * TILE_WAVE + (P == 8 && e % 2 ? c.place ^ 4 : c.place); // of 8 pieces four rows are a turn
        if (WAVE_ROWS * P % TILE_WAVE == 0 || e * TILE_WAVE + LANE < WAVE_ROWS * P) copy_async(to + place, from + c.first[e], true);
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
DEVICE void prepare_line(LineCopies &c, const Product &product, u32 lines) {
    prepare_copies(c.quants, product, lines);
#if HIGH_PIECES
    prepare_copies(c.high, product, lines);
#endif
#if SCALE_PIECES
    prepare_copies(c.scales, product, lines);
#endif
#if DELTA_PIECES
    prepare_copies(c.deltas, product, lines);
#endif
}
DEVICE void copy_weights(WaveStage &to, const LineCopies &c, const Planes &planes, u32 line) {
    copy_line(to, c.quants, planes.quants, line);
#if HIGH_PIECES
    copy_line(to + HIGH_AT, c.high, planes.high, line);
#endif
#if SCALE_PIECES
    copy_line(to + SCALES_AT, c.scales, planes.scales, line);
#endif
#if DELTA_PIECES
    copy_line(to + DELTAS_AT, c.deltas, planes.deltas, line);
#endif
}

// What a row's line has of planes with less than a piece for a block. It waits in registers for the next stage.
struct Rest {
    u32 scales[3], delta;
};
typedef Rest Rests[TILES][TILE_LANE_ROWS];
DEVICE void load_rests(Rests &rests, const Planes &p, const u32 (&rows)[TILES][TILE_LANE_ROWS], u32 lines, u32 line) {
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            Rest &rest = rests[t][r];
            u64 block = (u64)rows[t][r] * lines + line;
#if FORMAT == Q2_K
            rest.delta = ((const u32 *)p.deltas)[block];
#elif FORMAT == MXFP4 // of 8 blocks
            u32x2 exponents = ((const u32x2 *)p.deltas)[block];
            UNROLL for (u32 i = 0; i < 2; ++i) rest.scales[i] = exponents.v[i];
#elif FORMAT == Q4_G128 // of the block that holds the lane's part
            rest.delta = ((const u32 *)p.deltas)[2 * block + tile_part() / 2];
#elif HAS_REST
            rest.delta = ((const u16 *)p.deltas)[block];
#endif
#if FORMAT == Q3_K
            UNROLL for (u32 i = 0; i < 3; ++i) rest.scales[i] = ((const u32 *)p.scales)[block * 3 + i];
#elif FORMAT == IQ4_XS
            UNROLL for (u32 i = 0; i < 3; ++i) rest.scales[i] = ((const u16 *)p.scales)[block * 3 + i];
#endif
        }
}

// A quarter is half of one of a part's two groups. Two quarters that follow each other are of the same codes in memory.
struct Quarter {
    u32 part, group, half;
};
#define HALVES_FIRST (IS_K && FORMAT != IQ4_XS)
DEVICE Quarter quarter_of(u32 n) { return HALVES_FIRST ? Quarter{tile_part(), n % 2, n / 2} : Quarter{tile_part(), n / 2, n % 2}; }
#if TWO_BITS // a unit is two parts
DEVICE u32 index_of(const Quarter &q) { return q.part / 2; }
DEVICE u32 group_of(const Quarter &q) { return q.part % 2 * 2 + q.group; }
#else
DEVICE u32 index_of(const Quarter &q) { return IS_K ? q.part : 0; }
DEVICE u32 group_of(const Quarter &q) { return IS_K ? q.group : 0; }
#endif

// Where in a stage the lane finds its part of its first row, in pieces; and that row. Its other rows are `row` further, a multiple of 8.
struct OwnPlace {
    u32 quants, row;
};
DEVICE OwnPlace own_place() {
    const u32 piece = (TWO_BITS ? tile_part() / 2 : tile_part()) * (FORMAT == Q8_0 ? 4 : 2);
    return OwnPlace{kept(piece_place<QUANT_PIECES>(tile_row(0), piece)), kept(tile_row(0))};
}

// The codes of two quarters, as they lie in memory: 16 bytes, and their high bits. Q6_K: those of bytes 0 and 2, then of 1 and 3, shifted
// to where both quarters take them.
struct Codes {
    u32x4 quants, high;
#if FORMAT == Q6_K
    u32x4 odd, odd_high; // bytes 1 and 3
#endif
};
DEVICE void read_codes(Codes &to, const WaveStage &stage, const OwnPlace &own, u32 row, const Quarter &q) {
    const u32 piece = FORMAT == Q8_0 ? q.group * 2 + q.half : TWO_BITS || HALVES_FIRST ? q.half : q.group; // Q8_0: of one quarter
    to.quants = stage[(own.quants ^ piece) + row * QUANT_PIECES];
#if FORMAT == Q5_0 || FORMAT == Q5_1
    to.high.v[0] = ((const u32 *)&stage[HIGH_AT + (own.row + row) * HIGH_PIECES])[2 * q.part + q.group];
#elif HIGH_PIECES
    to.high = stage[HIGH_AT + (own.row + row) * HIGH_PIECES + (FORMAT == Q6_K ? q.part / 2 * 2 : 0) + q.half];
#endif
#if FORMAT == Q6_K
    UNROLL for (u32 i = 0; i < 4; ++i) {
        to.odd.v[i] = kept(to.quants.v[i] >> 8);
        to.odd_high.v[i] = kept(to.high.v[i] >> (4 + index_of(q) % 2 * 2));
        to.high.v[i] = kept(to.high.v[i] * (index_of(q) % 2 ? 4 : 16)); // a shift, but a product takes the other pipe
    }
#endif
}

// Float16 scales and addends, or codes of zero, by which codes become weights: of both groups in blocks of 256, twice that of one in blocks of 32.
// A code of four bits with an offset is at the top of a float16's 10: of the number 1 + code / 16 the scale is 16 times as much, and what
// that is too much for a code of 0 is in the addend, which is rounded as a weight of the code 16 would be.
struct Factors {
    u32 scale, addend;
};
#define ONE_K 0x64006400u // 1024 + n has the bits 0x6400 | n, and subtracting 1024 is exact
DEVICE u32 less(u32 two, u32 zero) { return add_f16x2(two, (0xe400u + zero) * 0x10001u); }
DEVICE u32 less_of_16(u32 two, u32 zero) { return fma_f16x2(two, 0x2c002c00u, (0xd400u + (zero << 4)) * 0x10001u); } // two / 16 - 64 - zero
DEVICE u32 negative(u32 two) { return two ^ 0x80008000u; }
DEVICE Factors factors_of(const WaveStage &stage, const Rest &rest, const OwnPlace &own, u32 further, const Quarter &q) {
    u32 part = q.part, row = own.row + further;
#if DELTA_PIECES == 1
    u32 delta = ((const u16 *)&stage[DELTAS_AT + row])[2 * part + q.group];
    return Factors{delta | delta << 16, 0};
#elif FORMAT == MXFP4
    u32 scale = to_f16(half_of_power((part / 2 ? rest.scales[1] : rest.scales[0]) >> (16 * (part % 2) + 8 * q.group) & 255)).bits;
    return Factors{scale | scale << 16, 0};
#elif FORMAT == Q4_G128
    return Factors{twice(rest.delta, 0), rest.delta >> 16};
#elif DELTA_PIECES == 2
    u32 delta = ((const u32 *)&stage[DELTAS_AT + row * 2])[2 * part + q.group];
    if (AT_TOP) return Factors{fma_f16x2(twice(delta, 0), 0x4c004c00u, 0), fma_f16x2(twice(delta, 0), 0xcc00cc00u, twice(delta, 1))};
    return Factors{twice(delta, 0), HAS_ZEROS ? delta >> 16 : twice(delta, 1)};
#elif SIX_BIT_SCALES
    u32x4 all = stage[SCALES_AT + row];
    u32 shift = part % 2 * 16, first = all.v[1] >> shift, second = all.v[2] >> shift, last = all.v[3] >> shift;
    u32 scales = part < 2 ? first & 0x3f3f : (last & 0x0f0f) | (first >> 2 & 0x3030);
    u32 minima = part < 2 ? second & 0x3f3f : (last >> 4 & 0x0f0f) | (second >> 2 & 0x3030);
    scales = byte_perm(ONE_K, scales, 0x07010500u);
    u32 scale = fma_f16x2(AT_TOP ? fma_f16x2(scales, 0x4c004c00u, 0xf400f400u) : less(scales, 0), twice(all.v[0], 0), 0); // 16 times
    u32 minimum = fma_f16x2(less(byte_perm(ONE_K, minima, 0x07010500u), 0), twice(all.v[0], 1), AT_TOP ? scale : 0);
    return Factors{scale, negative(minimum)};
#else
    u32 delta = twice(rest.delta, 0);
#if FORMAT == Q2_K
    u32 both = ((const u32 *)&stage[SCALES_AT + row])[part] >> 8 * q.half;
    u32 minima = less_of_16((both & 0x00f000f0u) | ONE_K, 0);
    return Factors{fma_f16x2(less((both & 0x000f000fu) | ONE_K, 0), delta, 0), fma_f16x2(minima, negative(twice(rest.delta, 1)), 0)};
#else
#if FORMAT == Q3_K
    u32 low = (part % 2 ? rest.scales[1] : rest.scales[0]) >> (part / 2 * 4 + 8 * q.half) & 0x000f000fu;
    u32 high = rest.scales[2] >> (part / 2 * 4 + part % 2 * 2 + 8 * q.half) & 0x00030003u;
    u32 scales = less(low | high << 4 | ONE_K, 32);
#elif FORMAT == IQ4_XS
    u32 low = (part < 2 ? rest.scales[1] : rest.scales[2]) >> part % 2 * 8, high = rest.scales[0] >> 4 * part;
    u32 scales = less((low & 15) | (low & 0xf0) << 12 | (high & 3) << 4 | (high & 12) << 18 | ONE_K, 32);
#elif FORMAT == Q6_K // signed bytes
    u32x2 all = ((const u32x2 *)&stage[SCALES_AT + row])[part / 2];
    u32 shift = part % 2 * 16, bytes = byte_perm(all.v[1] >> shift, all.v[0] >> shift, 0x05040100u) ^ 0x80808080u;
    u32 scales = less((bytes >> 8 * q.half & 0x00ff00ffu) | ONE_K, 128);
#else
    u32 scales = 0;
#endif
    return Factors{fma_f16x2(scales, delta, 0), 0};
#endif
#endif
}

// Masks that stay in registers: an instruction has room for one constant.
struct Masks {
    u32 low, high, top, byte;
};
DEVICE Masks masks_of() { return Masks{kept(0x000f000fu), kept(0x00f000f0u), kept(0x03c003c0u), kept(0x00ff00ffu)}; }

// 16 weights of a row as float16: of each four, numbers 0 and 2, then 1 and 3.
DEVICE void dequantize_quarter(const Codes &codes, const Quarter &q, const Factors &factors, const Masks &masks, u32 (&pairs)[4][2]) {
    const u32 zero = HAS_ZEROS ? factors.addend : ZERO + (IS_SIGNED ? 128 : 0), group = IS_K ? q.group : 0;
    u32 scale = IS_K ? twice(factors.scale, group) : factors.scale, addend = !HAS_OFFSET || HAS_ZEROS ? 0 : IS_K ? twice(factors.addend, group) : factors.addend;
#if !IS_NIBBLES && FORMAT != Q8_0 && FORMAT != Q5_K && FORMAT != Q6_K
    Unit unit = {};
    unit.quants[HALF_BY_HALF ? group : q.half] = codes.quants;
    unit.high[HIGH_PIECES && IS_K ? q.half : 0] = codes.high;
#endif
    UNROLL for (u32 i = 0; i < 4; ++i)
        UNROLL for (u32 j = 0; j < 2; ++j) {
            u32 two;
#if AT_TOP
            const i32 up = 6 - (i32)(8 * j + (HALF_BY_HALF ? q.half : q.group) * 4); // of the code
            two = and_or(up < 0 ? codes.quants.v[i] >> -up : codes.quants.v[i] << up, masks.top, 0x3c003c00u);
#elif IS_NIBBLES || FORMAT == Q5_K || FORMAT == Q6_K
            const bool upper = HALF_BY_HALF ? q.half : q.group; // without a shift they are 16 times as much
#if FORMAT == Q6_K
            two = and_or(j ? codes.odd.v[i] : codes.quants.v[i], upper ? masks.high : masks.low, ONE_K);
            two = and_or(j ? codes.odd_high.v[i] : codes.high.v[i], upper ? 0x03000300u : 0x00300030u, two);
#else
            two = and_or(codes.quants.v[i] >> 8 * j, upper ? masks.high : masks.low, ONE_K);
#endif
#if FORMAT == Q5_K
            u32 bits = codes.high.v[i] >> 2 * index_of(q);
            two = and_or(upper ? j ? bits >> 1 : bits << 7 : j ? bits >> 4 : bits << 4, upper ? 0x01000100u : 0x00100010u, two);
#endif
            two = upper ? less_of_16(two, zero) : less(two, zero);
#elif FORMAT == Q8_0
            two = less((codes.quants.v[i] >> 8 * j & masks.byte) ^ 0x64806480u, zero);
#else
            u32 four = four_codes(unit, index_of(q), group_of(q), 4 * q.half + i) ^ (IS_SIGNED ? 0x80808080u : 0u);
            two = less(j ? byte_perm(ONE_K, four, 0x07030501u) : and_or(four, masks.byte, ONE_K), zero);
#endif
            pairs[i][j] = fma_f16x2(two, scale, addend);
        }
}
