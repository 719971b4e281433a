// Logit bias and penalties. A thread per logit, which is copied where nothing changes it.

KERNEL(256) penalize(
    const float *logits,     // (R, V)
    const i32 *counts,       // (R, V) 0: not in the sequence; 1: in the prompt alone; 1 + times it was generated
    const float *bias,       // (R, V)
    const float *repetition, // (R,) divides positive logits and multiplies others
    const float *presence,   // (R,) subtracted once
    const float *frequency,  // (R,) subtracted for each time
    float *penalized,        // (R, V)
    u32 vocabulary           // V
) {
    grid_dependency_sync();
    u32 token = BLOCK_X * 256 + THREAD, row = BLOCK_Y;
    if (token >= vocabulary) return;
    u64 at = (u64)row * vocabulary + token;
    float z = logits[at], added = bias[at];
    i32 count = counts[at];
    if (as_u32(added) << 1) z = add_rn(z, added); // not for 0: a logit of -0 stays as it is
    if (count > 0) z = z > 0.0f ? div_rn(z, repetition[row]) : mul_rn(z, repetition[row]);
    if (count > 1) z = add_rn(add_rn(z, -presence[row]), -mul_rn(frequency[row], (float)(count - 1)));
    penalized[at] = z;
}
