// Expected Attention (arXiv 2510.00636): what future queries, like those so far but further on, would look at.

#include "engine/policies/blocks.h"
#include "engine/query_stats.h"

#include "llama-context.h"
#include "llama-model.h"

#include <cmath>
#include <stdexcept>

namespace laprox::policies {

static const int32_t n_future = 512;   // positions
static const float   epsilon  = 0.02f; // the authors' default is 0; 0.02 is what LU-KV profiles were published for

// The queries of one group over the next positions, as a Gaussian after the mean rotation.
struct future_queries {
    std::vector<float> mean;       // [n_gqa, d]
    std::vector<float> covariance; // [n_gqa, d, d]
};

// cos and sin of a layer's pairs of dimensions as its rotation applies them, scaling included; [n][d], 1 and 0 where it
// leaves a dimension alone. Every pair starts as (1, 0).
static std::vector<float> compute_rotated_units(workbench & bench, int32_t il, rotation turned, int64_t d, const std::vector<bool> & is_first, const std::vector<int32_t> & pos) {
    std::vector<float> units;
    for (size_t i = 0; i < pos.size(); i++) {
        units.insert(units.end(), is_first.begin(), is_first.end());
    }
    graph_runner graph(bench);
    ggml_tensor * x   = graph.input(GGML_TYPE_F32, d, pos.size(), units.data());
    ggml_tensor * p   = graph.input(GGML_TYPE_I32, pos.size(), 1, pos.data());
    ggml_tensor * out = ggml_cont(graph.ctx, rope_as_model(graph.ctx, bench.lctx.get_model(), bench.lctx.get_cparams(), il, turned, ggml_reshape_3d(graph.ctx, x, d, 1, pos.size()), p));
    graph.output(out);
    graph.run();
    return graph.read({ out }).front();
}

// The same for all heads of a layer.
static const std::vector<float> & rotated_units(workbench & bench, int32_t il, rotation turned, int64_t d, const std::vector<bool> & is_first, const std::vector<int32_t> & pos) {
    if (bench.rotated_layer != il) {
        bench.rotated_units = compute_rotated_units(bench, il, turned, d, is_first, pos);
        bench.rotated_layer = il;
    }
    return bench.rotated_units;
}

static future_queries expect_queries(const head_graph & g) {
    workbench        & bench   = g.bench;
    const sequence   & seq     = g.from.seq;
    const layer_info & layer   = g.from.layer();
    const auto       & hparams = bench.lctx.get_model().hparams;
    if (!seq.sums) {
        throw std::runtime_error("policy expected sums up queries from the start: make the context with it");
    }
    const int64_t n          = seq.sums->n_summed(g.from.ikv);
    const int64_t n_expected = seq.n_seen() - seq.config().sink;
    if (n == 0 || n < n_expected/2) {
        throw std::runtime_error("policy expected knows the queries of " + std::to_string(n) + " of " + std::to_string(n_expected) +
                " tokens only: the sequence was restored from a state without them; accepted: a state saved by this policy");
    }
    const int64_t d = layer.d_k;

    // partners of dimensions that turn together
    const int64_t n_rot = hparams.n_rot(layer.il);
    const bool    neox  = hparams.rope_type != LLAMA_ROPE_TYPE_NORM;
    std::vector<int64_t> partner(d);
    std::vector<bool>    is_first(d, true);
    for (int64_t i = 0; i < d; i++) {
        partner[i] = i;
    }
    for (int64_t pair = 0; pair < n_rot/2; pair++) {
        const int64_t a = neox ? pair : 2*pair;
        const int64_t b = neox ? pair + n_rot/2 : 2*pair + 1;
        partner[a]  = b;
        partner[b]  = a;
        is_first[b] = false;
    }
    std::vector<int32_t> pos = { 0 };
    const llama_pos next = seq.next_position();
    for (int32_t i = 0; i < n_future; i++) {
        pos.push_back(next + i);
    }
    const rotation turned = seq.shared.rotations[g.from.ikv];
    const std::vector<float> & units = rotated_units(bench, (int32_t) layer.il, turned, d, is_first, pos);
    std::vector<double> cosine(d, 1.0), sine(d, 0.0), scale(d, 1.0); // of the mean rotation; and of any rotation's length
    for (int64_t a = 0; a < d; a++) {
        const int64_t b = partner[a];
        if (!is_first[a] || a == b || turned == rotation::none) {
            continue;
        }
        scale[a] = scale[b] = units[a];
        double c = 0.0, s = 0.0;
        for (int32_t i = 1; i <= n_future; i++) {
            c += units[i*d + a];
            s += units[i*d + b];
        }
        cosine[a] = cosine[b] = c/n_future;
        sine[a]   = -s/n_future;
        sine[b]   =  s/n_future;
    }
    const auto turn = [&](const double * x, double * y, int64_t stride) {
        for (int64_t i = 0; i < d; i++) {
            y[i*stride] = cosine[i]*x[i*stride] + (partner[i] == i ? 0.0 : sine[i]*x[partner[i]*stride]);
        }
    };

    const ggml_tensor * all = seq.sums->sums[g.from.ikv];
    const int64_t n_gqa = g.n_gqa;
    std::vector<float> sums(n_gqa*d*(d + 2));
    ggml_backend_tensor_get(all, sums.data(), g.head*n_gqa*all->nb[2], sums.size()*sizeof(float));

    future_queries result;
    std::vector<double> mean(d), ahead(d), cov(d*d), half(d*d);
    for (int64_t h = 0; h < n_gqa; h++) {
        const float * outer = sums.data() + h*d*(d + 2);
        const float * sum   = outer + d*d;
        for (int64_t i = 0; i < d; i++) {
            mean[i] = sum[i]/(scale[i]*scale[i]*n); // turned there and back: its length changed twice
        }
        for (int64_t i = 0; i < d; i++) {
            for (int64_t j = 0; j < d; j++) {
                cov[i*d + j] = outer[i*d + j]/(scale[i]*scale[i]*scale[j]*scale[j]*n) - mean[i]*mean[j];
            }
        }
        turn(mean.data(), ahead.data(), 1);
        for (int64_t i = 0; i < d; i++) {
            turn(cov.data() + i*d, half.data() + i*d, 1); // rows
        }
        for (int64_t j = 0; j < d; j++) {
            turn(half.data() + j, cov.data() + j, d);     // columns
        }
        result.mean.insert(result.mean.end(), ahead.begin(), ahead.end());
        result.covariance.insert(result.covariance.end(), cov.begin(), cov.end());
    }
    return result;
}
// The log of E[exp(q k)] for those queries: [n, n_gqa]
static ggml_tensor * expected_logits(head_graph & g) {
    ggml_context * ctx = g.ctx();
    const int64_t d = g.from.layer().d_k;
    const float   s = g.from.seq.shared.kq_scales[g.from.ikv];
    future_queries future = expect_queries(g);
    ggml_tensor * mean = g.constant(d, g.n_gqa, std::move(future.mean));
    ggml_tensor * cov  = g.constant(d, d*g.n_gqa, std::move(future.covariance));
    return g.in_runs(d*g.n_gqa, [&](int64_t first, int64_t m) {
        ggml_tensor * part   = g.keys(first, m);
        ggml_tensor * linear = ggml_mul_mat(ctx, part, mean); // [m, n_gqa]
        ggml_prec_set_acc(linear, GGML_PREC_F32);
        ggml_tensor * spread = ggml_mul_mat(ctx, cov, part);
        ggml_prec_set_acc(spread, GGML_PREC_F32);
        spread = ggml_mul(ctx, ggml_reshape_3d(ctx, spread, d, g.n_gqa, m), ggml_view_3d(ctx, part, d, 1, m, part->nb[1], part->nb[1], 0));
        spread = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, ggml_sum_rows(ctx, spread), g.n_gqa, m)));
        return ggml_add(ctx, ggml_scale(ctx, linear, s), ggml_scale(ctx, spread, 0.5f*s*s));
    });
}

// -inf for attention sinks, else 0: [n, n_gqa]
static ggml_tensor * after_sinks(head_graph & g) {
    std::vector<float> seen(g.n*g.n_gqa);
    for (int64_t i = 0; i < g.n; i++) {
        for (int64_t h = 0; h < g.n_gqa; h++) {
            seen[h*g.n + i] = g.from.seq.is_sink(g.pos[i]) ? -INFINITY : 0.0f;
        }
    }
    return g.constant(g.n, g.n_gqa, std::move(seen));
}

// Softmax over the keys behind the attention sinks, mean over the group, + epsilon, times ||v_i||_2.
static ggml_tensor * expected_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * a = ggml_soft_max_ext(ctx, expected_logits(g), after_sinks(g), 1.0f, 0.0f); // [n, n_gqa]
    a = sum_heads(ctx, ggml_reshape_3d(ctx, a, g.n, 1, g.n_gqa));
    return ggml_mul(ctx, ggml_scale_bias(ctx, a, 1.0f/(float) g.n_gqa, epsilon), raw_value_norms(g, 2));
}

extern const scorer expected {
    .name  = "expected",
    .paper = "2510.00636",
    .needs = need::all_queries,
    .graph = expected_graph,
};

}
