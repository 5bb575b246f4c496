// CAKE (arXiv 2503.12491): attention and how much it shifts; layers share by their entropy and variance.

#include "engine/policies/blocks.h"

#include <algorithm>

namespace laprox::policies {

static const float variance_weight = 200.0f;

// Mean and (unbiased) variance over the window, both means over the group; and -sum A log A over both.
static ggml_tensor * cake_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * mean = nullptr, * variance = nullptr, * entropy = nullptr;
    const float n_free = (float) std::max<int64_t>(g.n_window - 1, 1);
    g.attention([&](ggml_tensor * a, int64_t, int64_t) {
        ggml_tensor * mu = ggml_scale(ctx, sum_dim1(ctx, a), 1.0f/(float) g.n_window);
        mean     = plus(ctx, mean,     sum_heads(ctx, mu));
        variance = plus(ctx, variance, sum_heads(ctx, ggml_scale(ctx, sum_dim1(ctx, ggml_sqr(ctx, ggml_sub(ctx, a, mu))), 1.0f/n_free)));
        entropy  = plus(ctx, entropy,  sum_heads(ctx, sum_dim1(ctx, ggml_mul(ctx, a, ggml_log(ctx, ggml_scale_bias(ctx, a, 1.0f, 1e-10f))))));
    });
    const float share = 1.0f/(float) g.n_gqa;
    return ggml_concat(ctx, ggml_concat(ctx, ggml_scale(ctx, mean, share), ggml_scale(ctx, variance, share), 1), ggml_scale(ctx, entropy, -1.0f), 1);
}

// Score: mean + weighted variance, averaged over 5 tokens. A layer's preference: its entropy times its variance, over all keys
// before the recent ones; the paper's exponents 1/tau were tuned per model, the authors' fallback is 1.
static void cake_finish(layer_scores & layer) {
    double entropy = 0.0, variance = 0.0;
    for (auto & h : layer.heads) {
        std::vector<float> score(h.pos.size());
        for (size_t i = 0; i < score.size(); i++) {
            score[i] = h.numbers[0][i] + variance_weight*h.numbers[1][i];
        }
        for (size_t i = 0; i < h.last; i++) {
            entropy  += h.numbers[2][i];
            variance += (double) h.numbers[1][i]*layer.n_gqa;
        }
        h.score = pooled(h, score, pooling::average, 5);
    }
    layer.preference = std::max(entropy, 0.0)*variance;
}

extern const scorer cake {
    .name      = "cake",
    .paper     = "2503.12491",
    .allocator = "cake",
    .needs     = need::window,
    .n_numbers = 3,
    .graph     = cake_graph,
    .finish    = cake_finish, // pools a sum of two numbers
    .has_preference = true,
};

}
