// Products of TOKENS rows of x with a float16 matrix, as matmul_wgmma.hip, but weights come as boxes of the bulk copy engine (Tensor
// Memory Accelerator).
// Uses: tile, tile_mma, tile_lines, matmul_epilogue, tile_wgmma, tile_phases
// Target: sm_90a
//
// Two groups of waves multiply (consumers), each TILES tiles of 64 rows of weights; the block's other waves copy (producers). A stage is
// a line of 64 numbers of each row; STAGES lie in LDS, each with a barrier that says that it is full and one that it is empty. With a gate a
// group's first of two tiles is gates, the second their ups; in one tile gates and ups alternate by 8 rows, as boxes of 8.
// -D STAGES in LDS; LDS_BYTES; TOKENS, TILES, BLOCK of matmul_epilogue.

#define GROUP (32 * GROUP_WAVES)
#define GROUPS 2 // that multiply
#define COPIERS (BLOCK - GROUPS * GROUP)
#define COPIES (TOKENS * LINE / COPIERS) // pieces of a stage's x that a thread copies
#define BOX_BYTES 8192

struct Stage {
    GroupRows<64> weights[GROUPS][TILES];
    GroupRows<TOKENS> x;
};
struct Lds {
    Stage stages[STAGES];
    PhaseBarrier full[STAGES], empty[STAGES];
};
static_assert(sizeof(Lds) == LDS_BYTES, "another size than the host takes");

// The stage of the ring whose turn it is, and the parity of the phase that its barriers are in.
struct Place {
    u32 stage, parity;
};
DEVICE void advance(Place &place) {
    place.stage = place.stage + 1 == STAGES ? 0 : place.stage + 1;
    place.parity ^= place.stage == 0;
}

// The first output of a group.
DEVICE u32 first_output(const Product &p, u32 group) { return (ROW_BLOCK * GROUPS + group) * (p.gated ? 32 : 64) * TILES; }

// A stage's weights from column k on, by one thread.
DEVICE void copy_weights(const Product &p, const u64 *map, u32 k, Stage &to, PhaseBarrier &full) {
    phase_expect(full, GROUPS * TILES * BOX_BYTES);
    UNROLL for (u32 g = 0; g < GROUPS; ++g)
        UNROLL for (u32 t = 0; t < TILES; ++t) {
            u32 first = first_output(p, g);
            if (p.gated && TILES == 1)
                UNROLL for (u32 box = 0; box < 8; ++box)
                    copy_box(to.weights[g][t].v[box * 8], map, k, 0, first + box / 2 * 8 + box % 2 * outputs_of(p), full);
            else
                copy_box(to.weights[g][t].v[0], map, k, 0, first + t * (p.gated ? outputs_of(p) : 64), full);
        }
}

DEVICE void produce(Lds &lds, const Product &p, const u64 *map, const f16 *x, u32 inner, u32 begin, u32 end) {
    Place place{0, 1}; // empty before the first phase
    u32 own = THREAD - GROUPS * GROUP, piece = own % LINE, first = own / LINE;
    ROLLED for (u32 stage = begin; stage < end; ++stage) {
        Stage &to = lds.stages[place.stage];
        phase_wait(lds.empty[place.stage], place.parity);
        // The first stages' weights are under way since the kernel began.
        if (own == 0 && stage >= begin + STAGES) copy_weights(p, map, stage * LINE * 8, to, lds.full[place.stage]);
        u32 k = (stage * LINE + piece) * 8;
        UNROLL for (u32 e = 0; e < COPIES; ++e) {
            u32 row = first + e * (COPIERS / LINE), token = FIRST_TOKEN + row;
            bool there = k < inner && token < p.rows;
            copy_async(&to.x.v[row][line_place(row, piece)], (const u32x4 *)(x + (there ? token * inner + k : 0)), there);
        }
        phase_arrive_copied(lds.full[place.stage]);
        advance(place);
    }
}

