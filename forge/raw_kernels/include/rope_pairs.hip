// The rotation of RoPE (arXiv:2104.09864). The first 2 * pairs numbers of a head rotate in pairs, each by an angle of its own.
// -D INTERLEAVED=1: pairs are (2i, 2i + 1); 0: they are (i, i + pairs).

DEVICE bool is_first_of_pair(u32 d, u32 pairs) { return INTERLEAVED ? d % 2 == 0 : d < pairs; }
DEVICE u32 partner_of(u32 d, u32 pairs) { return INTERLEAVED ? d ^ 1 : d < pairs ? d + pairs : d - pairs; }

// The pair of a number that rotates: its place in cos_sin. The number becomes x * cosine - partner * sine where it is the first of the
// pair, x * cosine + partner * sine where it is the second.
DEVICE u32 pair_of(u32 d, u32 partner, bool first) { return INTERLEAVED ? d / 2 : first ? d : partner; }
