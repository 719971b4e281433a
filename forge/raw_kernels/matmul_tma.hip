// Products of many rows of x, TOKENS for each block, with a float16 matrix, as matmul_wgmma.hip, by waves with roles.
// Uses: tile, tile_mma, tile_lines, matmul_epilogue, tile_wgmma, tile_phases
// Target: sm_90a
//
// One thread of the last group of waves (the producer) lets the bulk copy engine (Tensor Memory Accelerator) bring a line of 64 numbers
// of each row of weights and of x, as boxes. STAGES of them lie in LDS, each with a barrier that says that it is full and one that it is
// empty. The other groups (consumers) multiply, each TILES tiles of 64 rows of weights. With a gate a block's tiles are gates and ups by
// turns.
// -D STAGES in LDS; LDS_BYTES; TOKENS, TILES, BLOCK=threads of consumers, MORE_TOKENS of matmul_epilogue; THREADS of a block.

#define GROUP (TILE_WAVE * GROUP_WAVES)
#define GROUPS (BLOCK / GROUP)
static_assert(THREADS == BLOCK + GROUP, "a producer beside the consumers");

struct Stage {
    GroupRows<64> weights[GROUPS * TILES];
    GroupRows<TOKENS> x;
};
struct Memory {
    Stage stages[STAGES];
    PhaseBarrier full[STAGES], empty[STAGES];
};
static_assert(sizeof(Memory) == LDS_BYTES, "another size than the host takes");

typedef RingPlace<STAGES> Place;

// The first output of the block's n-th tile, and the row of the matrix that has its weights.
DEVICE u32 first_output(const Product &p, u32 n) { return p.gated ? (ROW_BLOCK * (GROUPS * TILES) / 2 + n / 2) * 64 : (ROW_BLOCK * (GROUPS * TILES) + n) * 64; }
DEVICE u32 first_row(const Product &p, u32 n) { return first_output(p, n) + (p.gated && n % 2 ? outputs_of(p) : 0); }

DEVICE void copy_weights(const Product &p, const u64 *map, u32 line, Stage &to, PhaseBarrier &full) {
    phase_expect(full, sizeof(Stage));
    UNROLL for (u32 n = 0; n < GROUPS * TILES; ++n) copy_box(to.weights[n].v[0], map, line * 64, 0, first_row(p, n), full);
}

// Weights do not wait for the launch before this one, which makes x.
DEVICE void produce(Memory &memory, const Product &p, const u64 *map, const u64 *x, u32 begin, u32 end) {
    map_ready(map);
    for (u32 s = 0; s < STAGES && begin + s < end; ++s) copy_weights(p, map, begin + s, memory.stages[s], memory.full[s]);
    map_ready(x);
    grid_dependency_sync();
    Place place{0, 1}; // empty before the first phase
    ROLLED for (u32 line = begin; line < end; ++line) {
        Stage &to = memory.stages[place.stage];
        phase_wait(memory.empty[place.stage], place.parity);
        if (line >= begin + STAGES) copy_weights(p, map, line, to, memory.full[place.stage]);
        copy_box(to.x.v[0], x, line * 64, 0, FIRST_TOKEN, memory.full[place.stage]);
        phase_arrive(memory.full[place.stage]);
        advance(place);
    }
}

