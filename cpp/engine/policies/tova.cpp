// TOVA (arXiv 2401.06104): what the last query looks at; the heads of a layer share one score.

#include "engine/policies/blocks.h"

namespace laprox::policies {

// The last query's attention, mean over the group.
static ggml_tensor * tova_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * total = nullptr;
    g.last_attention([&](ggml_tensor * a, int64_t, int64_t) {
        total = plus(ctx, total, sum_heads(ctx, a));
    });
    return ggml_scale(ctx, total, 1.0f/(float) g.n_gqa);
}

// Mean over the heads that still hold the token.
static void tova_finish(layer_scores & layer) {
    const sums_by_position sums(layer, [](const layer_scores::head & h, size_t i) { return h.numbers[0][i]; });
    const sums_by_position holders(layer, [](const layer_scores::head &, size_t) { return 1.0; });
    for (auto & h : layer.heads) {
        for (size_t i = h.first; i < h.last; i++) {
            h.score[i - h.first] = (float) (sums.at(h.pos[i])/holders.at(h.pos[i]));
        }
    }
}

extern const scorer tova {
    .name   = "tova",
    .paper  = "2401.06104",
    .needs  = need::window,
    .graph  = tova_graph,
    .finish = tova_finish,
};

}
