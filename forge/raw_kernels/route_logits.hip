// Logits of a router for many rows: a product in float32 with the rows' RMS norm, by tiles of ROWS rows and EXPERTS experts.
//
// A thread has EACH experts of OWN_ROWS rows. STEP numbers of all rows and experts are in LDS, number after number, while the next are on their way.
// -D ROWS=rows of a block, 16, 32 or 64; EACH=experts of a thread, 2, 4 or 8.

#define THREADS 256
#define SIDE 16 // threads that share rows, or experts
#define STEP 32
#define EXPERTS (SIDE * EACH)
#define OWN_ROWS (ROWS / SIDE)
#define VECTOR (EACH < 4 ? EACH : 4)
#define PARTS (STEP / 4) // pieces of four numbers of a row
#define PIECES (8 * PARTS) // of eight rows: neighbouring threads have different rows, so that they store to different banks
#define X_PIECES ((ROWS * PARTS + THREADS - 1) / THREADS)
#define WEIGHT_PIECES (EXPERTS * PARTS / THREADS)

KERNEL(THREADS) route_logits(
    const float *x,      // (M, K)
    const float *norm,   // (K,) weights of the RMS norm of x
    const float *weight, // (X, K)
    const float *bias,   // (X,) or null
    float *logits,       // (M, X)
    float eps,           // of the norm
    u32 rows,            // M
    u32 inner,           // K, a multiple of 4
    u32 experts          // X
) {
    SHARED float of_x[STEP][ROWS + 4], of_weight[STEP][EXPERTS + 4], squares[PARTS][ROWS];
    grid_dependency_sync();
    u32 first_row = BLOCK_Y * ROWS, first_expert = BLOCK_X * EXPERTS, across = THREAD % SIDE, down = THREAD / SIDE;
    f32x4 next_x[X_PIECES], next_weight[WEIGHT_PIECES];
    float square[X_PIECES] = {};
    auto part_of = [](u32 n) { return n / 8 % PARTS; };
    auto load_step = [&](u32 start) {
        UNROLL for (u32 e = 0; e < X_PIECES; ++e) {
            u32 n = e * THREADS + THREAD, k = start + part_of(n) * 4, row = smaller(first_row + n / PIECES * 8 + n % 8, rows - 1);
            bool there = k < inner;
            f32x4 from = load<4>(x + (u64)row * inner + (there ? k : 0));
            UNROLL for (u32 i = 0; i < 4; ++i) {
                next_x[e].v[i] = there ? from.v[i] : 0.0f;
                square[e] += next_x[e].v[i] * next_x[e].v[i];
            }
        }
        UNROLL for (u32 e = 0; e < WEIGHT_PIECES; ++e) {
            u32 n = e * THREADS + THREAD, k = start + part_of(n) * 4, expert = smaller(first_expert + n / PIECES * 8 + n % 8, experts - 1);
            bool within = k < inner;
            f32x4 from = load<4>(weight + (u64)expert * inner + (within ? k : 0)), scale = load<4>(norm + (within ? k : 0));
            UNROLL for (u32 i = 0; i < 4; ++i) next_weight[e].v[i] = within ? from.v[i] * scale.v[i] : 0.0f;
        }
    };
    float sum[OWN_ROWS][EACH] = {};
    load_step(0);
    ROLLED for (u32 start = 0; start < inner; start += STEP) {
        lds_barrier(); // the numbers before were read
        UNROLL for (u32 e = 0; e < X_PIECES; ++e) {
            u32 n = e * THREADS + THREAD;
            if (n < ROWS * PARTS)
                UNROLL for (u32 i = 0; i < 4; ++i) of_x[part_of(n) * 4 + i][n / PIECES * 8 + n % 8] = next_x[e].v[i];
        }
        UNROLL for (u32 e = 0; e < WEIGHT_PIECES; ++e) {
            u32 n = e * THREADS + THREAD;
            UNROLL for (u32 i = 0; i < 4; ++i) of_weight[part_of(n) * 4 + i][n / PIECES * 8 + n % 8] = next_weight[e].v[i];
        }
        lds_barrier();
        load_step(start + STEP); // behind the last one zeros
        ROLLED for (u32 base = 0; base < STEP; base += 8)
            UNROLL for (u32 k = 0; k < 8; ++k) {
                Vec<float, OWN_ROWS> own = load<OWN_ROWS>(&of_x[base + k][down * OWN_ROWS]);
                UNROLL for (u32 j = 0; j < EACH / VECTOR; ++j) {
                    Vec<float, VECTOR> some = load<VECTOR>(&of_weight[base + k][(j * SIDE + across) * VECTOR]);
                    UNROLL for (u32 r = 0; r < OWN_ROWS; ++r)
                        UNROLL for (u32 i = 0; i < VECTOR; ++i) sum[r][j * VECTOR + i] += own.v[r] * some.v[i];
                }
            }
    }
    UNROLL for (u32 e = 0; e < X_PIECES; ++e) {
        u32 n = e * THREADS + THREAD;
        if (n < ROWS * PARTS) squares[part_of(n)][n / PIECES * 8 + n % 8] = square[e];
    }
    lds_barrier();
    UNROLL for (u32 r = 0; r < OWN_ROWS; ++r) {
        u32 row = first_row + down * OWN_ROWS + r;
        float sum_of_squares = 0;
        UNROLL for (u32 p = 0; p < PARTS; ++p) sum_of_squares += squares[p][down * OWN_ROWS + r];
        float scale = rms_scale(fast_divide(sum_of_squares, (float)inner), eps);
        UNROLL for (u32 e = 0; e < EACH; ++e) {
            u32 expert = first_expert + (e / VECTOR * SIDE + across) * VECTOR + e % VECTOR;
            if (row < rows && expert < experts) logits[(u64)row * experts + expert] = sum[r][e] * scale + (bias ? bias[expert] : 0.0f);
        }
    }
}
