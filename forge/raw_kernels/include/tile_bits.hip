// and_or(a, b, c) is (a & b) | c by one instruction, of which NVIDIA's compilers make two where b and c are constants.

#if defined(FORGE_HARNESS)
DEVICE u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
#else
DEVICE u32 and_or(u32 a, u32 b, u32 c) {
    u32 y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(a), "r"(b), "r"(c));
    return y;
}
#endif
