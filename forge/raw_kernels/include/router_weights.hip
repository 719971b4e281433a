// Shared by the routers of a mixture of experts: what becomes of logits and of the experts that were chosen.

// How a logit becomes a score: by a sigmoid, or by a softmax whose largest logit and sum of powers these are.
struct Scores {
    bool is_sigmoid;
    float most, total;
};
DEVICE float score_of(const Scores &scores, float logit) {
    if (scores.is_sigmoid) return fast_divide(1.0f, 1.0f + fast_exp(-logit));
    return fast_divide(fast_exp(logit - scores.most), scores.total);
}

// Scores by a softmax of these logits. A wave calls it.
DEVICE Scores softmax_scores(const float *logits, u32 experts) {
    float most = NEG_INFINITY, total = 0;
    for (u32 e = LANE; e < experts; e += WAVE) most = larger(most, logits[e]);
    most = wave_max(most);
    for (u32 e = LANE; e < experts; e += WAVE) total += fast_exp(logits[e] - most);
    return Scores{false, most, wave_sum(total)};
}

// A wave stores a row's experts, of which a lane has the one in its place, if there is any, and their weights.
DEVICE void store_choice(
    i32 *chosen, float *weights, bool there, u32 expert, float logit, const Scores &scores, bool renormalizes, float factor, const float *expert_scale
) {
    float greatest = wave_max(there ? logit : NEG_INFINITY);
    float share = there ? (renormalizes && !scores.is_sigmoid ? fast_exp(logit - greatest) : score_of(scores, logit)) : 0.0f;
    float shares = larger(wave_sum(share), 6.103515625e-5f); // 2**-14
    if (renormalizes) share = fast_divide(share, shares);
    if (!there) return;
    chosen[LANE] = (i32)expert;
    weights[LANE] = share * factor * (expert_scale ? expert_scale[expert] : 1.0f);
}
