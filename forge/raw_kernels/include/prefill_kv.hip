// Prefill attention: the shape of its tiles, and queries, keys and values on their way from memory to LDS and registers.
// -D THREADS, QUERIES, KEYS, SLICES, HEAD_DIM, PAGE, LDS_BYTES of attention_prefill.

#define WAVES (THREADS / TILE_WAVE)
#define WAVE_GROUPS (WAVES / SLICES)
#define BLOCK_QUERIES (WAVE_GROUPS * QUERIES)
#define TOKEN_TILES (QUERIES / TILE_TOKENS)
#define KEY_TILES (KEYS / 16)
#define ROUNDED(n, unit) (((n) + (unit) - 1) / (unit) * (unit))

// Keys times queries. A chunk of the head is CHUNK_QUADS words of four numbers in each part, which a lane reads in pieces of 8.
// Behind the head there are zeros up to whole chunks of each slice.
#define CHUNK_QUADS (TILE_PARTS == 1 ? 4 : 2)
#define CHUNK (4 * CHUNK_QUADS * TILE_PARTS)
#define WIDTH ROUNDED(HEAD_DIM, CHUNK * SLICES)
#define CHUNKS (WIDTH / SLICES / CHUNK)
#define KEY_STRIDE (WIDTH + 8) // an odd number of pieces, so that rows begin in different banks
// Queries stay in registers where they take few words of a lane.
#define QUERY_WORDS (TOKEN_TILES * CHUNKS * CHUNK_QUADS * 2)
#define QUERY_ROOM (TILE == TILE_SCALAR ? 0 : TILE == TILE_MMA ? 32 : 64)
#define HELD_QUERY (QUERY_WORDS <= QUERY_ROOM)

// Weights times values: DIM_TILES tiles of 16 numbers of the head in each slice. In LDS values lie as keys do, where a transposing load
// reads them; else a row is a number of the head, and its 16-byte pieces of 8 positions lie in an order of their own (swizzled).
#define DIMS ROUNDED(HEAD_DIM, 16 * SLICES)
#define SLICE_DIMS (DIMS / SLICES)
#define DIM_TILES (SLICE_DIMS / 16)
#if HAS_TILE_LOADS
#define VALUE_ROWS KEYS
#define VALUE_STRIDE (DIMS + 8)
#else
#define VALUE_ROWS DIMS
#define VALUE_STRIDE (KEYS + (TILE_PARTS == 4 ? 4 : 8))
#endif
static_assert(QUERIES % TILE_TOKENS == 0 && KEYS % 16 == 0 && (KEYS & (KEYS - 1)) == 0 && WAVES % SLICES == 0, "tiles of these sizes");

struct Shared {
    alignas(16) f16 keys[KEYS][KEY_STRIDE];
    alignas(16) f16 values[VALUE_ROWS][VALUE_STRIDE];
#if !HELD_QUERY
    alignas(16) f16 queries[BLOCK_QUERIES][KEY_STRIDE];
#endif
#if SLICES > 1
    float scores[WAVES][KEY_TILES * TOKEN_TILES * TILE_VALUES][TILE_WAVE]; // of each wave's slice
#endif
};
static_assert(sizeof(Shared) <= LDS_BYTES, "more than the host takes");

// Numbers d to d + 7 of a row. Past the head there are its first ones: in keys they meet the zeros of queries, and in values they are not
// stored.
DEVICE u32x4 read_piece(const f16 *row, u32 d) {
    u32x4 piece = {}; // word by word, because clang keeps in memory what is only copied as a whole
#if HEAD_DIM % 2 == 0
    const u32 words = HEAD_DIM % 8 == 0 ? 4 : HEAD_DIM % 4 == 0 ? 2 : 1; // that are loaded as one
    UNROLL for (u32 w = 0; w < 4; ++w) {
        u32 first = d + w / words * words * 2;
        piece.v[w] = ((const Vec<u32, words> *)(row + (first < HEAD_DIM ? first : 0)))->v[w % words];
    }
#else
    UNROLL for (u32 i = 0; i < 8; ++i) piece.v[i / 2] |= (u32)row[d + i < HEAD_DIM ? d + i : 0].bits << 16 * (i % 2);
#endif
    return piece;
}
// Of a query: with zeros past the head.
DEVICE u32x4 read_query(const f16 *row, u32 d) {
    u32x4 piece = read_piece(row, d);
    if (WIDTH > HEAD_DIM)
        UNROLL for (u32 i = 0; i < 8; ++i)
            if (d + i >= HEAD_DIM) piece.v[i / 2] &= i % 2 ? 0xffffu : 0xffff0000u;
    return piece;
}
DEVICE void store_piece(f16 *to, const u32x4 &piece) {
    UNROLL for (u32 w = 0; w < 4; ++w) ((u32x4 *)to)->v[w] = piece.v[w];
}
// 8 numbers in LDS.
DEVICE void read_quads(const f16 *from, f16_quad &first, f16_quad &second) {
    const u32x4 &piece = *(const u32x4 *)from;
    UNROLL for (u32 w = 0; w < 2; ++w) first.v[w] = piece.v[w], second.v[w] = piece.v[2 + w];
}

