// The integer arithmetic of sampling, exactly as ops/sampling.py defines it: float32 steps rounded one by one, then integer sums, so
// that no order of addition matters.

DEVICE u32 key_or_nan(float z) { return z == z ? ordered_key(z) : 0xffffffffu; } // a NaN counts as greater than all
DEVICE bool is_finite(u32 key) { return key > 0x007fffffu && key < 0xff800000u; } // between the keys of the infinities

// Numbers that descend as tokens are ordered, by (logit descending, id ascending). V <= 2**20.
DEVICE u64 order_of(u32 key, u32 id) { return (u64)key << 20 | (~id & 0xfffffu); }
DEVICE u32 key_in(u64 order) { return (u32)(order >> 20); }
DEVICE u32 id_in(u64 order) { return ~(u32)order & 0xfffffu; }

// `weights` of ops/sampling.py, step by step: floor(2**42 * exp(d)) with d = max((z - greatest) / T, -32).
struct Scale {
    float greatest, scale;
};
DEVICE Scale scale_of(u32 top, float temperature) {
    return Scale{logit_of(top), div_rn(1.0f, larger(temperature, 1.3234889800848443e-23f))}; // 2**-76
}
DEVICE float scaled(float z, Scale s) { return larger(mul_rn(add_rn(z, -s.greatest), s.scale), -32.0f); }
DEVICE u64 weight_at(float d) {
    float n = add_rn(add_rn(mul_rn(d, 1.4426950408889634f), 12582912.0f), -12582912.0f); // to the nearest integer
    d = add_rn(d, -mul_rn(n, 0.693359375f));
    d = add_rn(d, -mul_rn(n, -2.12194440e-4f));
    float e = mul_rn(d, 0.001381454f);
    e = mul_rn(add_rn(e, 0.008368745f), d);
    e = mul_rn(add_rn(e, 0.04166839f), d);
    e = mul_rn(add_rn(e, 0.16666521f), d);
    e = mul_rn(add_rn(e, 0.49999994f), d);
    e = add_rn(add_rn(mul_rn(e, d), d), 1.0f);
    return (u64)mul_rn(e, as_float((u32)((i32)n + 127 + 42) << 23));
}
DEVICE u32 bin_of(float d, float unit) { return (u32)mul_rn(d, -unit); } // each step rounds monotonically: in order

// Philox4x32-10 of ops/philox.py: the first two words.
DEVICE u64 random_bits(u64 seed, u32 choice, u32 position) {
    u32 a = position, b = choice, c = 0, d = 0, k0 = (u32)seed, k1 = (u32)(seed >> 32);
    for (u32 round = 0; round < 10; ++round) {
        u32 high0 = mul_high(0xD2511F53u, a), low0 = 0xD2511F53u * a;
        u32 high1 = mul_high(0xCD9E8D57u, c), low1 = 0xCD9E8D57u * c;
        a = high1 ^ b ^ k0, b = low1, c = high0 ^ d ^ k1, d = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return a | (u64)b << 32;
}

// ceil(p * total), p cut to 32 fractional bits.
DEVICE u64 share(float p, u64 total) {
    u64 fraction = (u64)(smaller(p, 1.0f) * 4294967296.0f);
    fraction = fraction < 1 ? 1 : fraction;
    return fraction * (total >> 32) + (fraction * (total & 0xffffffffu) + 0xffffffffu >> 32);
}

// The least weight that min_p keeps.
DEVICE u64 floor_weight(float min_p) {
    float least = smaller(min_p, 1.0f) * 4398046511104.0f; // 2**42
    u64 weight = (u64)least;
    return (float)weight < least ? weight + 1 : weight;
}
