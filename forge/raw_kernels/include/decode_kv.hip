// Decode attention: keys and values of a wave's positions, from the pages of the KV cache to the registers that the matrix cores read.
// -D HEAD_DIM; PAGE=positions of a page; POSITIONS=tiles of 16 positions that a wave takes in a turn.

// Keys times queries: the inner dimension is CHUNKS chunks of 16 numbers for each part of the lanes. Values: a lane reads PIECE
// numbers of a position for each of its GROUPS rows of a tile, in PASSES passes over the head. Where keys and values of a turn fit
// the registers (counted in words of a lane), those of the next turn are prefetched. Elsewhere a lane holds HELD_CHUNKS chunks and
// HELD_PASSES passes at a time and loads them as they are needed.
#define CHUNKS ((HEAD_DIM + 16 * TILE_PARTS - 1) / (16 * TILE_PARTS))
#define GROUPS (16 / TILE_LANE_ROWS)
#define PIECE (HEAD_DIM > 4 * GROUPS && (PART_POSITIONS == 4 || HEAD_DIM <= 128) ? 8 : 4)
#define PASSES ((HEAD_DIM + GROUPS * PIECE - 1) / (GROUPS * PIECE))
#define PASS_TILES (PIECE / TILE_LANE_ROWS)
#define PART_POSITIONS (16 / TILE_PARTS) // of a tile
#define QUADS (PART_POSITIONS / 4)
#define CHUNK_WORDS (POSITIONS * TILE_LANE_ROWS * 8)
#define VALUE_WORDS (POSITIONS * PASSES * PART_POSITIONS * PIECE / 2)
#define ACC_WORDS (PASSES * PASS_TILES * TILE_VALUES)
#define PREFETCH (HEAD_DIM % 8 == 0 && CHUNKS * CHUNK_WORDS + VALUE_WORDS + ACC_WORDS <= 144)
#define ROOM (HEAD_DIM % 8 ? 16 : ACC_WORDS < 88 ? 64 : 152 - ACC_WORDS) // words for keys, and for values
#define HELD_CHUNKS                                            \
    (PREFETCH || CHUNKS * CHUNK_WORDS <= ROOM           ? CHUNKS \
     : CHUNKS % 4 == 0 && 4 * CHUNK_WORDS <= ROOM ? 4      \
     : CHUNKS % 2 == 0 && 2 * CHUNK_WORDS <= ROOM ? 2      \
                                                  : 1)
#define HELD_PASSES (PREFETCH || VALUE_WORDS <= ROOM ? PASSES : 1)

struct alignas(16) Rows {
    float v[PASSES * GROUPS * PIECE]; // at least HEAD_DIM
};
struct alignas(16) Query {
    f16 v[CHUNKS * TILE_PARTS * 16 + 8]; // zeros behind the head; 8 more, so that heads lie in other banks
};

// 8 or 4 numbers of a row.
template <u32 N> struct Numbers {
    u32 words[N / 2];
};

// N numbers of a row from d on. Past its end the first ones, which meet zeros or are not stored.
template <u32 N> DEVICE Numbers<N> read_numbers(const f16 *row, u32 d) {
    struct alignas(2 * N) Piece {
        Numbers<N> numbers;
    } piece = {};
#if HEAD_DIM % 8 == 0
    piece = *(const Piece *)(row + (d < HEAD_DIM ? d : 0));
#else
    UNROLL for (u32 i = 0; i < N; ++i) piece.numbers.words[i / 2] |= (u32)row[d + i < HEAD_DIM ? d + i : 0].bits << 16 * (i % 2);
#endif
    return piece.numbers;
}

// The cached positions of a row: `first` to `last`. A position outside stands for the nearest one, and its weight is 0: the compiler
// can wait for each load alone where no branch is in front of it.
struct Cache {
    const f16 *k, *v;      // (N, P, G, D), from the KV head on
    const i32 *page_table; // of the row
    u32 kv_heads, first, last;
};
#define WHOLE_TILES (PAGE % 16 == 0) // a tile lies in one page; else each position looks its page up
struct Tiles {
    u32 start[POSITIONS], page[POSITIONS];
};
DEVICE u32 page_at(const i32 *page_table, u32 position) { return (u32)load_l2(page_table + position / PAGE); }
DEVICE void find_tiles(const Cache &cache, u32 position, Tiles &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u) {
        u32 most = cache.last / 16 * 16, start = position + 16 * u;
        to.start[u] = start < most ? start : most;
        if (WHOLE_TILES) to.page[u] = page_at(cache.page_table, to.start[u]);
    }
}
DEVICE u64 offset_of(const Cache &cache, const Tiles &tiles, u32 u, u32 row) {
    u32 at = tiles.start[u] + row;
    at = at > cache.first ? at : cache.first;
    at = at < cache.last ? at : cache.last;
    u32 slot = (WHOLE_TILES ? tiles.page[u] : page_at(cache.page_table, at)) * PAGE + at % PAGE;
    return (u64)slot * (cache.kv_heads * HEAD_DIM);
}

// A lane's keys of a turn's tiles, HELD_CHUNKS chunks from c on, and its values, HELD_PASSES passes from p on.
struct Keys {
    Numbers<8> v[POSITIONS][TILE_LANE_ROWS][HELD_CHUNKS][2];
};
struct Values {
    Numbers<PIECE> v[POSITIONS][HELD_PASSES][PART_POSITIONS];
};
DEVICE void load_keys(const Cache &cache, const Tiles &tiles, u32 c, Keys &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
            const f16 *row = cache.k + offset_of(cache, tiles, u, tile_row(r));
            UNROLL for (u32 n = 0; n < HELD_CHUNKS; ++n)
                UNROLL for (u32 i = 0; i < 2; ++i)
                    to.v[u][r][n][i] = read_numbers<8>(row, ((c + n) * TILE_PARTS + tile_part()) * 16 + 8 * i);
        }
}
DEVICE void load_values(const Cache &cache, const Tiles &tiles, u32 p, Values &to) {
    UNROLL for (u32 u = 0; u < POSITIONS; ++u)
        UNROLL for (u32 j = 0; j < PART_POSITIONS; ++j) {
            const f16 *row = cache.v + offset_of(cache, tiles, u, tile_part() * PART_POSITIONS + j);
            UNROLL for (u32 n = 0; n < HELD_PASSES; ++n)
                to.v[u][n][j] = read_numbers<PIECE>(row, ((p + n) * GROUPS + tile_row(0)) * PIECE);
        }
}