// A chunk of the keys of a tile, and of the queries of TILE_TOKENS rows in LDS. Of each 16 numbers a lane takes those that a load gives it,
// elsewhere pieces of 8 of its part.
DEVICE u32 chunk_start(u32 slice, u32 chunk) { return slice * (WIDTH / SLICES) + chunk * CHUNK; }
#if !HAS_TILE_LOADS
DEVICE void read_chunk(const f16 *chunk, f16_quad (&to)[CHUNK_QUADS]) {
    UNROLL for (u32 i = 0; i < CHUNK_QUADS; i += 2) read_quads(chunk + (tile_part() * CHUNK_QUADS + i) * 4, to[i], to[i + 1]);
}
#endif
DEVICE void read_keys(const Shared &from, u32 u, u32 d, f16_quad (&to)[TILE_LANE_ROWS][CHUNK_QUADS]) {
#if HAS_TILE_LOADS
    UNROLL for (u32 q = 0; q < CHUNK_QUADS; ++q) tile_load(&from.keys[u * 16][d + q * 16], KEY_STRIDE, to, q);
#else
    UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) read_chunk(&from.keys[u * 16 + tile_row(r)][d], to[r]);
#endif
}

// The queries of a sequence in the heads of one KV head. Row r is the token r / group in the head r % group.
struct Queries {
    const f16 *first; // (T, H, D)
    u32 heads, group;
};
DEVICE const f16 *query_row(const Queries &q, u32 row) { return q.first + ((u64)(row / q.group) * q.heads + row % q.group) * HEAD_DIM; }

#define READERS (TILE_PARTS * TILE_TOKENS)
#if HELD_QUERY
typedef f16_quad Asked[TOKEN_TILES][CHUNKS][CHUNK_QUADS];
DEVICE void hold_queries(const Queries &q, u32 first, u32 rows, u32 slice, Asked &asked) {
    UNROLL for (u32 t = 0; t < TOKEN_TILES; ++t) {
        u32 row = first + t * TILE_TOKENS + reader_token(LANE % READERS);
        const f16 *from = query_row(q, row < rows ? row : rows - 1); // a row past the last stands for it
        UNROLL for (u32 c = 0; c < CHUNKS; ++c) {
#if HAS_TILE_LOADS
            UNROLL for (u32 w = 0; w < 2 * CHUNK_QUADS; ++w) {
                u32 d = chunk_start(slice, c) + w / 2 * 16 + tile_x_row(tile_part(), w % 2 * 2);
                u32 low = d < HEAD_DIM ? from[d].bits : 0u, high = d + 1 < HEAD_DIM ? from[d + 1].bits : 0u;
                asked[t][c][w / 2].v[w % 2] = high << 16 | low;
            }
#else
            UNROLL for (u32 i = 0; i < CHUNK_QUADS; i += 2) {
                u32x4 piece = read_query(from, chunk_start(slice, c) + (tile_part() * CHUNK_QUADS + i) * 4);
                UNROLL for (u32 w = 0; w < 4; ++w) asked[t][c][i + w / 2].v[w % 2] = piece.v[w];
            }
#endif
        }
    }
}
DEVICE void store_queries(const Queries &, u32, u32, Shared &) {}
DEVICE void read_queries(const Shared &, const Asked &asked, u32, u32 t, u32, u32 c, f16_quad (&to)[CHUNK_QUADS]) {
    UNROLL for (u32 i = 0; i < CHUNK_QUADS; ++i) to[i] = asked[t][c][i];
}
#else
struct Asked {};
DEVICE void hold_queries(const Queries &, u32, u32, u32, Asked &) {}
DEVICE void store_queries(const Queries &q, u32 first, u32 rows, Shared &to) {
    for (u32 n = THREAD; n < BLOCK_QUERIES * (WIDTH / 8); n += THREADS) {
        u32 row = n / (WIDTH / 8), d = n % (WIDTH / 8) * 8;
        store_piece(&to.queries[row][d], read_query(query_row(q, first + (row < rows ? row : rows - 1)), d));
    }
}
DEVICE void read_queries(const Shared &from, const Asked &, u32 wave_group, u32 t, u32 slice, u32 c, f16_quad (&to)[CHUNK_QUADS]) {
    u32 row = wave_group * QUERIES + t * TILE_TOKENS, d = chunk_start(slice, c);
#if HAS_TILE_LOADS
    tile_load_x(&from.queries[row][d], KEY_STRIDE, to);
#else
    read_chunk(&from.queries[row + reader_token(LANE % READERS)][d], to);
#endif
}
#endif

