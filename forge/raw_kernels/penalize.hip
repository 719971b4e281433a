// Logit bias and penalties: a thread per logit, which is copied where nothing changes it.

KERNEL(256) penalize(const float *logits, const i32 *counts, const float *bias, const float *repetition, const float *presence, const float *frequency, float *penalized, u32 vocabulary) {
    grid_dependency_sync();
    u32 token = BLOCK_X * 256 + THREAD, row = BLOCK_Y;
    if (token >= vocabulary) return;
    u64 at = (u64)row * vocabulary + token;
    float z = logits[at], added = bias[at];
    i32 count = counts[at];
    if (as_u32(added) << 1) z = add_rn(z, added); // not 0: z may be -0, which stays
    if (count > 0) z = z > 0.0f ? div_rn(z, repetition[row]) : mul_rn(z, repetition[row]);
    if (count > 1) z = add_rn(add_rn(z, -presence[row]), -mul_rn(frequency[row], (float)(count - 1)));
    penalized[at] = z;
}
