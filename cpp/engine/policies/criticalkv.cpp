// CriticalKV (arXiv 2502.03805): SnapKV, and then what values would move the output. criticalkv:ada is its CriticalAda.

#include "engine/policies/blocks.h"

namespace laprox::policies {

static const float epsilon = 1e-4f;

// SnapKV's attention, and the mean over the group of ||v_i W_h||_1.
static ggml_tensor * criticalkv_graph(head_graph & g) {
    return ggml_concat(g.ctx(), mean_attention(g), g.projected_l1(), 1);
}

// Half of a head's budget goes to the highest SnapKV scores, the rest to the highest (score + epsilon) * L1 norm.
static void criticalkv_finish(layer_scores & layer) {
    for (auto & h : layer.heads) {
        for (size_t i = 0; i < h.score.size(); i++) {
            h.second.push_back((h.score[i] + epsilon)*h.numbers[1][h.first + i]);
        }
    }
}

extern const scorer criticalkv {
    .name      = "criticalkv",
    .paper     = "2502.03805",
    .needs     = need::window,
    .n_numbers = 2,
    .graph     = criticalkv_graph,
    .pool      = pooling::max,
    .kernel    = 7,
    .finish    = criticalkv_finish,
};

}
