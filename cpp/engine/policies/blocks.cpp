#include "engine/policies/blocks.h"
#include "core/scores.h"

#include <algorithm>

namespace laprox::policies {

ggml_tensor * plus(ggml_context * ctx, ggml_tensor * total, ggml_tensor * t) {
    return total ? ggml_add(ctx, total, t) : t;
}

ggml_tensor * sum_heads(ggml_context * ctx, ggml_tensor * t) {
    return ggml_reshape_1d(ctx, sum_dim1(ctx, ggml_reshape_3d(ctx, t, t->ne[0], t->ne[2], 1)), t->ne[0]);
}

ggml_tensor * max_heads(ggml_context * ctx, ggml_tensor * t) {
    return ggml_reshape_1d(ctx, max_dim1(ctx, ggml_reshape_3d(ctx, t, t->ne[0], t->ne[2], 1)), t->ne[0]);
}

ggml_tensor * of_heads(ggml_context * ctx, ggml_tensor * norms, int64_t first, int64_t m) {
    return ggml_view_3d(ctx, norms, norms->ne[0], 1, m, norms->nb[1], norms->nb[1], first*norms->nb[1]);
}

ggml_tensor * raw_value_norms(head_graph & g, int p) {
    ggml_context * ctx = g.ctx();
    return g.in_runs(64, [&](int64_t first, int64_t m) {
        ggml_tensor * v    = g.values(first, m);
        ggml_tensor * norm = p == 1 ? ggml_sum_rows(ctx, ggml_abs(ctx, v)) : ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, v)));
        return ggml_reshape_1d(ctx, norm, m);
    });
}

std::vector<float> pooled(const layer_scores::head & h, const std::vector<float> & number, pooling pool, int kernel) {
    const float * begin = number.data() + h.first;
    const size_t  n     = h.last - h.first;
    return pool == pooling::max     ? max_pool(begin, n, kernel)
         : pool == pooling::average ? average_pool(begin, n, kernel)
         :                            std::vector<float>(begin, begin + n);
}

ggml_tensor * mean_attention(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * total = nullptr;
    g.attention([&](ggml_tensor * a, int64_t, int64_t) {
        total = plus(ctx, total, sum_heads(ctx, sum_dim1(ctx, a)));
    });
    return ggml_scale(ctx, total, 1.0f/(float) (g.n_window*g.n_gqa));
}

sums_by_position::sums_by_position(const layer_scores & layer, const number_of & number) {
    for (const auto & h : layer.heads) {
        std::vector<llama_pos> both;
        std::set_union(positions.begin(), positions.end(), h.pos.begin(), h.pos.end(), std::back_inserter(both));
        positions = std::move(both);
    }
    sums.resize(positions.size());
    for (const auto & h : layer.heads) {
        size_t place = 0;
        for (size_t i = 0; i < h.pos.size(); i++) {
            while (positions[place] < h.pos[i]) {
                place++;
            }
            sums[place] += number(h, i);
        }
    }
}

double sums_by_position::at(llama_pos pos) const {
    return sums[std::lower_bound(positions.begin(), positions.end(), pos) - positions.begin()];
}

}
