// LU-KV (arXiv 2602.08585): the measures that its profiles are made with (`laprox profile`). The policy is LaProx, or another
// scorer, under the allocator "profile".

#include "engine/policies/blocks.h"

namespace laprox::policies {

// The oracle: max over the observed queries and the group of A[t,i] * ||v_i W_h||_2. With the queries of decode steps
// in the window, it is what the entries were worth to them.
static ggml_tensor * oracle_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * norms = g.value_norms();
    ggml_tensor * best  = nullptr;
    g.attention([&](ggml_tensor * a, int64_t first, int64_t m) {
        ggml_tensor * worth = max_heads(ctx, ggml_mul(ctx, max_dim1(ctx, a), of_heads(ctx, norms, first, m)));
        best = best ? max_of(ctx, best, worth) : worth;
    });
    return best;
}

// Mean over the group of ||v_i W_h||_2.
static ggml_tensor * vnorm_graph(head_graph & g) {
    ggml_tensor * norms = g.value_norms();
    return ggml_scale(g.ctx(), sum_heads(g.ctx(), ggml_view_3d(g.ctx(), norms, g.n, 1, g.n_gqa, norms->nb[1], norms->nb[1], 0)), 1.0f/(float) g.n_gqa);
}

extern const scorer oracle {
    .name  = "oracle",
    .needs = need::window,
    .graph = oracle_graph,
    .named = false,
};

extern const scorer vnorm {
    .name  = "vnorm",
    .graph = vnorm_graph,
    .named = false,
};

}
