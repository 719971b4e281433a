// How a thread writes its group of weights into a block: `write_block`. Of types with blocks of 256 weights, threads beside each other
// have the groups of one; of the others a group is a block. Layouts: ggml-common.h.

#define IS_K (FORMAT == Q4_K || FORMAT == Q5_K || FORMAT == Q6_K)
#define HAS_FIVE_BITS (FORMAT == Q5_0 || FORMAT == Q5_1 || FORMAT == Q5_K)
#define GROUP (FORMAT == Q6_K ? 16 : 32)
#define PER_BLOCK (FORMAT == Q6_K ? 16 : IS_K ? 8 : 1)
#if FORMAT == Q4_0
#define BLOCK_BYTES 18
#elif FORMAT == Q4_1
#define BLOCK_BYTES 20
#elif FORMAT == Q5_0
#define BLOCK_BYTES 22
#elif FORMAT == Q5_1
#define BLOCK_BYTES 24
#elif FORMAT == Q8_0
#define BLOCK_BYTES 34
#elif FORMAT == MXFP4
#define BLOCK_BYTES 17
#elif FORMAT == Q4_K
#define BLOCK_BYTES 144
#elif FORMAT == Q5_K
#define BLOCK_BYTES 176
#else
#define BLOCK_BYTES 210
#endif
#define F16_NAN 0x7e00u

// Where the planes' bytes are in a block: `planes` of formats/ggml.BLOCK_FORMATS.
#define DELTAS (FORMAT == Q6_K ? 208 : 0)
#define DELTA_BYTES (FORMAT == Q4_K || FORMAT == Q5_K ? 0 : FORMAT == Q4_1 || FORMAT == Q5_1 ? 4 : FORMAT == MXFP4 ? 1 : 2)
#define SCALES (FORMAT == Q6_K ? 192 : 0)
#define SCALE_BYTES (IS_K ? 16 : 0)
#define HIGH (FORMAT == Q6_K ? 128 : FORMAT == Q5_K ? 16 : DELTA_BYTES)
#define HIGH_BYTES (FORMAT == Q6_K ? 64 : FORMAT == Q5_K ? 32 : HAS_FIVE_BITS ? 4 : 0)
#define QUANTS (FORMAT == Q6_K ? 0 : DELTA_BYTES + SCALE_BYTES + HIGH_BYTES)
#define QUANT_BYTES (BLOCK_BYTES - DELTA_BYTES - SCALE_BYTES - HIGH_BYTES)

// Whether all weights of a block had a place in it: `is_sound` of formats/quantize.py.
DEVICE bool is_sound(const u8 *block) {
#if FORMAT == MXFP4
    return block[0] != 255;
#elif FORMAT == Q6_K
    return (block[209] & 0x7c) != 0x7c;
#else
    bool has_minimum = FORMAT == Q4_1 || FORMAT == Q5_1 || FORMAT == Q4_K || FORMAT == Q5_K;
    return (block[1] & 0x7c) != 0x7c && (!has_minimum || (block[3] & 0x7c) != 0x7c);
#endif
}

// Weights of a group as they are stored.
DEVICE void read_weights(const u8 *source, u32 group, float (&x)[GROUP]) {
    const u32 each = STORED == 0 ? 4 : 8; // weights in 16 bytes
    const u32x4 *from = (const u32x4 *)source + (u64)group * (GROUP / each);
    UNROLL for (u32 i = 0; i < GROUP / each; ++i) {
        u32x4 words = from[i];
        UNROLL for (u32 j = 0; j < 4; ++j) {
            u32 word = words.v[j];
#if STORED == 0
            x[4 * i + j] = as_float(word);
#elif STORED == 1
            x[8 * i + 2 * j] = to_float(f16{(u16)word}), x[8 * i + 2 * j + 1] = to_float(f16{(u16)(word >> 16)});
#else
            x[8 * i + 2 * j] = as_float(word << 16), x[8 * i + 2 * j + 1] = as_float(word & 0xffff0000u);
#endif
        }
    }
}

DEVICE void put_half(u8 *out, u32 bits) { out[0] = (u8)bits, out[1] = (u8)(bits >> 8); }
DEVICE float inverse_of(float scale) { // 0 where it is infinite
    float inverse = div_rn(1.0f, scale);
    return is_number(inverse) ? inverse : 0.0f;
}

