#include "engine/query_stats.h"
#include "engine/graph.h"
#include "engine/graph_input.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <stdexcept>

namespace laprox {

// As the model rotates its queries: all of `cur` [d, n, n_tokens] at positions `pos` [n_tokens].
static ggml_tensor * rope(ggml_context * ctx, const llama_model & model, const llama_cparams & cparams, int32_t il, ggml_tensor * cur, ggml_tensor * pos) {
    const auto & hparams = model.hparams;
    if (hparams.rope_type == LLAMA_ROPE_TYPE_NONE || !hparams.has_rope(il)) {
        return cur;
    }
    return ggml_rope_ext(ctx, cur, pos, model.get_rope_factors(cparams, il), hparams.n_rot(il), hparams.rope_type, cparams.n_ctx_orig_yarn,
            model.get_rope_freq_base(cparams, il), model.get_rope_freq_scale(cparams, il), cparams.yarn_ext_factor, cparams.yarn_attn_factor,
            cparams.yarn_beta_fast, cparams.yarn_beta_slow);
}

static const llama_model & check(const llama_model & model) {
    if (model.hparams.n_pos_per_embd() > 1) {
        throw std::runtime_error("policy expected needs queries that one position rotates; a model of architecture " + model.arch_name() + " has " +
                std::to_string(model.hparams.n_pos_per_embd()));
    }
    return model;
}

query_stats::query_stats(const llama_model & model, const std::vector<layer_info> & layers) :
        sums(layers, "query_sums", "the statistics of the queries", [](ggml_context * ctx, const layer_info & layer) {
            return ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layer.d_k, layer.d_k + 1, layer.n_head);
        }),
        model(check(model)) {
}

void query_stats::clear() {
    sums.clear();
    n_summed = 0;
}

void query_stats::copy(const query_stats & from) {
    sums.copy(from.sums);
    n_summed = from.n_summed;
}

void query_stats::observe(const llm_graph_context & g, graph_input & input, const layer_info & layer, size_t ikv, size_t s, ggml_tensor * q) const {
    ggml_context * ctx = g.ctx0;
    const int64_t d = layer.d_k, n_head = layer.n_head, n_tokens = q->ne[2];

    ggml_tensor * u = ggml_cont(ctx, q);
    if (ggml_tensor * rotation = input.key_rotation(ctx, d)) { // llama.cpp's own, of quantised caches
        u = ggml_mul_mat(ctx, rotation, ggml_reshape_2d(ctx, u, rotation->ne[0], ggml_nelements(u)/rotation->ne[0]));
        ggml_prec_set_acc(u, GGML_PREC_F32);
        u = ggml_reshape_3d(ctx, u, d, n_head, n_tokens);
    }
    ggml_tensor * back   = ggml_view_1d(ctx, input.back,   n_tokens, s*n_tokens*input.back->nb[0]);
    ggml_tensor * weight = ggml_view_3d(ctx, input.weight, 1, 1, n_tokens, input.weight->nb[0], input.weight->nb[0], s*n_tokens*input.weight->nb[0]);
    u = ggml_mul(ctx, rope(ctx, model, g.cparams, (int32_t) layer.il, u, back), weight);
    u = ggml_cont(ctx, ggml_permute(ctx, u, 1, 2, 0, 3)); // [n_tokens, d, n_head]

    ggml_tensor * outer = ggml_mul_mat(ctx, u, u); // [d, d, n_head]
    ggml_prec_set_acc(outer, GGML_PREC_F32);
    ggml_tensor * sum = ggml_reshape_3d(ctx, ggml_sum_rows(ctx, u), d, 1, n_head);

    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, ggml_add(ctx, sums[ikv], ggml_concat(ctx, outer, sum, 1)), sums[ikv]));
}

// cos and sin of a layer's pairs of dimensions as its rotation applies them, scaling included; [n][d], 1 and 0 where it
// leaves a dimension alone. Every pair starts as (1, 0).
static std::vector<float> compute_rotated_units(workbench & bench, int32_t il, int64_t d, const std::vector<bool> & is_first, const std::vector<int32_t> & pos) {
    std::vector<float> units;
    for (size_t i = 0; i < pos.size(); i++) {
        units.insert(units.end(), is_first.begin(), is_first.end());
    }
    graph_runner graph(bench);
    ggml_tensor * x   = graph.input(GGML_TYPE_F32, d, pos.size(), units.data());
    ggml_tensor * p   = graph.input(GGML_TYPE_I32, pos.size(), 1, pos.data());
    ggml_tensor * out = ggml_cont(graph.ctx, rope(graph.ctx, bench.lctx.get_model(), bench.lctx.get_cparams(), il, ggml_reshape_3d(graph.ctx, x, d, 1, pos.size()), p));
    graph.output(out);
    graph.run();
    ggml_backend_tensor_get(out, units.data(), 0, ggml_nbytes(out));
    return units;
}

// The same for all heads of a layer.
static const std::vector<float> & rotated_units(workbench & bench, int32_t il, int64_t d, const std::vector<bool> & is_first, const std::vector<int32_t> & pos) {
    if (bench.rotated_layer != il) {
        bench.rotated_units = compute_rotated_units(bench, il, d, is_first, pos);
        bench.rotated_layer = il;
    }
    return bench.rotated_units;
}

future_queries expect_queries(workbench & bench, const sequence & seq, size_t ikv, uint32_t head, int32_t n_future) {
    const layer_info & layer   = seq.shared.layers[ikv];
    const auto       & hparams = bench.lctx.get_model().hparams;
    if (!seq.sums) {
        throw std::runtime_error("policy expected sums up queries from the start: make the context with it");
    }
    const int64_t n          = seq.sums->n_summed;
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
    const std::vector<float> & units = rotated_units(bench, (int32_t) layer.il, d, is_first, pos);
    std::vector<double> cosine(d, 1.0), sine(d, 0.0), scale(d, 1.0); // of the mean rotation; and of any rotation's length
    for (int64_t a = 0; a < d; a++) {
        const int64_t b = partner[a];
        if (!is_first[a] || a == b || !hparams.has_rope(layer.il)) {
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

    const ggml_tensor * all = seq.sums->sums[ikv];
    const int64_t n_gqa = layer.n_gqa();
    std::vector<float> sums(n_gqa*d*(d + 1));
    ggml_backend_tensor_get(all, sums.data(), head*n_gqa*all->nb[2], sums.size()*sizeof(float));

    future_queries result;
    std::vector<double> mean(d), turned(d), cov(d*d), half(d*d);
    for (int64_t h = 0; h < n_gqa; h++) {
        const float * outer = sums.data() + h*d*(d + 1);
        const float * sum   = outer + d*d;
        for (int64_t i = 0; i < d; i++) {
            mean[i] = sum[i]/(scale[i]*scale[i]*n); // turned there and back: its length changed twice
        }
        for (int64_t i = 0; i < d; i++) {
            for (int64_t j = 0; j < d; j++) {
                cov[i*d + j] = outer[i*d + j]/(scale[i]*scale[i]*scale[j]*scale[j]*n) - mean[i]*mean[j];
            }
        }
        turn(mean.data(), turned.data(), 1);
        for (int64_t i = 0; i < d; i++) {
            turn(cov.data() + i*d, half.data() + i*d, 1); // rows
        }
        for (int64_t j = 0; j < d; j++) {
            turn(half.data() + j, cov.data() + j, d);     // columns
        }
        result.mean.insert(result.mean.end(), turned.begin(), turned.end());
        result.covariance.insert(result.covariance.end(), cov.begin(), cov.end());
    }
    return result;
}

}
