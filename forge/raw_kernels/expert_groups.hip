// Pairs of a row and one of its experts, sorted by expert, and tiles of them that one block multiplies: what vLLM's
// moe_align_block_size does. A block per expert.

#define THREADS 256
#define MAX_EXPERTS 512

// Experts of pairs that follow each other, which are on their way together; of the last one again behind it.
#define AT_ONCE 8
struct Experts {
    u32 v[AT_ONCE];
};
DEVICE Experts load_experts(const i32 *chosen, u32 p, u32 end) {
    Experts some;
    UNROLL for (u32 i = 0; i < AT_ONCE; ++i) some.v[i] = (u32)chosen[smaller(p + i, end - 1)];
    return some;
}

KERNEL(THREADS) group_experts(
    const i32 *chosen, // (P,) the expert of each pair
    i32 *pairs,        // (P,) numbers of pairs, by expert and number
    i32 *tiles,        // (tiles, 4) expert, the place in `pairs` of the first, how many, 0; past the last tile 0 pairs
    u32 count,         // P
    u32 experts,       // X, at most 512
    u32 tile_rows,     // pairs of a tile at most
    u32 num_tiles
) {
    SHARED u32 counts[MAX_EXPERTS], own[THREADS], scratch[MAX_WAVES(THREADS)];
    for (u32 e = THREAD; e < MAX_EXPERTS; e += THREADS) counts[e] = 0;
    lds_barrier();
    grid_dependency_sync();
    u32 each = (count + THREADS * AT_ONCE - 1) / (THREADS * AT_ONCE) * AT_ONCE, begin = THREAD * each, end = smaller(begin + each, count);
    u32 mine = 0; // pairs of this expert among the thread's
    for (u32 p = begin; p < end; p += AT_ONCE) {
        Experts some = load_experts(chosen, p, end);
        UNROLL for (u32 i = 0; i < AT_ONCE; ++i) {
            if (p + i < end) atomic_add(&counts[some.v[i]], 1u);
            mine += p + i < end && some.v[i] == BLOCK_X;
        }
    }
    own[THREAD] = mine;
    lds_barrier();
    for (u32 distance = 1; distance < THREADS; distance *= 2) { // sums of the threads before
        u32 more = THREAD >= distance ? own[THREAD - distance] : 0;
        lds_barrier();
        own[THREAD] += more;
        lds_barrier();
    }
    u32 first = 0, tile = 0;
    for (u32 e = THREAD; e < BLOCK_X; e += THREADS) first += counts[e], tile += (counts[e] + tile_rows - 1) / tile_rows;
    first = block_sum(first, scratch);
    tile = block_sum(tile, scratch);
    u32 place = first + own[THREAD] - mine;
    for (u32 p = begin; p < end; p += AT_ONCE) {
        Experts some = load_experts(chosen, p, end);
        UNROLL for (u32 i = 0; i < AT_ONCE; ++i)
            if (p + i < end && some.v[i] == BLOCK_X) pairs[place++] = (i32)(p + i);
    }
    u32 total = counts[BLOCK_X], last = tile + (total + tile_rows - 1) / tile_rows;
    for (u32 t = tile + THREAD; t < (BLOCK_X + 1 == experts ? num_tiles : last); t += THREADS) {
        u32 at = (t - tile) * tile_rows, rest = t < last ? smaller(total - at, tile_rows) : 0;
        store(tiles + 4 * t, Vec<i32, 4>{{(i32)BLOCK_X, (i32)(first + at), (i32)rest, 0}});
    }
}
