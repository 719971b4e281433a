// Matrices that a file has in bfloat16 become float16, in place. A thread has WORDS words of two numbers each.

const u32 WORDS = 4;

KERNEL(256) bf16_to_f16(
    u32 *words,  // (N,) two bfloat16 numbers each, the first one in the low half; then two of float16
    i32 *beyond, // (1,) becomes 1 where a number is beyond float16
    u64 count    // N
) {
    u64 first = ((u64)BLOCK_X * 256 + THREAD) * WORDS;
    bool is_beyond = false;
    UNROLL for (u32 i = 0; i < WORDS; ++i) {
        if (first + i >= count) break;
        u32 word = words[first + i], made = to_f16x2(as_float(word << 16), as_float(word & 0xFFFF0000));
        is_beyond = is_beyond || (made & 0x7FFF) == 0x7C00 || (made & 0x7FFF0000) == 0x7C000000;
        words[first + i] = made;
    }
    if (is_beyond) *beyond = 1;
}
