// Shared by the matrix products of up to 256 rows of x in a block: which matrix rows a tile has, the accumulators, and the epilogue.
// -D TOKENS=rows of x of a block; TILES of a wave; BLOCK=threads; MORE_TOKENS=1: there are further rows of x, in blocks that lie beside
// each other in the grid, so that they find the weights in a cache; TILE_LIST=1: a block takes the tile of rows of x that lies in its second
// place in the grid; ORDERED=1: what is gated is stored in both orders of x_order.

#if defined(TILE_LIST)
#define FIRST_TOKEN (BLOCK_Y * TOKENS)
#define ROW_BLOCK BLOCK_X
#elif defined(MORE_TOKENS)
#define FIRST_TOKEN (BLOCK_X * TOKENS)
#define ROW_BLOCK BLOCK_Z
#else
#define FIRST_TOKEN 0u
#define ROW_BLOCK BLOCK_X
#endif

#define WAVES (BLOCK / TILE_WAVE)
#ifdef GROUP_WAVES // tokens that there are accumulators for
#define TOGETHER TOKENS
#else
#define TOGETHER (TOKENS < TILE_MAX_TOKENS ? TOKENS : TILE_MAX_TOKENS)
#endif
#define TOKEN_TILES ((TOGETHER + TILE_TOKENS - 1) / TILE_TOKENS)

typedef float Sums[TILES][TOKEN_TILES][TILE_VALUES]; // a lane's accumulators
DEVICE void clear_sums(Sums &sum) {
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[t][m][i] = 0;
}

// With a gate, half of a tile's rows are gates. The up of a gate is the row TILE_PARTNER below, so that one lane has both sums.
DEVICE u32 half_of(u32 row) { return row / TILE_PARTNER % 2; }
DEVICE u32 place_in_half(u32 row) { return row / (2 * TILE_PARTNER) * TILE_PARTNER + row % TILE_PARTNER; }

struct Product {
    const float *bias; // (N,) or null
    float *y;          // (splits, M, stride) columns from `column` on
    f16 *gated;        // (M, N / 2) activation(gate) * up, or both orders of x_order, or null; with it y is not used
    u32 rows, outer, stride, column, accumulate, gelu;
    u32 matrix; // the first row of the matrix; 0 where it is not told
};
DEVICE u32 outputs_of(const Product &p) { return p.gated ? p.outer / 2 : p.outer; }
DEVICE u32 matrix_row(const Product &p, u32 tile, u32 row) { // of a row of the wave's tile; the last one for rows past the end
    u32 first = ((ROW_BLOCK * WAVES + THREAD / TILE_WAVE) * TILES + tile) * (p.gated ? 8 : 16), outputs = outputs_of(p);
    u32 n = first + (p.gated ? place_in_half(row) : row);
    return p.matrix + (n < outputs ? n : outputs - 1) + (p.gated && half_of(row) ? outputs : 0);
}

// The epilogue of the tokens from `base` on: activation(gate) * up, or the split's partial sums.
DEVICE void store_sums(const Product &p, const Sums &sum, u32 base) {
    u32 outputs = outputs_of(p), first = (ROW_BLOCK * WAVES + THREAD / TILE_WAVE) * TILES * (p.gated ? 8 : 16);
    if (p.gated) {
        UNROLL for (u32 t = 0; t < TILES; ++t)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
                const u32 up = i + TILE_VALUES / 2 < TILE_VALUES ? i + TILE_VALUES / 2 : i;
                u32 n = first + t * 8 + place_in_half(tile_sum_row(i));
                if (up == i || n >= outputs) continue;
                float of_gate = p.bias ? p.bias[n] : 0.0f, of_up = p.bias ? p.bias[outputs + n] : 0.0f;
                UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                    u32 token = base + m * TILE_TOKENS + tile_sum_token(i);
                    float gate = sum[t][m][i] + of_gate;
#ifdef ORDERED
                    f16 value = to_f16(activate(gate, p.gelu) * (sum[t][m][up] + of_up));
                    if (token < p.rows) p.gated[x_place(outputs, token, n, false)] = value;
                    if (token < p.rows) p.gated[x_numbers(outputs, p.rows) + x_place(outputs, token, n, true)] = value;
#else
                    if (token < p.rows) p.gated[(u64)token * outputs + n] = to_f16(activate(gate, p.gelu) * (sum[t][m][up] + of_up));
#endif
                }
            }
        return;
    }
    float *out = p.y + (u64)BLOCK_Y * p.rows * p.stride + p.column;
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
            u32 n = first + t * 16 + tile_sum_row(i);
            float more[TOKEN_TILES], addend = p.bias && BLOCK_Y == 0 && n < p.outer ? p.bias[n] : 0.0f;
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) { // loads all before the first is stored
                u32 token = base + m * TILE_TOKENS + tile_sum_token(i);
                more[m] = p.accumulate && n < p.outer && token < p.rows ? out[(u64)token * p.stride + n] : 0.0f;
            }
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                u32 token = base + m * TILE_TOKENS + tile_sum_token(i);
                if (n < p.outer && token < p.rows) out[(u64)token * p.stride + n] = more[m] + (sum[t][m][i] + addend);
            }
        }
}