// The positions of a sequence that the block's queries see, `begin` to `end - 1`. A position outside, which is masked, stands for the
// nearest one: loads need no branch.
struct Cache {
    const f16 *k, *v;      // (N, P, G, D)
    const i32 *page_table; // of the sequence
    u32 kv_heads, kv_head, begin, end;
};
// The pages of a tile that begins at `start`: a lane holds one of them, looked up a tile ahead.
#define PAGES_IN_LANES ((KEYS - 1) / PAGE + 2 <= 32)
struct PagesAhead {
    u32 page;
};
DEVICE PagesAhead find_pages(const Cache &c, u32 start) {
    u32 index = start / PAGE + LANE, last = (c.end - 1) / PAGE;
    return PagesAhead{PAGES_IN_LANES ? (u32)c.page_table[index < last ? index : last] : 0};
}
// Where the numbers of the tile's j-th position begin in the cache. All lanes of a wave ask.
DEVICE u64 find_position(const Cache &c, const PagesAhead &found, u32 start, u32 j) {
    u32 at = start + j < c.end ? start + j : c.end - 1;
    at = at > c.begin ? at : c.begin;
    u32 page = PAGES_IN_LANES ? shfl(found.page, at / PAGE - start / PAGE) : (u32)c.page_table[at / PAGE];
    return ((u64)(page * PAGE + at % PAGE) * c.kv_heads + c.kv_head) * HEAD_DIM;
}

// Rows of a tile, each WIDTH_ numbers of a position. Copies go to LDS at once; elsewhere pieces wait in registers.
#define COPIES (HAS_COPY_ASYNC && HEAD_DIM % 8 == 0)
template <u32 PIECES> struct HeldRows {
    u32x4 v[(KEYS * PIECES + THREADS - 1) / THREADS];
};
template <u32 PIECES, u32 STRIDE> DEVICE void load_rows(const Cache &c, const f16 *pages, const PagesAhead &found, u32 start, f16 (&to)[KEYS][STRIDE], HeldRows<PIECES> &held) {
    const u32 all = KEYS * PIECES;
    UNROLL for (u32 e = 0; e < (all + THREADS - 1) / THREADS; ++e) {
        u32 n = e * THREADS + THREAD, j = n / PIECES % KEYS, d = n % PIECES * 8;
        const f16 *from = pages + find_position(c, found, start, j);
        if (!COPIES)
            held.v[e] = read_piece(from, d);
        else if (all % THREADS == 0 || n < all)
            copy_async((u32x4 *)&to[j][d], (const u32x4 *)(from + (d < HEAD_DIM ? d : 0)), true);
    }
    if (COPIES) commit_copies();
}
template <u32 PIECES, u32 STRIDE> DEVICE void store_rows(f16 (&to)[KEYS][STRIDE], const HeldRows<PIECES> &held) {
    const u32 all = KEYS * PIECES;
    UNROLL for (u32 e = 0; e < (all + THREADS - 1) / THREADS; ++e) {
        u32 n = e * THREADS + THREAD;
        if (COPIES || (all % THREADS && n >= all)) continue;
        store_piece(&to[n / PIECES][n % PIECES * 8], held.v[e]);
    }
}
typedef HeldRows<WIDTH / 8> HeldKeys;
DEVICE void load_keys(const Cache &c, const PagesAhead &found, u32 start, Shared &to, HeldKeys &held) { load_rows(c, c.k, found, start, to.keys, held); }
DEVICE void store_keys(Shared &to, const HeldKeys &held) { store_rows(to.keys, held); }