#if !IS_K
// Bytes of two weights 16 apart, and the fifth bits of all.
DEVICE void put_codes(u8 *out, const u32 (&code)[32]) {
    u32 high = 0;
    UNROLL for (u32 i = 0; i < 32; ++i) high |= code[i] >> 4 << i;
    if (HAS_FIVE_BITS) {
        UNROLL for (u32 i = 0; i < 4; ++i) out[i] = (u8)(high >> 8 * i);
        out += 4;
    }
    UNROLL for (u32 i = 0; i < 16; ++i) out[i] = (u8)((code[i] & 15) | code[i + 16] << 4);
}

DEVICE void write_block(const float (&x)[32], u8 *out) {
    bool is_finite = true;
    float low = x[0], high = x[0], most = x[0]; // `most` is the first of those that are largest without their sign
    UNROLL for (u32 i = 0; i < 32; ++i) {
        is_finite = is_finite && is_number(x[i]);
        low = smaller(low, x[i]), high = larger(high, x[i]);
        if (absolute(x[i]) > absolute(most)) most = x[i];
    }
    u32 code[32];
#if FORMAT == MXFP4
    u32 bits = as_u32(absolute(most)), exponent = bits >> 23;
    // How many numbers just below the next power of 2 have a float32 logarithm that rounds to that power's.
    u32 spacing = exponent > 126 ? exponent - 127 : 126 - exponent;
    u32 up = spacing < 2 ? 0 : spacing < 4 ? 1 : spacing < 8 ? 2 : spacing < 16 ? 5 : spacing < 32 ? 11 : spacing < 64 ? 22 : 44;
    exponent = bits + up >> 23;
    exponent = exponent > 2 ? exponent - 2 : 0;
    float inverse = as_float(254 - smaller(exponent, 253u) << 23);
    UNROLL for (u32 i = 0; i < 32; ++i) {
        float a = mul_rn(absolute(x[i]), inverse);
        u32 size = (a > 0.25f) + (a > 0.75f) + (a > 1.25f) + (a > 1.75f) + (a > 2.5f) + (a > 3.5f) + (a > 5.0f);
        code[i] = size && x[i] < 0.0f ? size | 8 : size;
    }
    out[0] = (u8)(is_finite ? exponent : 255);
    put_codes(out + 1, code);
#elif FORMAT == Q8_0
    float scale = div_rn(absolute(most), 127.0f), inverse = inverse_of(scale);
    UNROLL for (u32 i = 0; i < 32; ++i) {
        i32 size = (i32)add_rn(mul_rn(absolute(x[i]), inverse), 0.49999997f); // the float32 before 0.5: halves away from zero
        out[2 + i] = (u8)(x[i] < 0.0f ? -size : size);
    }
    put_half(out, is_finite ? to_f16(scale).bits : F16_NAN);
#elif FORMAT == Q4_0 || FORMAT == Q5_0
    const float zero = FORMAT == Q4_0 ? 8.0f : 16.0f;
    float scale = div_rn(most, -zero), inverse = inverse_of(scale);
    UNROLL for (u32 i = 0; i < 32; ++i) code[i] = (u32)smaller(add_rn(mul_rn(x[i], inverse), zero + 0.5f), 2.0f * zero - 1.0f);
    put_half(out, is_finite ? to_f16(scale).bits : F16_NAN);
    put_codes(out + 2, code);
#else
    const float steps = FORMAT == Q4_1 ? 15.0f : 31.0f;
    float scale = div_rn(add_rn(high, -low), steps), inverse = inverse_of(scale);
    UNROLL for (u32 i = 0; i < 32; ++i) code[i] = (u32)smaller(add_rn(mul_rn(add_rn(x[i], -low), inverse), 0.5f), steps);
    put_half(out, is_finite ? to_f16(scale).bits : F16_NAN);
    put_half(out + 2, to_f16(low).bits);
    put_codes(out + 4, code);
#endif
}
#else
// The largest number of the block's groups, or NaN where one is that. With SIGNED it is that without its sign, the first of equal ones.
template <bool SIGNED> DEVICE float most_of(const float *numbers) {
    float most = SIGNED ? 0.0f : numbers[0];
    bool is_finite = true;
    UNROLL for (u32 i = 0; i < PER_BLOCK; ++i) {
        float number = numbers[i];
        is_finite = is_finite && is_number(number);
        if (SIGNED ? absolute(number) > absolute(most) : number > most) most = number;
    }
    return is_finite ? most : as_float(0x7fc00000u);
}

// Codes of a thread's group, 4 in a word. A row's odd number of words puts neighbours' into other banks.
SHARED u32 codes[128][GROUP / 4 + 1];
SHARED float numbers[128];

DEVICE u32 code_at(u32 thread, u32 i) { return ((const u8 *)codes[thread])[i]; }

