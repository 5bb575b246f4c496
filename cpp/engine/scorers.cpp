// Every scorer: its graph, what the host makes of it, and its row in the table at the end.

#include "engine/scorer.h"
#include "engine/score_graph.h"
#include "core/scores.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>
#include <stdexcept>

namespace laprox {

static ggml_tensor * plus(ggml_context * ctx, ggml_tensor * total, ggml_tensor * t) {
    return total ? ggml_add(ctx, total, t) : t;
}

// [n, 1, m] -> [n]: the sum over query heads
static ggml_tensor * sum_heads(ggml_context * ctx, ggml_tensor * t) {
    return ggml_reshape_1d(ctx, sum_dim1(ctx, ggml_reshape_3d(ctx, t, t->ne[0], t->ne[2], 1)), t->ne[0]);
}

static ggml_tensor * max_heads(ggml_context * ctx, ggml_tensor * t) {
    return ggml_reshape_1d(ctx, max_dim1(ctx, ggml_reshape_3d(ctx, t, t->ne[0], t->ne[2], 1)), t->ne[0]);
}

// Columns of `norms` [n, n_gqa] as [n, 1, m]
static ggml_tensor * of_heads(ggml_context * ctx, ggml_tensor * norms, int64_t first, int64_t m) {
    return ggml_view_3d(ctx, norms, norms->ne[0], 1, m, norms->nb[1], norms->nb[1], first*norms->nb[1]);
}

// ||v_i||_p before the projection: [n]
static ggml_tensor * raw_value_norms(head_graph & g, int p) {
    ggml_context * ctx = g.ctx();
    return g.in_runs(64, [&](int64_t first, int64_t m) {
        ggml_tensor * v    = g.values(first, m);
        ggml_tensor * norm = p == 1 ? ggml_sum_rows(ctx, ggml_abs(ctx, v)) : ggml_sqrt(ctx, ggml_sum_rows(ctx, ggml_sqr(ctx, v)));
        return ggml_reshape_1d(ctx, norm, m);
    });
}

static std::vector<float> pooled(const layer_scores::head & h, const std::vector<float> & number, pooling pool, int kernel) {
    const float * begin = number.data() + h.first;
    const size_t  n     = h.last - h.first;
    return pool == pooling::max     ? max_pool(begin, n, kernel)
         : pool == pooling::average ? average_pool(begin, n, kernel)
         :                            std::vector<float>(begin, begin + n);
}

//
// LaProx
//

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

// LU-KV's oracle: max over the observed queries and the group of A[t,i] * ||v_i W_h||_2. With the queries of decode steps
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

//
// attention of the window: SnapKV and its descendants
//

// Mean over the window and the group of the attention weights: [n]. Official SnapKV pools with a maximum over 7 in its
// LongBench settings and with a mean over 5 by default; we take the former, as Ada-KV, PyramidKV and LU-KV do.
static ggml_tensor * mean_attention(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * total = nullptr;
    g.attention([&](ggml_tensor * a, int64_t, int64_t) {
        total = plus(ctx, total, sum_heads(ctx, sum_dim1(ctx, a)));
    });
    return ggml_scale(ctx, total, 1.0f/(float) (g.n_window*g.n_gqa));
}

// The last query's attention, mean over the group; the layer's heads share one score.
static ggml_tensor * tova_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * total = nullptr;
    g.last_attention([&](ggml_tensor * a, int64_t, int64_t) {
        total = plus(ctx, total, sum_heads(ctx, a));
    });
    return ggml_scale(ctx, total, 1.0f/(float) g.n_gqa);
}

