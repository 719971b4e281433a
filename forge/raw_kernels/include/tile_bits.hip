// Bits by the instructions that NVIDIA's compilers do not choose:
//
//   and_or(a, b, c)     (a & b) | c by one instruction: they make two where b and c are constants.
//   twice(pair, which)  Two float16 that are both the lower (0) or the upper (1) of a pair, as a choice of halves, which
//                       instructions have for free.

#if defined(FORGE_HARNESS)
DEVICE u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
DEVICE u32 twice(u32 pair, u32 which) { return byte_perm(0, pair, which ? 0x03020302u : 0x01000100u); }
#else
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
DEVICE u32 twice(u32 pair, u32 which) {
    u32 y;
    if (which)
        asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {h, h};}" : "=r"(y) : "r"(pair));
    else
        asm("{.reg .b16 l, h;\nmov.b32 {l, h}, %1;\nmov.b32 %0, {l, l};}" : "=r"(y) : "r"(pair));
    return y;
}
#endif
