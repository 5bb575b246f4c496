// R-KV (arXiv 2505.24133): important, and not redundant.

#include "engine/policies/blocks.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace laprox::policies {

static const double importance_weight = 0.1;
static const double redundancy_weight = 0.9;
static const float  alike_from        = 0.5f; // cosine

// Importance: softmax over the keys before the recent ones of the group's largest product, mean over the window. And the
// ingredients of redundancy among all keys: the sum of a key's cosines, and of each key the last other one that is alike
// (by its cosine), which one and how much. All cosines pass through, a block of rows at a time.
static ggml_tensor * rkv_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    const int64_t n = g.n, n_window = g.n_window;
    if (n > 32768) {
        throw std::runtime_error("scorer rkv compares all keys of a head with each other, and there are " + std::to_string(n) +
                "; accepted: at most 32768");
    }

    ggml_tensor * largest = nullptr;
    g.logits([&](ggml_tensor * a, int64_t, int64_t m) {
        ggml_tensor * most = ggml_reshape_2d(ctx, max_dim1(ctx, ggml_reshape_3d(ctx, a, n*n_window, m, 1)), n, n_window);
        largest = largest ? max_of(ctx, largest, most) : most;
    });
    // A query that sees nothing of the history counts 0.
    std::vector<float> history, sees;
    for (int64_t t = 0; t < n_window; t++) {
        const int64_t n_seen = std::min(g.n_before, g.n_visible(t));
        sees.push_back(n_seen > 0 ? 1.0f : 0.0f);
        for (int64_t i = 0; i < n; i++) {
            history.push_back(i < n_seen || n_seen == 0 ? 0.0f : -INFINITY);
        }
    }
    ggml_tensor * weights = ggml_soft_max_ext(ctx, largest, g.constant(n, n_window, std::move(history)), 1.0f, 0.0f);
    weights = ggml_mul(ctx, weights, g.constant(1, n_window, std::move(sees)));
    ggml_tensor * importance = ggml_scale(ctx, sum_dim1(ctx, ggml_reshape_3d(ctx, weights, n, n_window, 1)), 1.0f/(float) n_window);

    ggml_tensor * units = unit_rows(ctx, g.keys(0, n)); // [d, n]
    ggml_tensor * total = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, units)));
    ggml_tensor * sums  = ggml_sum_rows(ctx, ggml_mul(ctx, units, ggml_reshape_2d(ctx, total, units->ne[0], 1))); // [1, n]

    std::vector<float> numbers(n);
    std::iota(numbers.begin(), numbers.end(), 0.0f);
    ggml_tensor * index = g.constant(n, 1, std::move(numbers));
    ggml_tensor * from_one = ggml_scale_bias(ctx, index, 1.0f, 1.0f);
    ggml_tensor * as_rows  = ggml_reshape_2d(ctx, index, 1, n);
    const int64_t step  = std::clamp<int64_t>((4 << 20)/n, (n + 127)/128, n);
    std::vector<float> identity(step*step, 0.0f);
    for (int64_t i = 0; i < step; i++) {
        identity[i*step + i] = 2.0f; // more than any cosine
    }
    ggml_tensor * eye = g.constant(step, step, std::move(identity));

    ggml_tensor * twins = nullptr, * cosines = nullptr;
    for (int64_t first = 0; first < n; first += step) {
        const int64_t m = std::min(step, n - first);
        ggml_tensor * mine = ggml_view_2d(ctx, units, units->ne[0], m, units->nb[1], first*units->nb[1]);
        ggml_tensor * cosine = ggml_mul_mat(ctx, units, mine); // [n, m]
        ggml_prec_set_acc(cosine, GGML_PREC_F32);
        ggml_tensor * self  = ggml_cont(ctx, ggml_view_2d(ctx, eye, m, m, eye->nb[1], 0));
        ggml_tensor * other = ggml_sub(ctx, cosine, ggml_pad_ext(ctx, self, (int) first, (int) (n - first - m), 0, 0, 0, 0, 0, 0));
        ggml_tensor * alike = ggml_step(ctx, ggml_scale_bias(ctx, other, 1.0f, -alike_from));
        ggml_tensor * last  = ggml_argmax(ctx, ggml_mul(ctx, alike, from_one));
        ggml_tensor * twin  = ggml_get_rows(ctx, as_rows, last); // [1, m]
        ggml_tensor * dot   = ggml_sum_rows(ctx, ggml_mul(ctx, ggml_get_rows(ctx, units, last), mine));
        dot     = ggml_mul(ctx, dot, ggml_clamp(ctx, ggml_sum_rows(ctx, alike), 0.0f, 1.0f)); // 0 where none is alike
        twins   = twins   ? ggml_concat(ctx, twins, twin, 1)  : twin;
        cosines = cosines ? ggml_concat(ctx, cosines, dot, 1) : dot;
    }
    const auto column = [&](ggml_tensor * t) { return ggml_reshape_2d(ctx, t, n, 1); };
    return ggml_concat(ctx, ggml_concat(ctx, column(importance), column(sums), 1), ggml_concat(ctx, column(twins), column(cosines), 1), 1);
}

// Importance minus redundancy, weighted, each a softmax over tokens. Of a pair of twins the newer one isn't counted as redundant.
static void rkv_finish(layer_scores & layer) {
    for (auto & h : layer.heads) {
        const size_t n = h.pos.size();
        std::vector<double> redundancy(n);
        for (size_t i = 0; i < n; i++) {
            redundancy[i] += h.numbers[1][i] - 1.0;
            redundancy[(size_t) h.numbers[2][i]] -= h.numbers[3][i];
        }
        double sum = 0.0;
        for (double & r : redundancy) {
            r = std::exp(r/(double) n); // a mean of cosines: no overflow
            sum += r;
        }
        for (size_t i = h.first; i < h.last; i++) {
            h.score[i - h.first] = (float) (importance_weight*h.score[i - h.first] - redundancy_weight*redundancy[i]/sum);
        }
    }
}

extern const scorer rkv {
    .name      = "rkv",
    .paper     = "2505.24133",
    .needs     = need::window,
    .n_numbers = 4,
    .graph     = rkv_graph,
    .pool      = pooling::max,
    .kernel    = 7,
    .finish    = rkv_finish,
};

}
