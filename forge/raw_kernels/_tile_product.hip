// What the products of 2 to 64 rows of x on the matrix cores share, wherever a wave's weights come from: x through LDS, the
// step that multiplies, where a tile's rows are in the matrix, and what becomes of the sums.
// -D TOKENS=rows of x at most; TILES of a wave; STAGE_STEPS; BLOCK=threads; CORE_BLOCKS=blocks that a multiprocessor holds.

#undef RESIDENT
#define RESIDENT CORE_BLOCKS
#define WAVES (BLOCK / TILE_WAVE)
#define TOGETHER (TOKENS < TILE_MOST_TOKENS ? TOKENS : TILE_MOST_TOKENS) // tokens whose sums there is room for
#define TOKEN_TILES ((TOGETHER + TILE_TOKENS - 1) / TILE_TOKENS)

// A step is a pair of pieces of 8 numbers of each part, a stage STAGE_STEPS of them. x lies in LDS as lanes read it, the pieces of
// a wave's readers beside each other.
#define READERS (TILE_PARTS * TILE_TOKENS)
#define STEP_PIECES (TOKEN_TILES * 2 * READERS)
#define STAGE_PIECES (STAGE_STEPS * STEP_PIECES)
#define EACH ((STAGE_PIECES + BLOCK - 1) / BLOCK) // pieces that a thread brings

// Where a piece lies in a stage, and the two pieces of a part; where these are neighbours in x, neighbouring threads bring them.
struct Place {
    u32 step, tile, i, reader;
};
template <bool NEIGHBOURS> DEVICE Place place_of(u32 n) {
    return Place{n / STEP_PIECES, n / READERS / 2 % TOKEN_TILES, (NEIGHBOURS ? n : n / READERS) % 2, (NEIGHBOURS ? n / 2 : n) % READERS};
}
DEVICE u32 in_stage(const Place &p) { return p.step * STEP_PIECES + (p.tile * 2 + p.i) * READERS + p.reader; }

// A thread's pieces of a stage of x are sent for, zeros where there are none; where nothing goes past the registers, they come
// to LDS by land_stage. `start(step, part, i)` is where a part's i-th piece begins in a row.
template <bool NEIGHBOURS, typename Start>
DEVICE void bring_stage(const f16 *x, u32 stage, u32 base, u32 rows, u32 inner, u32x4 (&to)[STAGE_PIECES], u32x4 (&pieces)[EACH], Start start) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        if (STAGE_PIECES % BLOCK && THREAD + e * BLOCK >= STAGE_PIECES) continue;
        Place p = place_of<NEIGHBOURS>(THREAD + e * BLOCK);
        u32 k = start(stage * STAGE_STEPS + p.step, reader_part(p.reader), p.i), m = base + p.tile * TILE_TOKENS + reader_token(p.reader);
        bool there = k < inner && m < rows;
        const u32x4 *from = (const u32x4 *)(x + (there ? m * inner + k : 0));
#if ASYNC
        copy_async(&to[in_stage(p)], from, there);
#else
        u32x4 piece = {}; // word by word: what is only copied as a whole, clang would keep in memory
        if (there)
            UNROLL for (u32 w = 0; w < 4; ++w) piece.v[w] = from->v[w];
        UNROLL for (u32 w = 0; w < 4; ++w) pieces[e].v[w] = piece.v[w];
#endif
    }
}
#if !ASYNC
template <bool NEIGHBOURS> DEVICE void land_stage(u32x4 (&to)[STAGE_PIECES], const u32x4 (&pieces)[EACH]) {
    UNROLL for (u32 e = 0; e < EACH; ++e) {
        if (STAGE_PIECES % BLOCK && THREAD + e * BLOCK >= STAGE_PIECES) continue;
        u32x4 &own = to[in_stage(place_of<NEIGHBOURS>(THREAD + e * BLOCK))];
        UNROLL for (u32 w = 0; w < 4; ++w) own.v[w] = pieces[e].v[w];
    }
}
#endif

// A lane's sums of all tiles and tokens, and its weights of a step.
typedef float Sums[TILES][TOKEN_TILES][TILE_VALUES];
typedef f16_quad StepWeights[TILES][TILE_LANE_ROWS][4];
DEVICE void clear_sums(Sums &sum) {
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) sum[t][m][i] = 0;
}
DEVICE void two_quads(const u32x4 &piece, f16_quad *to) { to[0] = u32x2{{piece.v[0], piece.v[1]}}, to[1] = u32x2{{piece.v[2], piece.v[3]}}; }
DEVICE void multiply_step(Sums &sum, const StepWeights &weights, const u32x4 *x) {
    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
        f16_quad quads[4];
        UNROLL for (u32 i = 0; i < 2; ++i) two_quads(x[(m * 2 + i) * READERS + LANE % READERS], quads + 2 * i);
        UNROLL for (u32 t = 0; t < TILES; ++t) tile_multiply(sum[t][m], weights[t], quads);
    }
}

// With a gate, half of a tile's rows are gates, the others what they gate, TILE_PARTNER below.
DEVICE u32 half_of(u32 row) { return row / TILE_PARTNER % 2; }
DEVICE u32 place_in_half(u32 row) { return row / (2 * TILE_PARTNER) * TILE_PARTNER + row % TILE_PARTNER; }

// What a block makes of its product, and where its waves' tiles are in the matrix.
struct Product {
    const float *bias;
    float *y;
    f16 *gated;
    u32 rows, outer, stride, column, accumulate, gelu;
};
DEVICE u32 outputs_of(const Product &p) { return p.gated ? p.outer / 2 : p.outer; }
DEVICE u32 matrix_row(const Product &p, u32 tile, u32 row) { // of the wave's; one too many is not stored
    u32 first = ((BLOCK_X * WAVES + THREAD / TILE_WAVE) * TILES + tile) * (p.gated ? 8 : 16), outputs = outputs_of(p);
    u32 n = first + (p.gated ? place_in_half(row) : row);
    return (n < outputs ? n : outputs - 1) + (p.gated && half_of(row) ? outputs : 0);
}

// Sums of tokens from `base` on: activated, or stored as those of a slice.
DEVICE void store_sums(const Product &p, const Sums &sum, u32 base) {
    u32 outputs = outputs_of(p), first = (BLOCK_X * WAVES + THREAD / TILE_WAVE) * TILES * (p.gated ? 8 : 16);
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
                    if (token < p.rows) p.gated[(u64)token * outputs + n] = to_f16((p.gelu ? gelu_tanh(gate) : silu(gate)) * (sum[t][m][up] + of_up));
                }
            }
        return;
    }
    float *out = p.y + (u64)BLOCK_Y * p.rows * p.stride + p.column;
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
            u32 n = first + t * 16 + tile_sum_row(i);
            float more[TOKEN_TILES], addend = p.bias && BLOCK_Y == 0 && n < p.outer ? p.bias[n] : 0.0f;
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) { // all of them are asked for before the first is stored
                u32 token = base + m * TILE_TOKENS + tile_sum_token(i);
                more[m] = p.accumulate && n < p.outer && token < p.rows ? out[(u64)token * p.stride + n] : 0.0f;
            }
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                u32 token = base + m * TILE_TOKENS + tile_sum_token(i);
                if (n < p.outer && token < p.rows) out[(u64)token * p.stride + n] = more[m] + (sum[t][m][i] + addend);
            }
        }
}
