// How blocks go through the tokens of a row: loops, reductions, bins of weights in LDS, chunks of ids.

#define BINS 2048

// Calls f(id, logit) for ids from `first` on, every `step`th from `own`. Threads of the same `first` and `stop` make the same number of
// calls; those at ids from `stop` on get -inf, which weighs nothing. Loads run ahead of the calls.
template <u32 PREFETCH = 4, typename F> DEVICE void for_each(const float *z, u32 first, u32 stop, u32 own, u32 step, F f) {
    ROLLED for (u32 start = first; start < stop; start += PREFETCH * step) {
        float tile[PREFETCH];
        UNROLL for (u32 j = 0; j < PREFETCH; ++j) {
            u32 id = start + j * step + own;
            tile[j] = id < stop ? z[id] : NEG_INFINITY;
        }
        UNROLL for (u32 j = 0; j < PREFETCH; ++j) f(start + j * step + own, tile[j]);
    }
}

// The same by vectors of four: `first`, `stop` and the row's begin are multiples of four.
template <u32 PREFETCH, typename F> DEVICE void for_each_vector(const float *z, u32 first, u32 stop, u32 own, u32 step, F f) {
    ROLLED for (u32 start = first; start < stop; start += 4 * PREFETCH * step) {
        f32x4 tile[PREFETCH];
        UNROLL for (u32 j = 0; j < PREFETCH; ++j) {
            u32 id = start + 4 * (j * step + own);
            tile[j] = id < stop ? load<4>(z + id) : f32x4{{NEG_INFINITY, NEG_INFINITY, NEG_INFINITY, NEG_INFINITY}};
        }
        UNROLL for (u32 j = 0; j < PREFETCH; ++j)
            UNROLL for (u32 i = 0; i < 4; ++i) f(start + 4 * (j * step + own) + i, tile[j].v[i]);
    }
}

// Reductions over the block. A block has no more waves than a wave has lanes.
template <u32 N> DEVICE u64 block_most(u64 x, u64 (&scratch)[N]) {
    x = wave_max(x);
    if (LANE == 0) scratch[THREAD / WAVE] = x;
    barrier();
    x = wave_max(LANE < N * 32 / WAVE ? scratch[LANE] : 0);
    barrier();
    return x;
}

// The sum over the threads before this one, and over all.
template <u32 N> DEVICE u64 block_before(u64 x, u64 (&scratch)[N], u64 &total) {
    u64 reached = x;
    for (u32 i = 1; i < WAVE; i *= 2) {
        u64 other = shfl(reached, LANE >= i ? LANE - i : 0);
        reached += LANE >= i ? other : 0;
    }
    if (LANE == WAVE - 1) scratch[THREAD / WAVE] = reached;
    barrier();
    u64 wave = LANE < N * 32 / WAVE ? scratch[LANE] : 0;
    total = wave_sum(wave);
    u64 before = wave_sum(LANE < THREAD / WAVE ? wave : 0) + reached - x;
    barrier();
    return before;
}

// A sum of 64 bits in two words of LDS, because NVIDIA has no atomic addition of 64 bits there, only a loop of compare and swap.
DEVICE void add_wide(u32 &low, u32 &high, u64 x) {
    u32 old = atomic_add(&low, (u32)x);
    u32 rest = (u32)(x >> 32) + (old + (u32)x < old);
    if (rest) atomic_add(&high, rest);
}
DEVICE u64 wide(u32 low, u32 high) { return (u64)high << 32 | low; }

struct Bins {
    u32 counts[BINS], low[BINS], high[BINS];
};
template <u32 N> DEVICE void clear(Bins &bins) {
    for (u32 i = THREAD; i < BINS; i += N) bins.counts[i] = bins.low[i] = bins.high[i] = 0;
    barrier();
}

// Adds a token to a bin: to its count, its weight, or both. All lanes of a wave call it together. Where all that add have the same bin,
// as with equal logits, one lane adds for all.
DEVICE void tally(Bins &bins, u32 bin, bool adds, bool by_count, bool by_weight, u64 weight) {
    u64 adding = wave_ballot(adds);
    if (adding == 0) return;
    u32 leader = popcount((adding & (0 - adding)) - 1), its_bin = shfl(bin, leader), count = 1;
    bool alone = wave_ballot(adds && bin != its_bin) == 0;
    if (alone) {
        if (by_weight) weight = wave_sum(adds ? weight : 0);
        count = popcount(adding);
    }
    if (!adds || (alone && LANE != leader)) return;
    if (by_count) atomic_add(&bins.counts[bin], count);
    if (by_weight) add_wide(bins.low[bin], bins.high[bin], weight);
}

// Appends to a list the values of the lanes that have one, while there is room; `count` is of all. All lanes of a wave call it together.
DEVICE void append(u64 *list, u32 room, u32 &count, bool adds, u64 value) {
    u64 adding = wave_ballot(adds);
    if (adding == 0) return;
    u32 leader = popcount((adding & (0 - adding)) - 1), place = 0;
    if (LANE == leader) place = atomic_add(&count, popcount(adding));
    place = shfl(place, leader) + popcount(adding & (((u64)1 << LANE) - 1));
    if (adds && place < room) list[place] = value;
}

struct Chunk {
    u32 first, stop;
};
DEVICE Chunk chunk_at(u32 chunk, u32 size, u32 vocabulary) {
    u32 first = chunk * size;
    return Chunk{first, first + size < vocabulary ? first + size : vocabulary};
}