// A group's outputs: activation(gate) * up, or the split's partial sums.
DEVICE void store_gated(const Product &p, const Sums &sum, u32 group) {
    u32 outputs = outputs_of(p), first = first_output(p, group) + THREAD / TILE_WAVE % GROUP_WAVES * 8 * TILES;
    UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
        const u32 up = TILES == 1 ? (i + TILE_VALUES / 2) % TILE_VALUES : i;
        u32 n = first + tile_sum_row(i);
        if ((TILES == 1 && up < i) || n >= outputs) continue;
        float of_gate = p.bias ? p.bias[n] : 0.0f, of_up = p.bias ? p.bias[outputs + n] : 0.0f;
        UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
            u32 token = FIRST_TOKEN + m * TILE_TOKENS + tile_sum_token(i);
            float gate = sum[0][m][i] + of_gate;
            if (token < p.rows) p.gated[(u64)token * outputs + n] = to_f16(activate(gate, p.gelu) * (sum[TILES - 1][m][up] + of_up));
        }
    }
}
DEVICE void store_partials(const Product &p, const Sums &sum, u32 group) {
    u32 first = first_output(p, group) + THREAD / TILE_WAVE % GROUP_WAVES * 16;
    float *out = p.y + (u64)BLOCK_Y * p.rows * p.stride + p.column;
    UNROLL for (u32 t = 0; t < TILES; ++t)
        UNROLL for (u32 i = 0; i < TILE_VALUES; ++i) {
            u32 n = first + t * 64 + tile_sum_row(i);
            if (n >= p.outer) continue;
            float more[TOKEN_TILES], addend = p.bias && BLOCK_Y == 0 ? p.bias[n] : 0.0f;
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) { // loads all before the first is stored
                u32 token = FIRST_TOKEN + m * TILE_TOKENS + tile_sum_token(i);
                more[m] = p.accumulate && token < p.rows ? out[(u64)token * p.stride + n] : 0.0f;
            }
            UNROLL for (u32 m = 0; m < TOKEN_TILES; ++m) {
                u32 token = FIRST_TOKEN + m * TILE_TOKENS + tile_sum_token(i);
                if (token < p.rows) out[(u64)token * p.stride + n] = more[m] + (sum[t][m][i] + addend);
            }
        }
}

DEVICE void consume(Lds &lds, const Product &p, u32 begin, u32 end) {
    u32 group = shfl(THREAD / GROUP, 0);
    bool says = LANE == 0; // one lane of each wave arrives
    Sums sum;
    clear_sums(sum);
    Place place{0, 0};
    u32 before = 0; // the stage that was multiplied last
    ROLLED for (u32 stage = begin; stage < end; ++stage) {
        phase_wait(lds.full[place.stage], place.parity);
        group_landed();
        const Stage &from = lds.stages[place.stage];
        UNROLL for (u32 t = 0; t < TILES; ++t) group_multiply(sum[t], from.weights[group][t], from.x);
        group_await_but<TILES>();
        if (says && stage > begin) phase_arrive(lds.empty[before]);
        before = place.stage;
        advance(place);
    }
    UNROLL for (u32 t = 0; t < TILES; ++t) group_await(sum[t]);
    if (p.gated)
        store_gated(p, sum, group);
    else
        store_partials(p, sum, group);
}

KERNEL(BLOCK) matmul_tma(
    const f16 *x,      // (M, K)
    const u64 *map,    // of the weights (N, K), with a gate N / 2 gates, then ups; for boxes of 64 rows, or of 8
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
    DYNAMIC_SHARED(Lds, shared, 1);
    Lds &lds = shared[0];
    Product product{bias, y, gated, rows, outer, stride, column, accumulate, gelu};
    u32 all = (inner + LINE * 8 - 1) / (LINE * 8), share = (all + splits - 1) / splits;
    u32 begin = smaller(BLOCK_Y * share, all), end = smaller(begin + share, all);
    if (THREAD == 0) {
        for (u32 s = 0; s < STAGES; ++s) phase_init(lds.full[s], COPIERS), phase_init(lds.empty[s], GROUPS * GROUP_WAVES);
        group_landed(); // for the bulk copy engine
    }
    barrier();
    if (THREAD == GROUPS * GROUP) {
        map_ready(map);
        for (u32 s = 0; s < STAGES && begin + s < end; ++s) copy_weights(product, map, (begin + s) * LINE * 8, lds.stages[s], lds.full[s]);
    }
    grid_dependency_sync();
    if (THREAD < GROUPS * GROUP)
        consume(lds, product, begin, end);
    else
        produce(lds, product, map, x, inner, begin, end);
}
