// LAVa: how much a head's output could move.

#include "engine/policies/blocks.h"

#include <algorithm>

namespace laprox::policies {

// Mean attention of the group's query head that looks most, and ||v_i||_1.
static ggml_tensor * lava_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * best = nullptr;
    g.attention([&](ggml_tensor * a, int64_t, int64_t) {
        ggml_tensor * mean = max_heads(ctx, ggml_scale(ctx, sum_dim1(ctx, a), 1.0f/(float) g.n_window));
        best = best ? max_of(ctx, best, mean) : mean;
    });
    return ggml_concat(ctx, best, raw_value_norms(g, 1), 1);
}

// Times the head's largest value.
static void lava_finish(layer_scores & layer) {
    for (auto & h : layer.heads) {
        const float largest = h.pos.empty() ? 0.0f : *std::max_element(h.numbers[1].begin(), h.numbers[1].end());
        for (float & score : h.score) {
            score *= largest;
        }
    }
}

extern const scorer lava {
    .name      = "lava",
    .allocator = "lava",
    .needs     = need::window,
    .n_numbers = 2,
    .graph     = lava_graph,
    .pool      = pooling::max,
    .kernel    = 7,
    .finish    = lava_finish,
};

}
