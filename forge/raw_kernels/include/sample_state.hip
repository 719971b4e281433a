// Sampling: what the launches of a row hand on.
//
// The edge bin is that of the limit of top_k, or of top_p where top_k keeps all. Equal logits may crowd it.

#define THREADS 512
#define DRAW_THREADS 1024
#define LISTED 1024 // tokens of a list
#define MAX_CHUNKS 512
#define NONE 0xffffffffu

// The memory of a row holds anything before the first launch.
struct Row {
    u64 sums[BINS];            // weights in a bin, if there is a top_p
    u64 listed[LISTED];        // `order_of` each listed token that is not in the edge bin, in any order
    u64 at_edge[LISTED];       // `order_of` each token in the edge bin, in any order
    u64 greatest[MAX_CHUNKS];  // `order_of` the first token of each chunk
    u64 kept[MAX_CHUNKS];      // weight that is kept of each chunk without the listed tokens
    u32 counts[BINS];          // tokens in a bin, if there is a top_k
    u32 least[MAX_CHUNKS];     // the complement of `ordered_key` of the least finite logit of each chunk; 0 if there is none
    u32 edge_counts[MAX_CHUNKS]; // tokens of each chunk in the edge bin
    u32 edge_most[MAX_CHUNKS];   // `ordered_key` of the greatest of them, and the complement of that of the least; 0 if there is none
    u32 edge_least[MAX_CHUNKS];
    u64 before_first;          // weight in the bins before `first`
    u64 before_k;              // weight in the bins before `k_bin`; of all if there is none
    u32 first, last;           // the limit of top_p is in one of these bins or between; NONE: all is kept
    u32 k_bin, k_left;         // the limit of top_k is in this bin, behind k_left of its tokens; NONE: there is none
    u32 num_listed;            // tokens to list; above LISTED not all of them found room
    u32 num_at_edge;           // tokens in the edge bin; the same
    u32 top;                   // `ordered_key` of the greatest logit; 0: the row is done
    float unit;                // bins for each unit of (greatest logit - logit) / T
};
static_assert(sizeof(Row) == 8 * 7174, "ops/sampling.py allocates it");

DEVICE bool counts_tokens(i32 top_k, u32 vocabulary) { return (u32)top_k - 1 < vocabulary - 1; } // 0 < k < V
DEVICE bool is_positive(float t) { return as_u32(t) - 1 < 0x7f800000u; } // also where it is subnormal
