// Shared by the GEMV kernels: the row x as each block reads it, and what becomes of the sums.
//
// x is float16, or the residual stream in float32; then each block normalizes it, as rmsnorm in norm.hip does. A thread holds P
// vectors of 8 numbers of it.
template <typename X, u32 P> struct Row;
template <u32 P> struct Row<f16, P> {
    u32x4 x[P];
};
template <u32 P> struct Row<float, P> {
    f32x4 x[P][2], norm[P][2];
};

// Loads the vectors that begin at these numbers of the row; zeros past its end.
template <u32 P> DEVICE void read_row(Row<f16, P> &row, const f16 *x, const float *, const u32 (&at)[P], u32 inner) {
    UNROLL for (u32 p = 0; p < P; ++p) row.x[p] = at[p] < inner ? *(const u32x4 *)(x + at[p]) : u32x4{};
}
template <u32 P> DEVICE void read_row(Row<float, P> &row, const float *x, const float *norm, const u32 (&at)[P], u32 inner) {
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 h = 0; h < 2; ++h) {
            row.x[p][h] = at[p] < inner ? *(const f32x4 *)(x + at[p] + 4 * h) : f32x4{};
            row.norm[p][h] = at[p] < inner ? *(const f32x4 *)(norm + at[p] + 4 * h) : f32x4{};
        }
}

// Makes the vectors float16, two numbers in a word. Loads issued between read_row and this call are in flight meanwhile.
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<f16, P> &row, float, u32, float (&)[N]) {
    UNROLL for (u32 p = 0; p < P; ++p) {
        y[p] = row.x[p];
        UNROLL for (u32 i = 0; i < 4; ++i) compiler_fence(y[p].v[i]);
    }
}
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<float, P> &row, float eps, u32 inner, float (&scratch)[N]) {
    float squares = 0;
    compiler_fence(squares);
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 i = 0; i < 8; ++i) squares += row.x[p][i / 4].v[i % 4] * row.x[p][i / 4].v[i % 4];
    float scale = rms_scale(fast_divide(block_sum(squares, scratch), (float)inner), eps);
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 i = 0; i < 8; i += 2) {
            f16 low = to_f16(row.x[p][i / 4].v[i % 4] * scale * row.norm[p][i / 4].v[i % 4]);
            f16 high = to_f16(row.x[p][i / 4].v[i % 4 + 1] * scale * row.norm[p][i / 4].v[i % 4 + 1]);
            y[p].v[i / 2] = low.bits | (u32)high.bits << 16;
        }
}

// The n-th of eight float16. They stay packed, because NVIDIA's compiler gives each number of 16 bits a register of its own.
DEVICE float unpack(const u32x4 &eight, u32 n) { return to_float(f16{(u16)(eight.v[n / 2] >> 16 * (n % 2))}); }

// Outputs of a team, the threads that share R rows of the matrix: R numbers y[n] in float32, or R / 2 in float16, each
// activation(gate) * up. Then the first half of the team's rows are gates, rows n of the matrix, and the others ups, rows outer + n.
template <typename Y, u32 R> struct Outputs {
    static const bool gated = sizeof(Y) == 2;
    static const u32 per_team = gated ? R / 2 : R;
};

// What is added to the sum of an output, or to its gate and its up. It is loaded before the sum is there.
struct Addends {
    float first, second;
};
DEVICE Addends read_addends(const float *y, u32 n, const float *bias, u32, u32 accumulate) {
    return Addends{bias ? bias[n] : 0.0f, accumulate ? y[n] : 0.0f};
}
DEVICE Addends read_addends(const f16 *, u32 n, const float *bias, u32 outer, u32) {
    return bias ? Addends{bias[n], bias[outer + n]} : Addends{};
}
DEVICE void store_output(float *y, u32 n, float sum, float, Addends more) { y[n] = sum + more.first + more.second; }
DEVICE void store_output(f16 *y, u32 n, float gate, float up, Addends more) {
    y[n] = to_f16(activate(gate + more.first, !SILU) * (up + more.second));
}

// The matrix row that is a team's r-th; `first` is the team's first output. Past the last row it is the last one again, whose sum is
// not stored.
template <typename Y, u32 R> DEVICE u32 team_row(u32 first, u32 r, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team;
    u32 n = first + r % outputs < outer ? first + r % outputs : outer - 1;
    return r < outputs ? n : outer + n;
}

// The output that this thread stores, of the block's outputs from `first` on; `outer` if it stores none. A team has SHARERS threads.
template <u32 SHARERS, typename Y, u32 R, u32 THREADS> DEVICE u32 own_output(u32 first, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team, teams = THREADS / SHARERS;
    u32 in_block = SHARERS <= 32 ? THREAD / SHARERS * outputs + THREAD % SHARERS : THREAD;
    bool owns = SHARERS <= 32 ? THREAD % SHARERS < outputs : THREAD < teams * outputs;
    return owns && first + in_block < outer ? first + in_block : outer;
}

// Reduces the sums of a team's threads; this thread stores output n if n < outer. The next call must pass another `partial`, or come
// behind a barrier.
template <u32 SHARERS, typename Y, u32 R, u32 P, typename A>
DEVICE void finish_vector(float (&sum)[R], float (&partial)[P][R], u32 n, const A &more, Y *y, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team;
    u32 width = SHARERS < WAVE ? SHARERS : WAVE; // a team is a part of a wave, or several waves
    UNROLL for (u32 r = 0; r < R; ++r) sum[r] = wave_sum(sum[r], width);
    if (SHARERS <= 32) {
        UNROLL for (u32 o = 0; o < outputs; ++o)
            if (THREAD % SHARERS == o && n < outer) store_output(y, n, sum[o], sum[R - outputs + o], more);
        return;
    }
    UNROLL for (u32 r = 0; r < R; ++r)
        if (THREAD % width == 0) partial[THREAD / width][r] = sum[r];
    lds_barrier();
    if (n >= outer) return;
    u32 waves = SHARERS / width, wave = THREAD / outputs * waves, o = THREAD % outputs;
    float a = 0, b = 0;
    for (u32 p = wave; p < wave + waves; ++p) a += partial[p][o], b += partial[p][R - outputs + o];
    store_output(y, n, a, b, more);
}