#if HAS_TILE_LOADS
typedef HeldRows<DIMS / 8> HeldValues;
DEVICE void load_values(const Cache &c, const PagesAhead &found, u32 start, Shared &to, HeldValues &held) { load_rows(c, c.v, found, start, to.values, held); }
DEVICE void store_values(Shared &to, const HeldValues &held) { store_rows(to.values, held); }
// Values of 16 numbers of the head and 16 positions, as the matrix cores take them.
DEVICE void read_values(const Shared &from, u32 slice, u32 t, u32 u, f16_quad (&to)[TILE_LANE_ROWS][TILE_X_QUADS]) {
    tile_load_transposed(&from.values[u * 16][slice * SLICE_DIMS + t * 16], VALUE_STRIDE, to);
}
#else
// A thread transposes 8 numbers of each of 4 positions. Neighbouring threads have neighbouring pieces of a row, up to 64 bytes, then the
// next positions.
#define NEIGHBOURS (DIMS / 8 % 4 ? 2 : 4)
#define VALUE_BLOCKS (KEYS / 4 * (DIMS / 8))
struct HeldValues {
    u32x4 v[(VALUE_BLOCKS + THREADS - 1) / THREADS][4];
};
struct ValueBlock {
    u32 j, d; // its first position and number
};
DEVICE ValueBlock value_block(u32 n) {
    return ValueBlock{n / NEIGHBOURS % (KEYS / 4) * 4, (n % NEIGHBOURS + n / NEIGHBOURS / (KEYS / 4) * NEIGHBOURS) * 8};
}
DEVICE void load_values(const Cache &c, const PagesAhead &found, u32 start, Shared &, HeldValues &held) {
    UNROLL for (u32 e = 0; e < (VALUE_BLOCKS + THREADS - 1) / THREADS; ++e) {
        ValueBlock block = value_block(e * THREADS + THREAD);
        UNROLL for (u32 i = 0; i < 4; ++i) {
            held.v[e][i] = read_piece(c.v + find_position(c, found, start, block.j + i), block.d);
        }
    }
}
// Where positions lie in a row of values, counted from 8 * x: its pieces trade places by the row's 8 numbers.
DEVICE u32 value_swizzle(u32 d) { return d & (KEYS - 8); }
DEVICE void store_values(Shared &to, const HeldValues &held) {
    UNROLL for (u32 e = 0; e < (VALUE_BLOCKS + THREADS - 1) / THREADS; ++e) {
        u32 n = e * THREADS + THREAD;
        if (VALUE_BLOCKS % THREADS && n >= VALUE_BLOCKS) continue;
        ValueBlock block = value_block(n);
        f16 *first = &to.values[block.d][block.j ^ value_swizzle(block.d % SLICE_DIMS)];
        UNROLL for (u32 i = 0; i < 8; ++i) {
            const u32x4(&p)[4] = held.v[e];
            u32 places = i % 2 ? 0x07060302u : 0x05040100u;
            u32 low = byte_perm(p[1].v[i / 2], p[0].v[i / 2], places), high = byte_perm(p[3].v[i / 2], p[2].v[i / 2], places);
            *(u32x2 *)(first + i * VALUE_STRIDE) = u32x2{{low, high}};
        }
    }
}
DEVICE void read_values(const Shared &from, u32 slice, u32 t, u32 u, f16_quad (&to)[TILE_LANE_ROWS][TILE_X_QUADS]) {
    UNROLL for (u32 r = 0; r < TILE_LANE_ROWS; ++r) {
        const f16 *row = from.values[slice * SLICE_DIMS + t * 16 + tile_row(r)] + (u * 16 ^ value_swizzle(t * 16));
        const u32 own = tile_x_row(tile_part(), 0), turn = value_swizzle(tile_row(r));
#if TILE_PARTS == 4
        to[r][0] = *(const u32x2 *)(row + (own ^ turn));
#else
        UNROLL for (u32 i = 0; i < TILE_X_QUADS / 2; ++i) {
            read_quads(row + (own + 8 * i ^ turn), to[r][2 * i], to[r][2 * i + 1]);
        }
#endif
    }
}
#endif
