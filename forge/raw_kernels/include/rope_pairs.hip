// The rotation of RoPE (arXiv:2104.09864). The first 2 * pairs numbers of a head rotate in pairs, each by an angle of its own.
// -D INTERLEAVED=1: pairs are (2i, 2i + 1); 0: they are (i, i + pairs).

DEVICE bool is_first_of_pair(u32 d, u32 pairs) { return INTERLEAVED ? d % 2 == 0 : d < pairs; }
DEVICE u32 partner_of(u32 d, u32 pairs) { return INTERLEAVED ? d ^ 1 : d < pairs ? d + pairs : d - pairs; }

// The rotated number is x * cosine + partner * sine. `cos_sin` is of the position: (pairs, 2).
struct Rotation {
    float cosine, sine;
};
DEVICE Rotation rotation_of(const float *cos_sin, u32 d, u32 pairs) {
    bool first = is_first_of_pair(d, pairs);
    f32x2 turn = load<2>(cos_sin + 2 * (INTERLEAVED ? d / 2 : first ? d : d - pairs));
    return Rotation{turn.v[0], first ? -turn.v[1] : turn.v[1]};
}