DEVICE void share_codes(const float (&x)[GROUP], float offset, float inverse, float least, float most) {
    UNROLL for (u32 i = 0; i < GROUP; i += 4) {
        u32 word = 0;
        UNROLL for (u32 j = 0; j < 4; ++j)
            word |= (u32)(i32)add_rn(bounded(mul_rn(add_rn(x[i + j], offset), inverse), least, most), -least) << 8 * j;
        codes[THREAD][i / 4] = word;
    }
    lds_barrier();
}

#if FORMAT == Q6_K
DEVICE void write_block(const float (&x)[16], u8 *out) {
    u32 own = THREAD % 16, block = THREAD - own;
    float scale = numbers[THREAD] = best_scale(x);
    lds_barrier();
    float most = most_of<true>(numbers + block);
    u32 half = is_number(most) ? to_f16(div_rn(most, -128.0f)).bits : F16_NAN;
    float inverse = most != 0.0f ? div_rn(-128.0f, most) : 0.0f;
    i32 code = is_number(most) ? (i32)smaller(round_even(mul_rn(scale, inverse)), 127.0f) : 0;
    float step = mul_rn(to_float(f16{(u16)half}), (float)code);
    share_codes(x, 0.0f, step != 0.0f ? div_rn(1.0f, step) : 0.0f, -32.0f, 31.0f);
    // Byte i of `low` and its neighbour 32 bytes on have the low bits of weights 64 apart; of `high` the others of four 32 apart.
    UNROLL for (u32 i = own; i < 128; i += 16) {
        u32 at = i / 64 * 128 + i % 64;
        out[i] = (u8)((code_at(block + at / 16, at % 16) & 15) | code_at(block + at / 16 + 4, at % 16) << 4);
    }
    UNROLL for (u32 i = own; i < 64; i += 16) {
        u32 at = i / 32 * 128 + i % 32, bits = 0;
        UNROLL for (u32 j = 0; j < 4; ++j) bits |= code_at(block + at / 16 + 2 * j, at % 16) >> 4 << 2 * j;
        out[128 + i] = (u8)bits;
    }
    out[192 + own] = (u8)code;
    if (own == 0) put_half(out + 208, half);
}
#else
SHARED u8 sixths[2][128];

// A number of each group as 6 bits of the block's largest one, which is stored as float16: what it is as stored.
DEVICE float put_sixths(float number, u32 place, u8 *out) {
    u32 own = THREAD % 8, block = THREAD - own;
    lds_barrier();
    numbers[THREAD] = number;
    lds_barrier();
    float most = most_of<false>(numbers + block);
    u32 half = is_number(most) ? to_f16(div_rn(most, 63.0f)).bits : F16_NAN;
    float inverse = most > 0.0f ? div_rn(63.0f, most) : 0.0f;
    float code = is_number(most) ? smaller(round_even(mul_rn(number, inverse)), 63.0f) : 0.0f;
    sixths[place][THREAD] = (u8)code;
    if (own == 0) put_half(out + 2 * place, half);
    return mul_rn(to_float(f16{(u16)half}), code);
}

DEVICE void write_block(const float (&x)[32], u8 *out) {
    const float last = FORMAT == Q4_K ? 15.0f : 31.0f;
    u32 own = THREAD % 8, block = THREAD - own;
    Line line = best_line(x, last);
    float step = put_sixths(line.scale, 0, out);
    float low = put_sixths(larger(add_rn(mul_rn(step, line.mean_code), -line.mean), 0.0f), 1, out);
    share_codes(x, low, step > 0.0f ? div_rn(1.0f, step) : 0.0f, 0.0f, last);
    if (own < 4) {
        const u8 *scale = sixths[0] + block + own, *minimum = sixths[1] + block + own;
        out[4 + own] = (u8)(scale[0] | scale[4] >> 4 << 6);
        out[8 + own] = (u8)(minimum[0] | minimum[4] >> 4 << 6);
        out[12 + own] = (u8)((scale[4] & 15) | (minimum[4] & 15) << 4);
    }
    u8 *to = out + 16;
    if (HAS_FIVE_BITS) {
        UNROLL for (u32 i = own; i < 32; i += 8) {
            u32 bits = 0;
            UNROLL for (u32 g = 0; g < 8; ++g) bits |= code_at(block + g, i) >> 4 << g;
            to[i] = (u8)bits;
        }
        to += 32;
    }
    UNROLL for (u32 i = own; i < 128; i += 8) {
        u32 pair = block + i / 32 * 2;
        to[i] = (u8)((code_at(pair, i % 32) & 15) | code_at(pair + 1, i % 32) << 4);
    }
}
#endif
#endif
