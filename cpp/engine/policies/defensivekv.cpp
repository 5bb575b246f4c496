// DefensiveKV: the worst case over queries. defensivekv:global-raw is its Layer-DefensiveKV.

#include "engine/policies/blocks.h"

#include <algorithm>
#include <numeric>

namespace laprox::policies {

static const double unsecured = 0.1; // of a head's attention

// Each query's weights before the recent tokens, averaged over 5 tokens and rescaled to the mass they had: their maximum and
// their mean over window and group; and the mean over the group of ||v_i W_h||_1.
static ggml_tensor * defensivekv_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * best = nullptr, * mean = nullptr;
    const int64_t n = g.n_before;
    if (n == 0) {
        return ggml_concat(ctx, ggml_concat(ctx, mean_attention(g), mean_attention(g), 1), g.projected_l1(), 1);
    }
    g.attention([&](ggml_tensor * a, int64_t, int64_t) {
        a = ggml_cont(ctx, ggml_view_3d(ctx, a, n, a->ne[1], a->ne[2], a->nb[1], a->nb[2], 0));
        ggml_tensor * padded = ggml_pad_ext(ctx, a, 2, 2, 0, 0, 0, 0, 0, 0);
        ggml_tensor * pool   = nullptr;
        for (int64_t shift = 0; shift < 5; shift++) {
            pool = plus(ctx, pool, ggml_cont(ctx, ggml_view_3d(ctx, padded, n, a->ne[1], a->ne[2], padded->nb[1], padded->nb[2], shift*padded->nb[0])));
        }
        // an observed query may see none of these
        ggml_tensor * mass = ggml_div(ctx, ggml_sum_rows(ctx, a), ggml_scale_bias(ctx, ggml_sum_rows(ctx, pool), 1.0f, 1e-30f));
        pool = ggml_mul(ctx, pool, mass);
        ggml_tensor * most = max_heads(ctx, max_dim1(ctx, pool));
        best = best ? max_of(ctx, best, most) : most;
        mean = plus(ctx, mean, sum_heads(ctx, sum_dim1(ctx, pool)));
    });
    mean = ggml_scale(ctx, mean, 1.0f/(float) (g.n_window*g.n_gqa));
    const auto padded = [&](ggml_tensor * t) { return ggml_pad_ext(ctx, t, 0, (int) (g.n - n), 0, 0, 0, 0, 0, 0); };
    return ggml_concat(ctx, ggml_concat(ctx, padded(best), padded(mean), 1), g.projected_l1(), 1);
}

// The worst case over queries, no less than the head's mean, times the value's share among the layer's heads. The heaviest tokens
// with which most of a head's mean attention is secured, the recent tokens' share included, come before all others.
static void defensivekv_finish(layer_scores & layer) {
    const sums_by_position values(layer, [](const layer_scores::head & h, size_t i) { return h.numbers[2][i]; });
    for (auto & h : layer.heads) {
        const auto & worst = h.numbers[0];
        const auto & mean  = h.numbers[1];
        const float  floor = h.last > 0 ? (float) (std::accumulate(worst.begin(), worst.begin() + h.last, 0.0)/h.last) : 0.0f;
        for (size_t i = h.first; i < h.last; i++) {
            h.score[i - h.first] = std::max(worst[i], floor)*(float) (h.numbers[2][i]/std::max(values.at(h.pos[i]), 1e-30));
        }

        std::vector<size_t> order(h.last);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return mean[a] > mean[b]; });
        const double all = std::accumulate(mean.begin(), mean.begin() + h.last, 0.0);
        double mass = 0.0;
        for (size_t rank = 0; rank < order.size() && mass < all - unsecured; rank++) {
            mass += mean[order[rank]];
            if (order[rank] >= h.first) {
                // all other scores are at most 1: shares of weights
                h.score[order[rank] - h.first] = 2.0f - (float) std::min<size_t>(rank, (1 << 20) - 1)/(float) (1 << 20);
            }
        }
    }
}

extern const scorer defensivekv {
    .name      = "defensivekv",
    .allocator = "ada",
    .needs     = need::window,
    .n_numbers = 3,
    .graph     = defensivekv_graph,
    .finish    = defensivekv_finish,
};

}