// Sums go through LDS, where the stages were, so that a wave stores what lies together in memory. Four numbers between rows: lanes
// that store to LDS find 32 banks.
#define COLUMNS (GROUPS * TILES * 64)
struct Outputs {
    float v[TOKENS][COLUMNS + 4];
};
static_assert(sizeof(Outputs) <= sizeof(Stage[STAGES]), "no room for the sums");
DEVICE void gather_sums(Outputs &all, const Sums &sum, u32 group) {
    u32 first = group * TILES * 64 + THREAD / TILE_WAVE % GROUP_WAVES * 16;
    named_wait(1, BLOCK); // all products have ended
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m)
            UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) all.v[m * TILE_TOKENS + tile_sum_token(i)][first + t * 64 + tile_sum_row(i)] = sum[t][m][i];
    named_wait(1, BLOCK);
}
DEVICE void store_gated(const Product &p, const Outputs &all) {
    ROLLED for (u32 c = LANE; c < COLUMNS / 2; c += TILE_WAVE) {
        u32 n = first_output(p, 0) + c, column = c / 64 * 128 + c % 64;
        if (n >= outputs_of(p)) continue;
        float of_gate = p.bias ? p.bias[n] : 0.0f, of_up = p.bias ? p.bias[outputs_of(p) + n] : 0.0f;
        ROLLED for (u32 first = THREAD / TILE_WAVE; first < TOKENS; first += 8 * WAVES) {
            float value[8]; // all before the first is stored
            UNROLL for (u32 r = 0; r < 8; ++r) {
                u32 row = smaller<u32>(first + r * WAVES, TOKENS - 1);
                value[r] = activate(all.v[row][column] + of_gate, p.gelu) * (all.v[row][column + 64] + of_up);
            }
            UNROLL for (u32 r = 0; r < 8; ++r) {
                u32 row = first + r * WAVES, token = FIRST_TOKEN + row;
                if (row < TOKENS && token < p.rows) p.gated[(u64)token * outputs_of(p) + n] = to_f16(value[r]);
            }
        }
    }
}
DEVICE void store_partials(const Product &p, const Outputs &all) {
    const u32 parts = COLUMNS / TILE_WAVE, together = 32 / parts; // rows whose loads are under way together
    float *out = p.y + (u64)BLOCK_Y * p.rows * p.stride + p.column;
    float addend[parts];
    UNROLL for (u32 c = 0; c < parts; ++c) {
        u32 n = first_output(p, 0) + c * TILE_WAVE + LANE;
        addend[c] = p.bias && BLOCK_Y == 0 && n < p.outer ? p.bias[n] : 0.0f;
    }
    ROLLED for (u32 first = THREAD / TILE_WAVE; first < TOKENS; first += together * WAVES) {
        float more[together][parts] = {};
        if (p.accumulate)
            UNROLL for (u32 r = 0; r < together; ++r)
                UNROLL for (u32 c = 0; c < parts; ++c) {
                    u32 row = first + r * WAVES, token = FIRST_TOKEN + row, n = first_output(p, 0) + c * TILE_WAVE + LANE;
                    if (row < TOKENS && token < p.rows && n < p.outer) more[r][c] = out[(u64)token * p.stride + n];
                }
        UNROLL for (u32 r = 0; r < together; ++r)
            UNROLL for (u32 c = 0; c < parts; ++c) {
                u32 row = first + r * WAVES, token = FIRST_TOKEN + row, n = first_output(p, 0) + c * TILE_WAVE + LANE;
                if (row < TOKENS && token < p.rows && n < p.outer) out[(u64)token * p.stride + n] = more[r][c] + (all.v[row][c * TILE_WAVE + LANE] + addend[c]);
            }
    }
}

DEVICE void consume(Memory &memory, const Product &p, u32 begin, u32 end) {
    u32 group = shfl(THREAD / GROUP, 0);
    bool says = LANE == 0; // one lane of each wave arrives
    Sums sum;
    clear_sums(sum);
    Place place{0, 0};
    u32 before = 0; // the stage that was multiplied last
    ROLLED for (u32 line = begin; line < end; ++line) {
        phase_wait(memory.full[place.stage], place.parity);
        const Stage &from = memory.stages[place.stage];
        UNROLL for (u32 t = 0; t < TILES; ++t) group_multiply(sum[t], from.weights[group * TILES + t], from.x);
        group_await_but<TILES>();
        if (says && line > begin) phase_arrive(memory.empty[before]);
        before = place.stage;
        advance(place);
    }
    UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
    Outputs &all = (Outputs &)memory.stages;
    gather_sums(all, sum, group);
    if (p.gated)
        store_gated(p, all);
    else
        store_partials(p, all);
}

KERNEL(THREADS) matmul_tma(
    const u64 *x,      // the map of (M, K), for boxes of TOKENS rows
    const u64 *map,    // of the weights (N, K), with a gate N / 2 gates, then ups; for boxes of 64 rows
    const float *bias, // (N,) or null
    float *y,          // (splits, M, stride) x @ weight.T + bias in the columns from `column` on
    f16 *gated,        // (M, N / 2) activation(gate) * up, or null; then y is not used
    u32 rows,          // M
    u32 inner,         // K
    u32 outer,         // N
    u32 stride,        // numbers from one row of y to the next
    u32 column,
    u32 accumulate, // 0 or 1: y is added to
    u32 gelu,       // 0 or 1: the activation is GELU, else SiLU
    u32 splits      // of the inner dimension
) {
    DYNAMIC_SHARED(Memory, memory, 1);
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    u32 lines = (inner + LINE * 8 - 1) / (LINE * 8), share = (lines + splits - 1) / splits;
    u32 begin = smaller(BLOCK_Y * share, lines), end = smaller(begin + share, lines);
    if (THREAD == 0) {
        for (u32 s = 0; s < STAGES; ++s) phase_init(memory[0].full[s], 1), phase_init(memory[0].empty[s], WAVES);
        group_landed(); // for the bulk copy engine
    }
    barrier();
    if (THREAD >= BLOCK) {
        give_registers<PRODUCER_REGISTERS>();
        if (THREAD == BLOCK) produce(memory[0], product, map, x, begin, end);
    } else {
        take_registers<consumer_registers(BLOCK, GROUP, MIN_BLOCKS)>();
        grid_dependency_sync(); // y may be read before
        consume(memory[0], product, begin, end);
    }
}