// A number's sum over the heads of a layer that hold a token, by position. Positions may lie far apart: memory follows the
// number of tokens, not the last position.
class sums_by_position {
public:
    sums_by_position(const layer_scores & layer, const std::function<double (const layer_scores::head &, size_t)> & number) {
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

    double at(llama_pos pos) const {
        return sums[std::lower_bound(positions.begin(), positions.end(), pos) - positions.begin()];
    }

private:
    std::vector<llama_pos> positions; // ascending
    std::vector<double>    sums;
};

// Mean over the heads that still hold the token.
static void tova_finish(layer_scores & layer) {
    const sums_by_position sums(layer, [](const layer_scores::head & h, size_t i) { return h.numbers[0][i]; });
    const sums_by_position holders(layer, [](const layer_scores::head &, size_t) { return 1.0; });
    for (auto & h : layer.heads) {
        for (size_t i = h.first; i < h.last; i++) {
            h.score.push_back((float) (sums.at(h.pos[i])/holders.at(h.pos[i])));
        }
    }
}

// SnapKV's attention, and the mean over the group of ||v_i W_h||_1.
static ggml_tensor * criticalkv_graph(head_graph & g) {
    return ggml_concat(g.ctx(), mean_attention(g), g.projected_l1(), 1);
}

// Half of a head's budget goes to the highest SnapKV scores, the rest to the highest (score + 1e-4) * L1 norm.
static void criticalkv_finish(layer_scores & layer) {
    for (auto & h : layer.heads) {
        h.score = pooled(h, h.numbers[0], pooling::max, 7);
        for (size_t i = 0; i < h.score.size(); i++) {
            h.second.push_back((h.score[i] + 1e-4f)*h.numbers[1][h.first + i]);
        }
    }
}

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

// Score: mean + 200 variance, averaged over 5 tokens. A layer's preference: its entropy times its variance, over all keys
// before the recent ones; the paper's exponents 1/tau were tuned per model, the authors' fallback is 1.
static void cake_finish(layer_scores & layer) {
    double entropy = 0.0, variance = 0.0;
    for (auto & h : layer.heads) {
        std::vector<float> score(h.pos.size());
        for (size_t i = 0; i < score.size(); i++) {
            score[i] = h.numbers[0][i] + 200.0f*h.numbers[1][i];
        }
        for (size_t i = 0; i < h.last; i++) {
            entropy  += h.numbers[2][i];
            variance += (double) h.numbers[1][i]*layer.n_gqa;
        }
        h.score = pooled(h, score, pooling::average, 5);
    }
    layer.preference = std::max(entropy, 0.0)*variance;
}

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

// Times the head's largest value: how much the output could move.
static void lava_finish(layer_scores & layer) {
    for (auto & h : layer.heads) {
        const float largest = h.pos.empty() ? 0.0f : *std::max_element(h.numbers[1].begin(), h.numbers[1].end());
        h.score = pooled(h, h.numbers[0], pooling::max, 7);
        for (float & score : h.score) {
            score *= largest;
        }
    }
}

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
// with which 90% of a head's mean attention is secured, the recent tokens' share included, come before all others.
static void defensivekv_finish(layer_scores & layer) {
    const sums_by_position values(layer, [](const layer_scores::head & h, size_t i) { return h.numbers[2][i]; });
    for (auto & h : layer.heads) {
        const auto & worst = h.numbers[0];
        const auto & mean  = h.numbers[1];
        const float  floor = h.last > 0 ? (float) (std::accumulate(worst.begin(), worst.begin() + h.last, 0.0)/h.last) : 0.0f;
        for (size_t i = h.first; i < h.last; i++) {
            h.score.push_back(std::max(worst[i], floor)*(float) (h.numbers[2][i]/std::max(values.at(h.pos[i]), 1e-30)));
        }

        std::vector<size_t> order(h.last);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return mean[a] > mean[b]; });
        const double all = std::accumulate(mean.begin(), mean.begin() + h.last, 0.0);
        double mass = 0.0;
        for (size_t rank = 0; rank < order.size() && mass < all - 0.1; rank++) {
            mass += mean[order[rank]];
            if (order[rank] >= h.first) {
                // all other scores are at most 1: shares of weights
                h.score[order[rank] - h.first] = 2.0f - (float) std::min<size_t>(rank, (1 << 20) - 1)/(float) (1 << 20);
            }
        }
    }
}

// Importance: softmax over the keys before the recent ones of the group's largest product, mean over the window. And the
// ingredients of redundancy among all keys: the sum of a key's cosines, and of each key the last other one that is alike
// (cosine > 0.5), which one and how much. All cosines pass through, a block of rows at a time.
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
        ggml_tensor * alike = ggml_step(ctx, ggml_scale_bias(ctx, other, 1.0f, -0.5f));
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

// 0.1 importance - 0.9 redundancy, each a softmax over tokens. Of a pair of twins the newer one isn't counted as redundant.
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
        h.score = pooled(h, h.numbers[0], pooling::max, 7);
        for (size_t i = h.first; i < h.last; i++) {
            h.score[i - h.first] = (float) (0.1*h.score[i - h.first] - 0.9*redundancy[i]/sum);
        }
    }
}

//
// keys alone
//

// A small key attracts attention.
static ggml_tensor * knorm_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    return g.in_runs(64, [&](int64_t first, int64_t m) {
        ggml_tensor * squares = ggml_sum_rows(ctx, ggml_sqr(ctx, g.keys(first, m)));
        return ggml_reshape_1d(ctx, ggml_scale(ctx, ggml_sqrt(ctx, squares), -1.0f), m);
    });
}

// -cos(k_i, mean of k/||k||): a key unlike the others carries what they don't.
static ggml_tensor * keydiff_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * anchor = nullptr;
    const auto unit = [&](int64_t first, int64_t m) { return unit_rows(ctx, g.keys(first, m)); };
    g.in_runs(256, [&](int64_t first, int64_t m) {
        ggml_tensor * sum = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, unit(first, m)))); // [1, d]
        anchor = plus(ctx, anchor, sum);
        return sum;
    });
    anchor = unit_rows(ctx, ggml_reshape_2d(ctx, anchor, anchor->ne[1], 1));
    return g.in_runs(256, [&](int64_t first, int64_t m) {
        ggml_tensor * cosine = ggml_sum_rows(ctx, ggml_mul(ctx, unit(first, m), anchor));
        return ggml_reshape_1d(ctx, ggml_scale(ctx, cosine, -1.0f), m);
    });
}

