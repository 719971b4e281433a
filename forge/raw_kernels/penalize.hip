// Logit bias and penalties, in place. A block per row; a token is in each of its lists at most once.

#define THREADS 256

KERNEL(THREADS) penalize(float *logits, const i32 *starts, const i32 *tokens, const i32 *generated, const float *repetition, const float *presence, const float *frequency, const i32 *bias_starts, const i32 *bias_tokens, const float *bias_values, u32 vocabulary) {
    u32 row = BLOCK_X;
    float *z = logits + (u64)row * vocabulary;
    for (u32 i = (u32)bias_starts[row] + THREAD; i < (u32)bias_starts[row + 1]; i += THREADS)
        z[bias_tokens[i]] = add_rn(z[bias_tokens[i]], bias_values[i]);
    barrier(); // the lists may share tokens
    float r = repetition[row];
    for (u32 i = (u32)starts[row] + THREAD; i < (u32)starts[row + 1]; i += THREADS) {
        float x = z[tokens[i]];
        x = x > 0.0f ? div_rn(x, r) : mul_rn(x, r);
        if (generated[i] > 0) x = add_rn(add_rn(x, -presence[row]), -mul_rn(frequency[row], (float)generated[i]));
        z[tokens[i]] = x;
    }
}
