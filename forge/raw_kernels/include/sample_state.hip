// Sampling: what the launches of a row hand on.

#define THREADS 512
#define DRAW_THREADS 1024
#define LISTED 2048
#define MAX_CHUNKS 512
#define NONE 0xffffffffu

// The memory of a row holds anything before the first launch.
struct Row {
    u64 sums[BINS];            // weights in a bin, if there is a top_p
    u64 listed[LISTED];        // `order_of` each listed token, in any order
    u64 greatest[MAX_CHUNKS];  // `order_of` the first token of each chunk
    u64 kept[MAX_CHUNKS];      // weight that is kept of each chunk without the listed tokens
    u32 counts[BINS];          // tokens in a bin, if there is a top_k
    u32 least[MAX_CHUNKS];     // the complement of `ordered_key` of the least finite logit of each chunk; 0 if there is none
    u64 before_first;          // weight in the bins before `first`
    u64 before_k;              // weight in the bins before `k_bin`; of all if there is none
    u32 first, last;           // the limit of top_p is in one of these bins or between; NONE: all is kept
    u32 k_bin, k_left;         // the limit of top_k is in this bin, behind k_left of its tokens; NONE: there is none
    u32 num_listed;            // tokens to list; above LISTED not all of them found room
    u32 top;                   // `ordered_key` of the greatest logit; 0: the row is done
    float unit;                // bins for each unit of (greatest logit - logit) / T
};
static_assert(sizeof(Row) == 8 * 6406, "ops/sampling.py allocates it");

DEVICE bool counts_tokens(i32 top_k, u32 vocabulary) { return (u32)top_k - 1 < vocabulary - 1; } // 0 < k < V
DEVICE bool is_positive(float t) { return as_u32(t) - 1 < 0x7f800000u; } // also where it is subnormal
