// Products of experts with many rows of x, by waves with roles: a block multiplies one tile of group_experts.
// Uses: quant_blocks, tile, tile_mma, tile_lines, x_order, matmul_epilogue, tile_wgmma, tile_phases, tile_bits, quant_lines, quant_roles, expert_activation
// Target: sm_90a
//
// Row m of the tile t, TOKENS pairs of a row and one of its experts at most, lies in row t * TOKENS + m of x and of h. Blocks of a tile lie beside
// each other in the grid, and tiles of an expert do, so that a cache holds the tile's x and the expert's weights.
// -D as quant_roles, with TILE_LIST=1; GATED=1: an expert's rows are gates, then ups, and results are activations, ACTIVATION of expert_activation.

// Rows of a wave are all there, or none: there are multiples of 256. Numbers k and k + 2 of a row of h are a word; two lanes make two words,
// one of each of two tokens. Words of the row 8 further lie 256 further in a block of 64 rows.
DEVICE void store_activations(const Product &p, const Sums &sum, const Memory &memory, u32 halves) {
    u32 outputs = outputs_of(p), first = (ROW_BLOCK * WAVES + THREAD / TILE_WAVE) * TILES * 8;
    if (first >= outputs) return;
    const bool is_second = LANE & 8; // of the two lanes: it stores the second token's
    UNROLL for (u32 t = 0; t < TILES; ++t) {
        u32 n = first + t * 8 + LANE / 4, k = n & ~2u;
        float of_gate = p.bias ? p.bias[p.matrix + n] : 0.0f, of_up = p.bias ? p.bias[p.matrix + outputs + n] : 0.0f;
        u32 token = FIRST_TOKEN + tile_sum_token(is_second);
        u32 *to = (u32 *)p.gated + (x_word(outputs, token, k & ~3u, halves) ^ k % 2 * 4);
        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
            float value[2];
            UNROLL for (u32 i = 0; i < 2; ++i) {
                float factor = memory.factors[m * TILE_TOKENS + tile_sum_token(i)];
                value[i] = expert_activate(sum[t][m][i] * factor + of_gate, sum[t][m][i + 2] * factor + of_up, ACTIVATION);
            }
            float other = as_float(shfl_bits(as_u32(is_second ? value[0] : value[1]), LANE ^ 8));
            u32 word = is_second ? to_f16x2(other, value[1]) : to_f16x2(value[0], other);
            if (token + m * TILE_TOKENS < p.rows) to[m / 8 * (outputs * (X_ROWS / 2)) + m % 8 * 256] = word;
        }
    }
}

DEVICE void store_products(const Product &p, const Sums &sum, const Memory &memory) {
    u32 first = (ROW_BLOCK * WAVES + THREAD / TILE_WAVE) * TILES * 16 + tile_sum_row(0);
    if (first >= p.outer) return;
    float bias[TILES][2];
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 r = 0; r < 2; ++r) bias[t][r] = p.bias ? p.bias[p.matrix + first + t * 16 + r * 8] : 0.0f;
    UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
        UNROLL for (u32 j = 0; j < 2; ++j) {
            u32 token = m * TILE_TOKENS + tile_sum_token(j);
            float factor = memory.factors[token], *row = p.y + ((u64)memory.places[token] * p.outer + first);
            if (FIRST_TOKEN + token < p.rows)
                UNROLL for (u32 t = 0; t < TILES; ++t)
                    UNROLL for (u32 r = 0; r < 2; ++r) row[t * 16 + r * 8] = (sum[t][m][2 * r + j] + bias[t][r]) * factor;
        }
}

KERNEL(THREADS) expert_wgmma_quant(
    const f16 *x,         // (ceil(tiles * TOKENS / 64), K / 64, 64, 64) in an order of x_order, see gather_x
    const i32 *tiles,     // (tiles, 4) see expert_groups
    const i32 *pairs,     // (P,)
    const float *weights, // (P,) factors of the products with GATED, else of the results; or null
    const u8 *weight,     // the planes of (X * N, K), see quant_blocks.hip
    const u8 *high,
    const u8 *scales,
    const u8 *deltas,
    const float *bias, // (X * N,) or null
    float *y,          // (U, M, N) results, or null with GATED
    f16 *h,            // (ceil(tiles * TOKENS / 64), N / 2 / 64, 64, 64) activations in an order of x_order with GATED, else null
    u32 used,          // U, pairs of a row
    u32 rows_of_y,     // M
    u32 inner,         // K, a multiple of 256
    u32 outer,         // N
    u32 halves         // 0 or 1: the order of h
) {
    DYNAMIC_SHARED(Memory, memory, 1);
    grid_dependency_sync();
    u32 expert = (u32)tiles[4 * BLOCK_Y], first = (u32)tiles[4 * BLOCK_Y + 1], rows = (u32)tiles[4 * BLOCK_Y + 2];
    if (rows == 0) return;
    Product product{bias, y, GATED ? h : nullptr, FIRST_TOKEN + rows, outer, outer, 0, 0, 0, expert * outer};
    if (THREAD == 0) prepare_barriers(memory[0]);
    barrier();
    u32 lines = inner / LINE_WEIGHTS;
    if (THREAD >= BLOCK) {
        give_registers<PRODUCER_REGISTERS>();
        if (THREAD == BLOCK) produce(memory[0], product, x, lines, 0, lines);
        if (THREAD >= BLOCK + TILE_WAVE) { // meanwhile: nobody needs these before the end
            ROLLED for (u32 m = THREAD - BLOCK - TILE_WAVE; m < rows; m += GROUP - TILE_WAVE) {
                u32 pair = (u32)pairs[first + m];
                memory[0].places[m] = pair % used * rows_of_y + pair / used;
                memory[0].factors[m] = weights ? weights[pair] : 1.0f;
            }
            wave_sync(); // lanes have different numbers of turns
            named_arrive(1, BLOCK + GROUP - TILE_WAVE);
        }
    } else {
        take_registers<consumer_registers(BLOCK, GROUP, MIN_BLOCKS)>();
        consume(memory[0], product, Planes{weight, high, scales, deltas}, lines, 0, lines, [&](const Sums &sum) {
            named_wait(1, BLOCK + GROUP - TILE_WAVE);
            if (GATED)
                store_activations(product, sum, memory[0], halves);
            else
                store_products(product, sum, memory[0]);
        });
    }
}
