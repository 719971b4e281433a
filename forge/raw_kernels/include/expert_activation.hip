// Activations of experts, by their number: SiLU, GELU or a clamped SwiGLU of a gate and an up, or the square of what is positive in an
// up, which then stands in the gate's place.

#define CLAMPED_SWIGLU 2
#define RELU2 3

DEVICE float expert_activate(float gate, float up, u32 activation) {
    if (activation == RELU2) return gate > 0 ? gate * gate : gate * 0.0f; // NaN stays
    if (activation != CLAMPED_SWIGLU) return activate(gate, activation) * up;
    gate = gate > 7.0f ? 7.0f : gate;
    up = up > 7.0f ? 7.0f : up < -7.0f ? -7.0f : up;
    return (up + 1.0f) * fast_divide(gate, 1.0f + fast_exp(-1.702f * gate));
}
