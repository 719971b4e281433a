// The search of scales of Q4_K, Q5_K and Q6_K: `_best_lines` and `_best_scales` of formats/quantize_k.py, step by step. Every
// operation rounds to float32, and sums add in the order of the weights.

#define Q4_0 2
#define Q4_1 3
#define Q5_0 6
#define Q5_1 7
#define Q8_0 8
#define Q4_K 12
#define Q5_K 13
#define Q6_K 14
#define MXFP4 39

#define MAGIC 12582912.0f // 1.5 * 2**23
DEVICE float round_even(float x) { return add_rn(add_rn(x, MAGIC), -MAGIC); } // |x| < 2**22
DEVICE float bounded(float x, float least, float most) { return round_even(smaller(larger(x, least), most)); }
DEVICE float absolute(float x) { return as_float(as_u32(x) & 0x7fffffffu); }
DEVICE bool is_number(float x) { return (as_u32(x) & 0x7f800000u) != 0x7f800000u; } // neither infinite nor NaN

// A group of Q4_K or Q5_K: the scale of the best line, and weighted means of its codes and of the weights.
struct Line {
    float scale, mean_code, mean;
};

// Candidates in sixteenths of a step.
#if FORMAT == Q4_K
#define FIRST_FACTOR 210
#define NEXT_FACTOR 4
#define FACTORS 10
#elif FORMAT == Q5_K
#define FIRST_FACTOR 453
#define NEXT_FACTOR 7
#define FACTORS 8
#else
#define FIRST_FACTOR 456
#define NEXT_FACTOR 8
#define FACTORS 8
#endif

DEVICE float over(float number, float x) { // 0 where it is infinite
    float quotient = div_rn(number, x);
    return is_number(quotient) ? quotient : 0.0f;
}
DEVICE i32 distance_of(i32 place, i32 factor) { return (i32)(short)(place * factor) >> 11; } // in 32nds of a step

// The candidate with the least error: its number takes the place of the error's lowest bits.
DEVICE i32 marked(float error, i32 factor, u32 k) {
    return ((i32)as_u32(mul_rn(error, div_rn(1.0f, (float)(factor * factor)))) & -16) | (i32)k;
}

struct Start {
    float steep, start; // a code is share * steep - start
};

#if FORMAT == Q4_K || FORMAT == Q5_K
// A thread's weights as whole numbers: places, and weights of these in the upper half. They are here and not in registers, of which
// a loop over weights would need too many. A row's odd number of words puts neighbours' into other banks.
SHARED u32 wholes[128][33];

DEVICE Start likely_line(const float (&share)[32], const float (&weight)[32]) {
    UNROLL for (u32 i = 0; i < 32; ++i) wholes[THREAD][i] = (u32)share[i] | (u32)weight[i] << 16;
    i32 sum = 0, lean = 0, square = 0, squares[FACTORS] = {}, shifts[FACTORS] = {}, tilts[FACTORS] = {};
    ROLLED for (u32 i = 0; i < 32; ++i) {
        u32 word = wholes[THREAD][i];
        i32 whole = (i32)(word >> 16), place = (i32)(word & 0xffff), at = (place >> 8) - 8;
        sum += whole, lean += whole * at, square += whole * at * at;
        UNROLL for (u32 k = 0; k < FACTORS; ++k) {
            i32 distance = distance_of(place, FIRST_FACTOR + NEXT_FACTOR * (i32)k), part = whole * distance;
            squares[k] += part * distance, shifts[k] += part, tilts[k] += part * at;
        }
    }
    float sum_w = (float)sum, mean = div_rn((float)lean, sum_w);
    float spread = add_rn((float)square, -mul_rn(mul_rn(sum_w, mean), mean)), inverse = spread > 1.0f ? div_rn(1.0f, spread) : 0.0f;
    i32 least = 0x7fffffff;
    float best_shift = 0.0f, best_tilt = 0.0f;
    UNROLL for (u32 k = 0; k < FACTORS; ++k) {
        float shift = (float)shifts[k], tilt = add_rn((float)tilts[k], -mul_rn(shift, mean));
        float error = add_rn((float)(u32)(u16)squares[k], -div_rn(mul_rn(shift, shift), sum_w)); // 2**16 wraps, as in NumPy
        i32 bits = marked(add_rn(error, -mul_rn(mul_rn(tilt, tilt), inverse)), FIRST_FACTOR + NEXT_FACTOR * (i32)k, k);
        if (bits < least) least = bits, best_shift = shift, best_tilt = tilt;
    }
    float steps = mul_rn((float)(FIRST_FACTOR + NEXT_FACTOR * (least & 15)), 0.0625f), shift = div_rn(best_shift, sum_w);
    float tilt = larger(smaller(mul_rn(best_tilt, inverse), 4.0f), -4.0f);
    float start = mul_rn(add_rn(add_rn(shift, 0.5f), -mul_rn(tilt, add_rn(mean, 8.5f))), 0.03125f);
    return Start{mul_rn(add_rn(steps, -mul_rn(tilt, 0.5f)), 0.000244140625f), start};
}

struct Fit {
    float explained, slope, sum_l, sum_l2, sum_lt;
};

