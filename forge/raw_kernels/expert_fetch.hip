// Copies what a mixture's chosen experts have in one memory, the host's, to the same places of another, the device's.
//
// An expert's planes lie apart, and begin at any byte: whole pieces of 16 bytes are copied that hold them. What lies in them beside
// the expert is the same in both memories, or not read.

#define THREADS 256
#define MAX_EXPERTS 512
#define MAX_PARTS 12
#define EACH 4 // pieces that a thread has under way
#define NOWHERE (~(u64)0)

// Pieces that hold so many bytes wherever they begin.
DEVICE u32 pieces_of(u32 bytes) { return (bytes + 15) / 16 + (bytes % 16 != 0); }

// The place of an expert's n-th piece.
DEVICE u64 place_of(u32 n, u32 expert, const u32 (&begin)[MAX_PARTS], const u32 (&bytes)[MAX_PARTS]) {
    u32 p = 0;
    while (n >= pieces_of(bytes[p])) n -= pieces_of(bytes[p++]);
    u64 start = (u64)expert * bytes[p], piece = start / 16 + n;
    return piece * 16 < start + bytes[p] ? begin[p] + piece : NOWHERE;
}

KERNEL(THREADS) fetch_experts(
    const i32 *chosen, // (P,)
    const u32 *source, // parts, each with so many bytes for each expert
    u32 *target,       // the same places
    const u32 *parts,  // (parts, 2) where each begins, in pieces; bytes of an expert
    u32 pairs,         // P
    u32 num_parts,     // at most 12
    u32 blocks
) {
    SHARED u32 there[MAX_EXPERTS], experts[MAX_EXPERTS], own[THREADS], begin[MAX_PARTS], bytes[MAX_PARTS];
    if (THREAD < num_parts) begin[THREAD] = parts[2 * THREAD], bytes[THREAD] = parts[2 * THREAD + 1];
    for (u32 e = THREAD; e < MAX_EXPERTS; e += THREADS) there[e] = 0;
    lds_barrier();
    grid_dependency_sync();
    for (u32 p = THREAD; p < pairs; p += THREADS) there[(u32)chosen[p]] = 1; // each once, however often it was chosen
    lds_barrier();
    u32 mine = there[2 * THREAD] + there[2 * THREAD + 1];
    own[THREAD] = mine;
    lds_barrier();
    for (u32 distance = 1; distance < THREADS; distance *= 2) { // sums of the threads before
        u32 more = THREAD >= distance ? own[THREAD - distance] : 0;
        lds_barrier();
        own[THREAD] += more;
        lds_barrier();
    }
    u32 place = own[THREAD] - mine;
    if (there[2 * THREAD]) experts[place++] = 2 * THREAD;
    if (there[2 * THREAD + 1]) experts[place] = 2 * THREAD + 1;
    u32 each = 0; // pieces of an expert
    for (u32 p = 0; p < num_parts; ++p) each += pieces_of(bytes[p]);
    lds_barrier();
    u32 total = own[THREADS - 1] * each, stride = blocks * THREADS;
    for (u32 first = BLOCK_X * THREADS + THREAD; first < total; first += EACH * stride) {
        u64 at[EACH];
        u32x4 held[EACH];
        UNROLL for (u32 i = 0; i < EACH; ++i) {
            u32 n = first + i * stride, expert = n / each;
            at[i] = n < total ? place_of(n - expert * each, experts[expert], begin, bytes) : NOWHERE;
        }
        UNROLL for (u32 i = 0; i < EACH; ++i)
            if (at[i] != NOWHERE) held[i] = load_streaming((const u32x4 *)source + at[i]);
        UNROLL for (u32 i = 0; i < EACH; ++i)
            if (at[i] != NOWHERE) store(target + 4 * at[i], held[i]);
    }
}
