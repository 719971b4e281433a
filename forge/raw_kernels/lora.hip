// Low-rank adapters of a product: y += scale * B (A x). Rows have different ones, or none.
//
// A block takes TOKENS rows. What is summed of a row, and in which order, does not depend on the rows beside it.
// -D TOKENS; VECTOR=numbers of x that a thread takes together: 8, or 1 where rows are no multiples of 8.

#define COLUMNS 4

// The slots of the block's rows; -1 also past the last row. Gives whether there is an adapter among them.
DEVICE bool read_slots(i32 (&slot)[TOKENS], const i32 *slots, u32 first, u32 rows) {
    bool any = false;
    UNROLL for (u32 t = 0; t < TOKENS; ++t) {
        slot[t] = first + t < rows ? slots[first + t] : -1;
        any |= slot[t] >= 0;
    }
    return any;
}

// The block's threads share the inner dimension of COLUMNS rows of A.
KERNEL(128) lora_shrink(
    const f16 *x,     // (M, K)
    const i32 *slots, // (M,) -1 = the row has no adapter
    const f16 *a,     // (L, R, K)
    float *h,         // (M, R) rows with an adapter alone are written
    u32 rows,         // M
    u32 inner,        // K
    u32 ranks         // R, a multiple of COLUMNS
) {
    SHARED float partial[MAX_WAVES(128)][TOKENS * COLUMNS];
    grid_dependency_sync();
    u32 first = BLOCK_Y * TOKENS, column = BLOCK_X * COLUMNS;
    i32 slot[TOKENS];
    if (!read_slots(slot, slots, first, rows)) return; // the whole block
    float sum[TOKENS][COLUMNS];
    UNROLL for (u32 t = 0; t < TOKENS; ++t)
        UNROLL for (u32 c = 0; c < COLUMNS; ++c) sum[t][c] = 0;
    for (u32 k = THREAD * VECTOR; k < inner; k += 128 * VECTOR) {
        Vec<f16, VECTOR> w[COLUMNS];
        i32 held = -1;
        UNROLL for (u32 t = 0; t < TOKENS; ++t) {
            if (slot[t] < 0) continue;
            if (slot[t] != held) {
                held = slot[t];
                UNROLL for (u32 c = 0; c < COLUMNS; ++c) w[c] = load<VECTOR>(a + ((u64)(u32)held * ranks + column + c) * inner + k);
            }
            Vec<f16, VECTOR> own = load<VECTOR>(x + (u64)(first + t) * inner + k);
            UNROLL for (u32 c = 0; c < COLUMNS; ++c)
                UNROLL for (u32 i = 0; i < VECTOR; ++i) sum[t][c] += to_float(w[c].v[i]) * to_float(own.v[i]);
        }
    }
    UNROLL for (u32 t = 0; t < TOKENS; ++t)
        UNROLL for (u32 c = 0; c < COLUMNS; ++c) {
            float of_wave = wave_sum(sum[t][c]);
            if (LANE == 0) partial[THREAD / WAVE][t * COLUMNS + c] = of_wave;
        }
    lds_barrier();
    u32 row = first + THREAD / COLUMNS;
    if (THREAD >= TOKENS * COLUMNS || row >= rows || slots[row] < 0) return;
    float total = 0;
    for (u32 w = 0; w < 128 / WAVE; ++w) total += partial[w][THREAD];
    h[(u64)row * ranks + column + THREAD % COLUMNS] = total;
}

// Adds B h of each row's slot to the sums of output n, whose rows of h are those of its part.
DEVICE void expand(
    float (&sum)[TOKENS],
    const i32 (&slot)[TOKENS],
    const float *h,
    const f16 *b,
    const i32 *starts,
    u32 n,
    u32 outer,
    u32 rank,
    u32 parts,
    u32 first
) {
    u32 part = 0;
    for (u32 p = 1; p < parts; ++p) part += n >= (u32)starts[p];
    UNROLL for (u32 t = 0; t < TOKENS; ++t) sum[t] = 0;
    for (u32 r = 0; r < rank; r += 8)
        UNROLL for (u32 t = 0; t < TOKENS; ++t) {
            if (slot[t] < 0) continue;
            f16x8 w = load<8>(b + ((u64)(u32)slot[t] * outer + n) * rank + r); // of neighbours that share it from L1
            const float *from = h + ((u64)(first + t) * parts + part) * rank + r;
            UNROLL for (u32 q = 0; q < 2; ++q) {
                f32x4 four = load<4>(from + 4 * q);
                UNROLL for (u32 i = 0; i < 4; ++i) sum[t] += to_float(w.v[4 * q + i]) * four.v[i];
            }
        }
}

// A thread has one number of each row.
KERNEL(256) lora_expand(
    const float *h,      // (M, parts * C)
    const i32 *slots,    // (M,)
    const f16 *b,        // (L, N, C)
    const float *scales, // (L,)
    const i32 *starts,   // (parts,) the first of the numbers that read the n-th C of h
    float *y,            // (M, N) rows with an adapter are added to
    u32 rows,            // M
    u32 outer,           // N
    u32 rank,            // C, a multiple of 8
    u32 parts
) {
    grid_dependency_sync();
    u32 first = BLOCK_Y * TOKENS, n = BLOCK_X * 256 + THREAD;
    i32 slot[TOKENS];
    if (!read_slots(slot, slots, first, rows) || n >= outer) return;
    float sum[TOKENS];
    expand(sum, slot, h, b, starts, n, outer, rank, parts, first);
    UNROLL for (u32 t = 0; t < TOKENS; ++t)
        if (slot[t] >= 0) y[(u64)(first + t) * outer + n] += scales[slot[t]] * sum[t];
}

// A thread has a gate and its up of each row, and stores activation(gate) * up, of rows without an adapter too.
KERNEL(256) lora_expand_glu(
    const float *h,
    const i32 *slots,
    const f16 *b,
    const float *scales,
    const i32 *starts,
    const float *y, // (M, 2F) gates, then ups
    f16 *z,         // (M, F)
    u32 rows,
    u32 outer, // 2F
    u32 rank,
    u32 parts,
    u32 is_gelu // 0: SiLU
) {
    grid_dependency_sync();
    u32 first = BLOCK_Y * TOKENS, n = BLOCK_X * 256 + THREAD, width = outer / 2;
    i32 slot[TOKENS];
    if (n >= width) return;
    read_slots(slot, slots, first, rows);
    float gate[TOKENS], up[TOKENS];
    expand(gate, slot, h, b, starts, n, outer, rank, parts, first);
    expand(up, slot, h, b, starts, n + width, outer, rank, parts, first);
    UNROLL for (u32 t = 0; t < TOKENS; ++t) {
        if (first + t >= rows) continue;
        const float *own = y + (u64)(first + t) * outer + n;
        float a = own[0], c = own[width];
        if (slot[t] >= 0) a += scales[slot[t]] * gate[t], c += scales[slot[t]] * up[t];
        z[(u64)(first + t) * width + n] = to_f16(activate(a, is_gelu) * c);
    }
}
