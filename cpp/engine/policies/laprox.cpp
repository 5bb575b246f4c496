// LaProx (arXiv 2605.07234): what an entry adds to the output of its layer.

#include "engine/policies/blocks.h"

namespace laprox::policies {

// Attention weights are scaled by this before they are squared; the sum of up to 1024 such squares is still finite.
static const float weight_scale = 1e16f;

// Algorithm 1: mean over the group of ||A[:,i]||_2 * ||v_i W_h||_2. The mean is of products, per query head; pooling is
// of the product, as in the paper's experiments.
static ggml_tensor * laprox_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * norms = g.value_norms();
    ggml_tensor * total = nullptr;
    g.attention([&](ggml_tensor * a, int64_t first, int64_t m) {
        // squares of small weights would underflow, and entries that differ would tie at 0
        ggml_tensor * energy = ggml_sqrt(ctx, sum_dim1(ctx, ggml_sqr(ctx, ggml_scale(ctx, a, weight_scale)))); // [n, 1, m]
        total = plus(ctx, total, sum_heads(ctx, ggml_mul(ctx, energy, of_heads(ctx, norms, first, m))));
    });
    return ggml_scale(ctx, total, 1.0f/(weight_scale*(float) g.n_gqa));
}

extern const scorer laprox {
    .name      = "laprox",
    .paper     = "2605.07234",
    .allocator = "global",
    .needs     = need::window,
    .graph     = laprox_graph,
    .pool      = pooling::average,
    .kernel    = 7,
};

}