// Softmax over the keys behind the attention sinks of the log of E[exp(q k)], where q is Gaussian with the mean and covariance
// that the sequence's queries had, turned by the mean rotation of the next 512 positions; mean over the group, + 0.02, times
// ||v_i||_2. The authors' default of that epsilon is 0; 0.02 is what LU-KV profiles were published for.
static ggml_tensor * expected_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * a = ggml_soft_max_ext(ctx, g.expected_logits(512), g.after_sinks(), 1.0f, 0.0f); // [n, n_gqa]
    a = sum_heads(ctx, ggml_reshape_3d(ctx, a, g.n, 1, g.n_gqa));
    return ggml_mul(ctx, ggml_scale_bias(ctx, a, 1.0f/(float) g.n_gqa, 0.02f), raw_value_norms(g, 2));
}

//
// retention gates (gates.h)
//

static ggml_tensor * retention_graph(head_graph & g) {
    return g.gate_logits();
}

// log(beta^age) with beta = sigmoid(z). An age is at least 1. 1 - beta may be as small as 1e-8: no sigmoid in float32 here.
static float retention_at_age(float z, int64_t age) {
    const double log_beta = z > 0 ? -std::log1p(std::exp(-(double) z)) : (double) z - std::log1p(std::exp((double) z));
    return (float) ((double) age*log_beta);
}

//
// places alone
//

// Later is better: attention sinks plus recent tokens. Original positions are kept.
static float streaming_place(int32_t, int32_t, llama_pos pos) {
    return (float) pos;
}

// A fixed draw per entry (SplitMix64), so that a run can be repeated.
static float random_place(int32_t layer, int32_t head, llama_pos pos) {
    uint64_t x = ((uint64_t) layer << 48) ^ ((uint64_t) head << 32) ^ (uint64_t) (uint32_t) pos;
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30))*0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27))*0x94d049bb133111ebull;
    x ^= x >> 31;
    return (float) (x >> 40)/(float) (1 << 24);
}

//
// the table
//

// name, numbers: count, from a graph, from the place; pooling; what the host does; needs queries, all of them, has layer preferences; gates
static const scorer scorers[] = {
    { "laprox",      1, laprox_graph,      nullptr,         pooling::average, 7, nullptr,            true,  false, false, nullptr },
    { "snapkv",      1, mean_attention,    nullptr,         pooling::max,     7, nullptr,            true,  false, false, nullptr },
    { "criticalkv",  2, criticalkv_graph,  nullptr,         pooling::none,    1, criticalkv_finish,  true,  false, false, nullptr },
    { "defensivekv", 3, defensivekv_graph, nullptr,         pooling::none,    1, defensivekv_finish, true,  false, false, nullptr },
    { "cake",        3, cake_graph,        nullptr,         pooling::none,    1, cake_finish,        true,  false, true,  nullptr },
    { "lava",        2, lava_graph,        nullptr,         pooling::none,    1, lava_finish,        true,  false, false, nullptr },
    { "rkv",         4, rkv_graph,         nullptr,         pooling::none,    1, rkv_finish,         true,  false, false, nullptr },
    { "tova",        1, tova_graph,        nullptr,         pooling::none,    1, tova_finish,        true,  false, false, nullptr },
    { "keydiff",     1, keydiff_graph,     nullptr,         pooling::none,    1, nullptr,            false, false, false, nullptr },
    { "knorm",       1, knorm_graph,       nullptr,         pooling::none,    1, nullptr,            false, false, false, nullptr },
    { "expected",    1, expected_graph,    nullptr,         pooling::none,    1, nullptr,            false, true,  false, nullptr },
    { "retention",   1, retention_graph,   nullptr,         pooling::none,    1, nullptr,            false, false, false, retention_at_age },
    { "streaming",   1, nullptr,           streaming_place, pooling::none,    1, nullptr,            false, false, false, nullptr },
    { "random",      1, nullptr,           random_place,    pooling::none,    1, nullptr,            false, false, false, nullptr },
    { "custom",      1, nullptr,           nullptr,         pooling::none,    1, nullptr,            false, false, false, nullptr }, // laprox_set_scorer()
    { "oracle",      1, oracle_graph,      nullptr,         pooling::none,    1, nullptr,            true,  false, false, nullptr }, // `laprox profile`
    { "vnorm",       1, vnorm_graph,       nullptr,         pooling::none,    1, nullptr,            false, false, false, nullptr },
};

void finish(const scorer & how, layer_scores & layer) {
    if (how.finish) {
        how.finish(layer);
        return;
    }
    for (auto & h : layer.heads) {
        h.score = pooled(h, h.numbers[0], how.pool, how.kernel);
    }
}

int32_t n_scorers() {
    return (int32_t) std::size(scorers);
}

const scorer & scorer_at(int32_t i) {
    return scorers[i];
}

const scorer & find_scorer(const std::string & name) {
    std::string names;
    for (const scorer & s : scorers) {
        if (name == s.name) {
            return s;
        }
        names += (names.empty() ? "" : ", ") + std::string(s.name);
    }
    throw std::invalid_argument("scorer \"" + name + "\" is unknown; accepted: " + names);
}

}
