#include "engine/query_stats.h"
#include "engine/graph_input.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace laprox {

// From a layer's projection to its query there are views, biases and norms, and a rotation where there is one.
rotation rotation_of(const ggml_tensor * q) {
    for (const ggml_tensor * t = q; t; t = t->src[0]) {
        if (t->op == GGML_OP_MUL_MAT && (t->src[0]->flags & GGML_TENSOR_FLAG_INPUT)) {
            return rotation_of(t->src[1]); // llama.cpp's own, of quantised caches
        }
        switch (t->op) {
            case GGML_OP_ROPE:
                return rotation::first;
            case GGML_OP_CONCAT: // of dimensions that are rotated and others
                return rotation::other;
            case GGML_OP_MUL_MAT:
                return rotation::none;
            default:
                break;
        }
    }
    return rotation::none;
}

ggml_tensor * rope_as_model(ggml_context * ctx, const llama_model & model, const llama_cparams & cparams, int32_t il, rotation turned,
        ggml_tensor * cur, ggml_tensor * pos) {
    if (turned == rotation::none) {
        return cur;
    }
    const auto & hparams = model.hparams;
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
            return ggml_new_tensor_3d(ctx, GGML_TYPE_F32, layer.d_k, layer.d_k + 2, layer.n_head);
        }),
        model(check(model)) {
}

void query_stats::clear() {
    sums.clear();
    begin = 0;
}

void query_stats::copy(const query_stats & from) {
    sums.copy(from.sums);
    begin = from.begin;
}

static size_t offset_of_count(const ggml_tensor * t) {
    return (t->ne[1] - 1)*t->nb[1];
}

int64_t query_stats::n_summed(size_t ikv) const {
    float n = 0.0f;
    ggml_backend_tensor_get(sums[ikv], &n, offset_of_count(sums[ikv]), sizeof(n));
    return n > 0.0f && n < 1e9f ? std::llround(n) : 0;
}

void query_stats::cut(int64_t n) {
    std::vector<float> values;
    for (size_t ikv = 0; ikv < sums.size(); ikv++) {
        const int64_t before = n_summed(ikv);
        if (before <= n) {
            continue;
        }
        values.resize(ggml_nelements(sums[ikv]));
        ggml_backend_tensor_get(sums[ikv], values.data(), 0, ggml_nbytes(sums[ikv]));
        for (float & value : values) {
            value *= (float) n/(float) before;
        }
        const size_t per_head = sums[ikv]->ne[0]*sums[ikv]->ne[1];
        for (size_t head = 0; head < (size_t) sums[ikv]->ne[2]; head++) { // exactly
            std::fill_n(values.begin() + head*per_head + per_head - sums[ikv]->ne[0], sums[ikv]->ne[0], (float) n);
        }
        ggml_backend_tensor_set(sums[ikv], values.data(), 0, ggml_nbytes(sums[ikv]));
    }
}

void query_stats::observe(const llm_graph_context & g, graph_input & input, const layer_info & layer, size_t ikv, size_t s, ggml_tensor * q, rotation turned) const {
    if (turned == rotation::other) {
        throw std::runtime_error("laprox: policy expected needs queries of which the first dimensions are rotated; a model of architecture " +
                model.arch_name() + " has others");
    }
    ggml_context * ctx = g.ctx0;
    const int64_t d = layer.d_k, n_head = layer.n_head, n_tokens = q->ne[2];

    ggml_tensor * u = ggml_cont(ctx, q);
    if (ggml_tensor * rotation = input.key_rotation(ctx, d)) { // llama.cpp's own, of quantised caches
        u = ggml_mul_mat(ctx, rotation, ggml_reshape_2d(ctx, u, rotation->ne[0], ggml_nelements(u)/rotation->ne[0]));
        ggml_prec_set_acc(u, GGML_PREC_F32);
        u = ggml_reshape_3d(ctx, u, d, n_head, n_tokens);
    }
    ggml_tensor * back   = ggml_view_1d(ctx, input.back,   n_tokens, s*n_tokens*input.back->nb[0]);
    ggml_tensor * number = ggml_view_1d(ctx, input.number, n_tokens, s*n_tokens*input.number->nb[0]);
    ggml_tensor * before = ggml_view_1d(ctx, sums[ikv], 1, offset_of_count(sums[ikv]));
    before = is_aligned(before) ? before : ggml_cont(ctx, before);
    ggml_tensor * is_new = ggml_step(ctx, ggml_sub(ctx, number, before)); // 1 or 0
    u = ggml_mul(ctx, rope_as_model(ctx, model, g.cparams, (int32_t) layer.il, turned, u, back), ggml_reshape_3d(ctx, is_new, 1, 1, n_tokens));
    u = ggml_cont(ctx, ggml_permute(ctx, u, 1, 2, 0, 3)); // [n_tokens, d, n_head]

    ggml_tensor * outer = ggml_mul_mat(ctx, u, u); // [d, d, n_head]
    ggml_prec_set_acc(outer, GGML_PREC_F32);
    ggml_tensor * sum = ggml_reshape_3d(ctx, ggml_sum_rows(ctx, u), d, 1, n_head);
    ggml_tensor * n   = ggml_repeat_4d(ctx, ggml_sum_rows(ctx, is_new), d, 1, n_head, 1);

    // all at once: an aborted batch leaves each layer with it or without
    ggml_tensor * added = ggml_concat(ctx, ggml_concat(ctx, outer, sum, 1), n, 1);
    ggml_build_forward_expand(g.gf, ggml_cpy(ctx, ggml_add(ctx, sums[ikv], added), sums[ikv]));
}

}
