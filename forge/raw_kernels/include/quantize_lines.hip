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

#if FORMAT == Q4_K
#define FACTORS 9
CONSTANT float factors[FACTORS] = {12.6f, 13.2f, 13.6f, 14.0f, 14.3f, 14.6f, 14.9f, 15.15f, 15.4f};
#elif FORMAT == Q5_K
#define FACTORS 6
CONSTANT float factors[FACTORS] = {28.2f, 29.0f, 29.6f, 30.2f, 30.8f, 31.4f};
#else
#define FACTORS 7
CONSTANT float factors[FACTORS] = {29.0f, 29.6f, 30.2f, 30.8f, 31.4f, 31.9f, 32.4f};
#endif

struct Fit {
    float explained, slope, sum_l, sum_l2, sum_lt;
};

// The fit to the codes of the line (t - start) * steep, if it explains more than the best one so far.
DEVICE void try_codes(const float (&x)[32], const float (&t)[32], float rms, float start, float steep, float most, float sum_w, float sum_t, Fit &best) {
    Fit fit{};
    UNROLL for (u32 i = 0; i < 32; ++i) {
        float weight = add_rn(absolute(x[i]), rms), code = bounded(mul_rn(add_rn(t[i], -start), steep), 0.0f, most);
        float product = mul_rn(weight, code);
        fit.sum_l = add_rn(fit.sum_l, product);
        fit.sum_l2 = add_rn(fit.sum_l2, mul_rn(product, code));
        fit.sum_lt = add_rn(fit.sum_lt, mul_rn(mul_rn(weight, t[i]), code));
    }
    float common = add_rn(mul_rn(sum_w, fit.sum_lt), -mul_rn(fit.sum_l, sum_t));
    float squared = mul_rn(fit.sum_l, fit.sum_l), determinant = add_rn(mul_rn(sum_w, fit.sum_l2), -squared);
    fit.slope = div_rn(common, determinant);
    fit.explained = mul_rn(common, fit.slope);
    if (fit.explained > best.explained && determinant > mul_rn(squared, 1.52587890625e-5f)) best = fit; // 2**-16
}

DEVICE Line best_line(const float (&x)[32], float most) {
    float squares = 0.0f, low = 0.0f, high = x[0], t[32];
    UNROLL for (u32 i = 0; i < 32; ++i) {
        squares = add_rn(squares, mul_rn(x[i], x[i]));
        low = smaller(low, x[i]);
        high = larger(high, x[i]);
    }
    float rms = sqrt_rn(mul_rn(squares, 0.03125f)), size = add_rn(high, -low), share = size > 0.0f ? div_rn(1.0f, size) : 0.0f;
    float sum_w = 0.0f, sum_t = 0.0f;
    UNROLL for (u32 i = 0; i < 32; ++i) {
        t[i] = mul_rn(add_rn(x[i], -low), share);
        float weight = add_rn(absolute(x[i]), rms);
        sum_w = add_rn(sum_w, weight);
        sum_t = add_rn(sum_t, mul_rn(weight, t[i]));
    }
    Fit best{};
    ROLLED for (u32 k = 0; k < FACTORS; ++k) try_codes(x, t, rms, 0.0f, factors[k], most, sum_w, sum_t, best);
    float inverse = sum_w > 0.0f ? div_rn(1.0f, sum_w) : 0.0f, steep = best.slope > 0.0f ? div_rn(1.0f, best.slope) : 0.0f;
    float start = mul_rn(add_rn(sum_t, -mul_rn(best.slope, best.sum_l)), inverse);
    try_codes(x, t, rms, start, steep, most, sum_w, sum_t, best);
    float mean = mul_rn(sum_t, inverse), mean_code = mul_rn(best.sum_l, inverse);
    if (low == 0.0f && sum_t > mul_rn(best.slope, best.sum_l)) {
        bool is_level = best.sum_l2 == 0.0f; // weights that are nearly the same
        best.slope = is_level ? div_rn(mean, most) : div_rn(best.sum_lt, best.sum_l2);
        mean_code = is_level ? most : mean_code;
    }
    return Line{is_number(sum_w) ? mul_rn(best.slope, size) : as_float(0x7fc00000u), mean_code, add_rn(mul_rn(mean, size), low)};
}

// The scale of a group of Q6_K.
DEVICE float best_scale(const float (&x)[16]) {
    float largest = 0.0f, best = 0.0f, scale = 0.0f;
    bool is_finite = true;
    UNROLL for (u32 i = 0; i < 16; ++i) {
        if (absolute(x[i]) > absolute(largest)) largest = x[i];
        is_finite = is_finite && is_number(x[i]);
    }
    if (!is_finite || !(absolute(largest) < 274877906944.0f)) return as_float(0x7fc00000u); // 2**38
    float unit = largest != 0.0f ? div_rn(-1.0f, largest) : 0.0f;
    ROLLED for (u32 k = 0; k < FACTORS; ++k) {
        float step = mul_rn(factors[k], unit), common = 0.0f, squares = 0.0f;
        UNROLL for (u32 i = 0; i < 16; ++i) {
            float weight = mul_rn(x[i], x[i]), code = smaller(round_even(mul_rn(x[i], step)), 31.0f);
            squares = add_rn(squares, mul_rn(mul_rn(weight, code), code));
            common = add_rn(common, mul_rn(mul_rn(weight, x[i]), code));
        }
        float found = div_rn(common, squares), explained = mul_rn(common, found);
        if (explained > best) best = explained, scale = found;
    }
    return scale;
}