// The fit to the codes of a line, if it explains more than the best one so far.
DEVICE void try_codes(const float (&share)[32], const float (&weight)[32], Start line, float most, float sum_w, float sum_t, Fit &best) {
    Fit fit{};
    UNROLL for (u32 i = 0; i < 32; ++i) {
        float code = bounded(add_rn(mul_rn(share[i], line.steep), -line.start), 0.0f, most), product = mul_rn(weight[i], code);
        fit.sum_l = add_rn(fit.sum_l, product);
        fit.sum_l2 = add_rn(fit.sum_l2, mul_rn(product, code));
        fit.sum_lt = add_rn(fit.sum_lt, mul_rn(mul_rn(weight[i], share[i]), code));
    }
    float common = add_rn(mul_rn(sum_w, fit.sum_lt), -mul_rn(fit.sum_l, sum_t));
    float squared = mul_rn(fit.sum_l, fit.sum_l), determinant = add_rn(mul_rn(sum_w, fit.sum_l2), -squared);
    fit.slope = div_rn(common, determinant);
    fit.explained = mul_rn(common, fit.slope);
    if (fit.explained > best.explained && determinant > mul_rn(squared, 1.52587890625e-5f)) best = fit; // 2**-16
}

DEVICE Line best_line(const float (&x)[32], float most) {
    float squares = 0.0f, low = 0.0f, high = x[0], share[32], weight[32];
    UNROLL for (u32 i = 0; i < 32; ++i) {
        squares = add_rn(squares, mul_rn(x[i], x[i]));
        low = smaller(low, x[i]);
        high = larger(high, x[i]);
    }
    float rms = sqrt_rn(mul_rn(squares, 0.03125f)), quarters = over(4.0f, rms), size = add_rn(high, -low), places = over(4096.0f, size);
    float sum_w = 0.0f, sum_t = 0.0f;
    UNROLL for (u32 i = 0; i < 32; ++i) {
        share[i] = mul_rn(add_rn(x[i], -low), places);
        weight[i] = add_rn(mul_rn(absolute(x[i]), quarters), 4.0f);
        sum_w = add_rn(sum_w, weight[i]);
        sum_t = add_rn(sum_t, mul_rn(weight[i], share[i]));
    }
    Fit best{};
    try_codes(share, weight, likely_line(share, weight), most, sum_w, sum_t, best);
    float mean = div_rn(sum_t, sum_w), steep = over(1.0f, best.slope);
    float start = mul_rn(add_rn(mean, -mul_rn(best.slope, div_rn(best.sum_l, sum_w))), steep);
    try_codes(share, weight, Start{steep, start}, most, sum_w, sum_t, best);
    float mean_code = div_rn(best.sum_l, sum_w), unit = mul_rn(size, 0.000244140625f);
    if (low == 0.0f && sum_t > mul_rn(best.slope, best.sum_l)) {
        bool is_level = best.sum_l2 == 0.0f; // weights that are nearly the same
        best.slope = is_level ? div_rn(mean, most) : div_rn(best.sum_lt, best.sum_l2);
        mean_code = is_level ? most : mean_code;
    }
    return Line{is_number(rms) ? mul_rn(best.slope, unit) : as_float(0x7fc00000u), mean_code, add_rn(mul_rn(mean, unit), low)};
}

#elif FORMAT == Q6_K
// The scale of a group of Q6_K.
DEVICE float best_scale(const float (&x)[16]) {
    float largest = 0.0f, total = 0.0f, high = 0.0f, share[16];
    bool is_finite = true;
    UNROLL for (u32 i = 0; i < 16; ++i) {
        if (absolute(x[i]) > absolute(largest)) largest = x[i];
        is_finite = is_finite && is_number(x[i]);
    }
    if (!is_finite) return as_float(0x7fc00000u);
    float places = over(-4096.0f, largest);
    UNROLL for (u32 i = 0; i < 16; ++i) {
        share[i] = mul_rn(x[i], places);
        total = add_rn(total, mul_rn(share[i], share[i]));
        high = i ? larger(high, share[i]) : share[i];
    }
    float wholes = over(255.0f, total), lost = mul_rn(mul_rn(high, high), over(522240.0f, total)); // 255 * 2048
    i32 square = 0;
    UNROLL for (u32 i = 0; i < 16; ++i) {
        i32 at = ((i32)share[i] + 258) >> 9;
        square += (i32)mul_rn(mul_rn(share[i], share[i]), wholes) * at * at;
    }
    float inverse = over(1.0f, (float)square), best_tilt = 0.0f;
    i32 least = 0x7fffffff;
    ROLLED for (u32 k = 0; k < FACTORS; ++k) {
        i32 factor = FIRST_FACTOR + NEXT_FACTOR * (i32)k, squares = 0, tilts = 0;
        UNROLL for (u32 i = 0; i < 16; ++i) {
            i32 place = (i32)share[i] + 2, part = (i32)mul_rn(mul_rn(share[i], share[i]), wholes) * distance_of(place, factor);
            squares += part * distance_of(place, factor), tilts += part * ((place + 256) >> 9);
        }
        float tilt = (float)tilts, error = add_rn((float)squares, -mul_rn(mul_rn(tilt, tilt), inverse));
        if (factor > 504) // 31.5 steps
            error = add_rn(error, mul_rn(larger(add_rn(mul_rn(high, (float)factor * 1.52587890625e-5f), -31.5f), 0.0f), lost));
        i32 bits = marked(error, factor, k);
        if (bits < least) least = bits, best_tilt = tilt;
    }
    float steps = mul_rn((float)(FIRST_FACTOR + NEXT_FACTOR * (least & 15)), 0.0625f);
    float steep = mul_rn(add_rn(steps, -mul_rn(mul_rn(best_tilt, inverse), 0.25f)), 0.000244140625f), common = 0.0f, squares = 0.0f;
    UNROLL for (u32 i = 0; i < 16; ++i) {
        float weight = mul_rn(share[i], share[i]), code = larger(smaller(round_even(mul_rn(share[i], steep)), 31.0f), -32.0f);
        float product = mul_rn(weight, code);
        common = add_rn(common, mul_rn(product, share[i]));
        squares = add_rn(squares, mul_rn(product, code));
    }
    return mul_rn(mul_rn(common, over(1.0f, squares)), mul_rn(largest, -0.000244140625f));
}
#endif
