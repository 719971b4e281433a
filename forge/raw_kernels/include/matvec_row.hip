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

// The same as float16, two in a word; what was read between these two calls is on its way before they are waited for.
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<f16, P> &row, float, u32, float (&)[N]) {
    UNROLL for (u32 p = 0; p < P; ++p) {
        y[p] = row.x[p];
        UNROLL for (u32 i = 0; i < 4; ++i) settle(y[p].v[i]);
    }
}
template <u32 P, u32 N> DEVICE void finish_row(u32x4 (&y)[P], const Row<float, P> &row, float eps, u32 inner, float (&scratch)[N]) {
    float squares = 0;
    settle(squares);
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

// What is added to an output's sum, or to its gate and its up: read before the sum is there. And what is stored.
struct Addends {
    float first, second;
};
DEVICE Addends read_addends(const float *y, u32 n, const float *bias, u32, u32 accumulate) {
    return Addends{bias ? bias[n] : 0.0f, accumulate ? y[n] : 0.0f};
}
DEVICE Addends read_addends(const f16 *, u32 n, const float *bias, u32 outer, u32) {
    return bias ? Addends{bias[n], bias[outer + n]} : Addends{};
}
template <bool IS_SILU> DEVICE void store_output(float *y, u32 n, float sum, float, Addends more) { y[n] = sum + more.first + more.second; }
template <bool IS_SILU> DEVICE void store_output(f16 *y, u32 n, float gate, float up, Addends more) {
    y[n] = to_f16(activate<IS_SILU>(gate + more.first) * (up + more.second));
}

// The row of the matrix that is a team's r-th, where `first` is the team's first output. One too many is the last one
// again, and is not stored.
template <typename Y, u32 R> DEVICE u32 team_row(u32 first, u32 r, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team;
    u32 n = first + r % outputs < outer ? first + r % outputs : outer - 1;
    return r < outputs ? n : outer + n;
}

// The output that this thread stores, of those of a block from `first` on, by teams of SHARERS threads; `outer` for none.
template <u32 SHARERS, typename Y, u32 R, u32 THREADS> DEVICE u32 own_output(u32 first, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team, teams = THREADS / SHARERS;
    u32 in_block = SHARERS <= 32 ? THREAD / SHARERS * outputs + THREAD % SHARERS : THREAD;
    bool owns = SHARERS <= 32 ? THREAD % SHARERS < outputs : THREAD < teams * outputs;
    return owns && first + in_block < outer ? first + in_block : outer;
}

// From the sums of a team's threads to its outputs; this thread stores n, if that is one. `partial` must be another one, or
// behind a barrier, in the next call.
template <u32 SHARERS, bool IS_SILU, typename Y, u32 R, u32 P>
DEVICE void finish_vector(float (&sum)[R], float (&partial)[P][R], u32 n, const Addends &more, Y *y, u32 outer) {
    const u32 outputs = Outputs<Y, R>::per_team;
    u32 width = SHARERS < WAVE ? SHARERS : WAVE; // a team is a part of a wave, or some waves: these join their sums
    UNROLL for (u32 r = 0; r < R; ++r) sum[r] = wave_sum(sum[r], width);
    if (SHARERS <= 32) {
        UNROLL for (u32 o = 0; o < outputs; ++o)
            if (THREAD % SHARERS == o && n < outer) store_output<IS_SILU>(y, n, sum[o], sum[R - outputs + o], more);
        return;
    }
    UNROLL for (u32 r = 0; r < R; ++r)
        if (THREAD % width == 0) partial[THREAD / width][r] = sum[r];
    lds_barrier();
    if (n >= outer) return;
    u32 waves = SHARERS / width, wave = THREAD / outputs * waves, o = THREAD % outputs;
    float a = 0, b = 0;
    for (u32 p = wave; p < wave + waves; ++p) a += partial[p][o], b += partial[p][R - outputs + o];
    store_output<IS_SILU>(y, n, a, b, more);
}
