// Shared by the GEMV kernels of a mixture of experts: which row of its expert's matrix an output has, and what becomes of the sums.

#define MAX_USED 32 // experts of a row

// Activations of the first product, float16: of a gate and an up, or of an up alone.
struct OfGate {
    f16 v;
};
struct OfUp {
    f16 v;
};
template <u32 R> struct Outputs<OfUp, R> {
    static const bool gated = false;
    static const u32 per_team = R;
};
#if GATED
typedef OfGate Activation;
#else
typedef OfUp Activation;
#endif
#define FIRST_ROWS(width) ((GATED ? 2 : 1) * (width)) // of an expert's first matrix: gates, then ups

// What happens to a sum, or to those of a gate and its up: they are multiplied, then biases are added.
struct FirstAddends {
    float first, second, factor;
    u32 activation;
};
// Of output n of the expert whose matrix begins with this row.
DEVICE FirstAddends first_addends(u64 matrix, float factor, const float *bias, u32 n, u32 width, u32 activation) {
    FirstAddends more{0.0f, 0.0f, factor, activation};
    if (n < width && bias) more.first = bias[matrix + n], more.second = GATED ? bias[matrix + n + width] : 0.0f;
    return more;
}
DEVICE void store_output(OfGate *h, u32 n, float gate, float up, const FirstAddends &more) {
    h[n].v = to_f16(expert_activate(gate * more.factor + more.first, up * more.factor + more.second, more.activation));
}
DEVICE void store_output(OfUp *h, u32 n, float up, float, const FirstAddends &more) {
    h[n].v = to_f16(expert_activate(up * more.factor + more.first, 0.0f, RELU2));
}

// What is added to output n of the weighted sum.
DEVICE Addends second_addends(
    const i32 (&experts)[MAX_USED], const float (&share)[MAX_USED], const float *bias, const float *y, u32 n, u32 outer, u32 used, u32 accumulate
) {
    Addends more{0.0f, 0.0f};
    if (n >= outer) return more;
    if (accumulate) more.second = y[n];
    for (u32 u = 0; bias && u < used; ++u) more.first += share[u] * bias[(u64)experts[u] * outer + n];
    return more;
}

// The row's experts and their weights, 1 where there are none, in LDS. The caller meets at a barrier before it reads them.
DEVICE void load_choice(i32 (&experts)[MAX_USED], float (&share)[MAX_USED], const i32 *chosen, const float *weights, u32 used) {
    if (THREAD < used) experts[THREAD] = chosen[THREAD], share[THREAD] = weights ? weights[THREAD] : 1.0f;
}
