// Energy: all that a probe read from an entry, beside what it read from others of that head. Ours, for texts that are compressed
// before anybody asks: LaProx (arXiv 2605.07234) with what makes KVzip (2505.23416) work, one ranking of raw scores over all layers.

#include "engine/policies/blocks.h"

#include <cmath>

namespace laprox::policies {

// Attention weights are scaled by this before they are squared: small ones don't underflow, and sums stay finite.
static const float weight_scale = 1e12f;

// ||v_i W_h||_2 over its mean over a query head's entries: [n, n_gqa]. Beside other layers' norms it would say how deep a layer is:
// the last ones, whose outputs are large in any model, would take the budget from those that find things.
static ggml_tensor * relative_norms(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * norms = g.value_norms();
    ggml_tensor * mean  = ggml_scale(ctx, ggml_sum_rows(ctx, norms), 1.0f/(float) g.n);
    return ggml_div(ctx, norms, ggml_clamp(ctx, mean, 1e-20f, INFINITY));
}

// Root of the sum over queries and group of (A[:,i] * relative norm)^2.
static ggml_tensor * energy_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * norms = ggml_sqr(ctx, relative_norms(g));
    ggml_tensor * total = nullptr;
    g.attention([&](ggml_tensor * a, int64_t first, int64_t m) {
        ggml_tensor * squares = sum_dim1(ctx, ggml_sqr(ctx, ggml_scale(ctx, a, weight_scale))); // [n, 1, m]
        total = plus(ctx, total, sum_heads(ctx, ggml_mul(ctx, squares, of_heads(ctx, norms, first, m))));
    });
    return ggml_scale(ctx, ggml_sqrt(ctx, total), 1.0f/weight_scale);
}

extern const scorer energy {
    .name      = "energy",
    .allocator = "global-raw",
    .needs     = need::window,
    .graph     = energy_graph,
    .looks     = over_looks::norm,
};

}
