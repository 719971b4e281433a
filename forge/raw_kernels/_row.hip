// What products of one row share: the row as each block takes it, and what becomes of their sums.
//
// The row x is float16, or of the residual stream in float32: then each block normalizes it, as norm.hip's rmsnorm does.
// What a thread holds of it are P eights.
template <typename X, u32 P> struct Row;
template <u32 P> struct Row<f16, P> {
    u32x4 x[P];
};
template <u32 P> struct Row<float, P> {
    f32x4 x[P][2], norm[P][2];
};

// The eights that begin at these places; zeros where that is past the row's end.
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

// The same as float16, two in a word.
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<f16, P> &row, float, u32, float (&)[N]) {
    UNROLL for (u32 p = 0; p < P; ++p) y[p] = row.x[p];
}
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<float, P> &row, float eps, u32 inner, float (&scratch)[N]) {
    float squares = 0;
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 i = 0; i < 8; ++i) squares += row.x[p][i / 4].v[i % 4] * row.x[p][i / 4].v[i % 4];
    float scale = rsqrt_fast(fast_divide(block_sum(squares, scratch), (float)inner) + eps);
    UNROLL for (u32 p = 0; p < P; ++p)
        UNROLL for (u32 i = 0; i < 8; i += 2) {
            f16 low = to_f16(row.x[p][i / 4].v[i % 4] * scale * row.norm[p][i / 4].v[i % 4]);
            f16 high = to_f16(row.x[p][i / 4].v[i % 4 + 1] * scale * row.norm[p][i / 4].v[i % 4 + 1]);
            y[p].v[i / 2] = low.bits | (u32)high.bits << 16;
        }
}

// What becomes of the sums: y[n] in float32, sum + bias (+ what y holds); or in float16, activation(gate) * up, where the first
// half of a team's R rows of the matrix are gates n, the others the ups outer + n.
template <typename Y, u32 R> struct Outputs {
    static const bool gated = sizeof(Y) == 2;
    static const u32 per_team = gated ? R / 2 : R;
};

template <bool IS_SILU> DEVICE void store_output(float *y, u32 n, float sum, float, const float *bias, u32, u32 accumulate) {
    if (bias) sum += bias[n];
    y[n] = accumulate ? y[n] + sum : sum;
}
template <bool IS_SILU> DEVICE void store_output(f16 *y, u32 n, float gate, float up, const float *bias, u32 outer, u32) {
    if (bias) gate += bias[n], up += bias[outer + n];
    y[n] = to_f16(activate<IS_SILU>(gate) * up);
}

// The row of the matrix that is a team's r-th, where `first` is the team's first output. One too many is the last one
// again, and is not stored.
template <typename Y, u32 R> DEVICE u32 team_row(u32 first, u32 r, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team;
    u32 n = first + r % outputs < outer ? first + r % outputs : outer - 1;
    return r < outputs ? n : outer + n;
}

// From the sums of SHARERS threads (a team). `first` is the block's first output; `partial` must be another one, or behind a barrier, in the next call.
template <u32 SHARERS, bool IS_SILU, typename Y, u32 R, u32 P>
DEVICE void finish_vector(float (&sum)[R], float (&partial)[P][R], u32 first, const float *bias, Y *y, u32 outer, u32 accumulate) {
    const u32 teams = P * 32 / SHARERS, outputs = Outputs<Y, R>::per_team;
    u32 width = SHARERS < WAVE ? SHARERS : WAVE; // a team is a part of a wave, or some waves: these join their sums
    UNROLL for (u32 r = 0; r < R; ++r) sum[r] = wave_sum(sum[r], width);
    if (SHARERS <= 32) {
        UNROLL for (u32 o = 0; o < outputs; ++o) {
            u32 n = first + THREAD / SHARERS * outputs + o;
            if (THREAD % SHARERS == o && n < outer) store_output<IS_SILU>(y, n, sum[o], sum[R - outputs + o], bias, outer, accumulate);
        }
        return;
    }
    UNROLL for (u32 r = 0; r < R; ++r)
        if (THREAD % width == 0) partial[THREAD / width][r] = sum[r];
    lds_barrier();
    for (u32 i = THREAD; i < teams * outputs; i += P * 32) {
        u32 waves = SHARERS / width, wave = i / outputs * waves, o = i % outputs;
        float a = 0, b = 0;
        for (u32 p = wave; p < wave + waves; ++p) a += partial[p][o], b += partial[p][R - outputs + o];
        if (first + i < outer) store_output<IS_SILU>(y, first + i, a, b, bias, outer, accumulate);
    }
}
