#include "engine/scorer.h"
#include "engine/gram.h"
#include "engine/graph.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace laprox {

// What one tensor of a score graph may take; a graph holds about two at a time.
static const int64_t scratch_bytes = 24ll << 20;

// Attention weights are scaled by this before they are squared; the sum of up to 1024 such squares is still finite.
static const float weight_scale = 1e16f;

// [n, m, r] -> [n, 1, r] by adding halves: coalesced on a GPU, and deterministic.
static ggml_tensor * sum_dim1(ggml_context * ctx, ggml_tensor * t) {
    const auto part = [&](ggml_tensor * a, int64_t first, int64_t n) {
        return ggml_view_3d(ctx, a, a->ne[0], n, a->ne[2], a->nb[1], a->nb[2], first*a->nb[1]);
    };
    while (t->ne[1] > 1) {
        const int64_t half = t->ne[1]/2;
        ggml_tensor * sum = ggml_add(ctx, part(t, 0, half), part(t, half, half));
        t = t->ne[1] % 2 ? ggml_concat(ctx, sum, part(t, 2*half, 1), 1) : sum;
    }
    return t;
}

static ggml_tensor * as_f32(ggml_context * ctx, ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 ? t : ggml_cast(ctx, t, GGML_TYPE_F32);
}

// ||v W_h|| for the query heads of a group: [n, n_gqa]. v: [d_v, n] rows of the cache, gram: [d_v, d_v*n_gqa]
static ggml_tensor * value_norms(ggml_context * ctx, ggml_tensor * v, ggml_tensor * gram) {
    const int64_t d     = v->ne[0];
    const int64_t n     = v->ne[1];
    const int64_t n_gqa = gram->ne[1]/d;
    const int64_t step  = std::clamp<int64_t>(scratch_bytes/(d*n_gqa*(int64_t) sizeof(float)), 1, n);

    ggml_tensor * norms = nullptr;
    for (int64_t first = 0; first < n; first += step) {
        const int64_t m = std::min(step, n - first);
        ggml_tensor * part = as_f32(ctx, ggml_view_2d(ctx, v, d, m, v->nb[1], first*v->nb[1]));
        ggml_tensor * gv   = ggml_mul_mat(ctx, gram, part);
        ggml_prec_set_acc(gv, GGML_PREC_F32);
        gv = ggml_mul(ctx, ggml_reshape_3d(ctx, gv, d, n_gqa, m), ggml_view_3d(ctx, part, d, 1, m, part->nb[1], part->nb[1], 0));
        ggml_tensor * squares = ggml_clamp(ctx, ggml_sum_rows(ctx, gv), 0.0f, INFINITY); // rounding can make them negative
        ggml_tensor * out     = ggml_cont(ctx, ggml_transpose(ctx, ggml_reshape_2d(ctx, ggml_sqrt(ctx, squares), n_gqa, m)));
        norms = norms ? ggml_concat(ctx, norms, out, 0) : out;
    }
    return norms;
}

// LaProx, Algorithm 1, for one KV head: mean over the group of ||A[:,i]||_2 * ||v_i W_h||_2. Result: [n]
// k: [d_k, n], v: [d_v, n]: rows of the cache; q: [d_k*n_gqa, n_window]; mask: [n, n_window]
static ggml_tensor * laprox_scores(ggml_context * ctx, const llama_hparams & hparams, float kq_scale,
        ggml_tensor * k, ggml_tensor * v, ggml_tensor * q, ggml_tensor * mask, ggml_tensor * gram) {
    const int64_t d        = k->ne[0];
    const int64_t n        = k->ne[1];
    const int64_t n_window = q->ne[1];
    const int64_t n_gqa    = q->ne[0]/d;
    const int64_t n_part   = std::clamp<int64_t>(scratch_bytes/(n*n_window*(int64_t) sizeof(float)), 1, n_gqa);

    ggml_tensor * norms = value_norms(ctx, v, gram);

    // products of quantised keys would quantise the queries too
    ggml_tensor * keys = ggml_is_quantized(k->type) || k->type == GGML_TYPE_BF16 ? as_f32(ctx, k) : k;

    ggml_tensor * total = nullptr;
    for (int64_t first = 0; first < n_gqa; first += n_part) {
        const int64_t m = std::min(n_part, n_gqa - first);
        ggml_tensor * part = ggml_view_3d(ctx, q, d, m, n_window, d*q->nb[0], q->nb[1], first*d*q->nb[0]);
        part = ggml_cont(ctx, ggml_permute(ctx, part, 0, 2, 1, 3)); // [d, n_window, m]

        ggml_tensor * a = ggml_mul_mat(ctx, keys, ggml_reshape_2d(ctx, part, d, n_window*m));
        ggml_prec_set_acc(a, GGML_PREC_F32);
        a = ggml_reshape_3d(ctx, a, n, n_window, m);
        float scale = kq_scale;
        if (hparams.attn_soft_cap) {
            const float cap = hparams.f_attn_logit_softcapping;
            a = ggml_scale(ctx, ggml_tanh(ctx, ggml_scale(ctx, a, scale/cap)), cap);
            scale = 1.0f;
        }
        a = ggml_soft_max_ext(ctx, a, mask, scale, 0.0f);
        // squares of small weights would underflow, and entries that differ would tie at 0
        a = ggml_sqr(ctx, ggml_scale(ctx, a, weight_scale));
        ggml_tensor * energy = ggml_sqrt(ctx, sum_dim1(ctx, a)); // [n, 1, m]
        ggml_tensor * norm   = ggml_view_3d(ctx, norms, n, 1, m, norms->nb[1], norms->nb[1], first*norms->nb[1]);
        ggml_tensor * sum    = sum_dim1(ctx, ggml_reshape_3d(ctx, ggml_mul(ctx, energy, norm), n, m, 1));
        total = total ? ggml_add(ctx, total, sum) : sum;
    }
    return ggml_scale(ctx, total, 1.0f/(weight_scale*(float) n_gqa));
}

class scorer {
public:
    scorer(cache & kv, uint32_t strm) : kv(kv), strm(strm), st(kv.streams[strm]),
            n_tail(kv.used_tail(strm)) {
        for (uint32_t slot : kv.window_slots(strm)) {
            slots.push_back((int32_t) slot);
            queries.push_back(st.window_pos[slot]);
        }
    }

    score_table positions() const {
        return table([&](size_t ikv, uint32_t head) {
            const std::vector<llama_pos> pos = positions_of(ikv, head);
            return std::vector<float>(pos.begin(), pos.end());
        });
    }

    score_table laprox(llama_context & lctx) const {
        if (slots.empty()) {
            throw std::runtime_error("no queries have been observed since the sequence was restored or cut; evaluate a token first");
        }
        workbench bench(lctx);
        // nothing kept: all heads hold the same tokens
        const std::vector<ggml_fp16_t> shared_mask = causal_mask(tail_positions());
        return table([&](size_t ikv, uint32_t head) {
            const layer_info  & layer = kv.layers[ikv];
            const layer_store & store = *st.layers[ikv];
            const int64_t n = store.n_kept[head] + n_tail;
            if (n == 0) {
                return std::vector<float>();
            }
            const size_t  group = (size_t) layer.n_gqa()*layer.d_v*layer.d_v;
            const float * gram  = output_grams(bench, layer.il).data() + head*group;
            std::vector<float> rotated;
            if (kv.rotated_v) {
                for (uint32_t i = 0; i < layer.n_gqa(); i++) {
                    const auto one = rotated_gram(gram + i*layer.d_v*layer.d_v, layer.d_v);
                    rotated.insert(rotated.end(), one.begin(), one.end());
                }
                gram = rotated.data();
            }
            std::vector<ggml_fp16_t> own_mask;
            if (store.n_kept[head] > 0) {
                own_mask = causal_mask(positions_of(ikv, head));
            }

            graph_runner graph(bench);
            ggml_tensor * ring = kv.windows[ikv];
            const int64_t d_q  = (int64_t) layer.n_gqa()*layer.d_k;
            ggml_tensor * mine = ggml_view_2d(graph.ctx, ring, d_q, ring->ne[1], ring->nb[1], strm*ring->nb[2] + head*d_q*ring->nb[0]);
            ggml_tensor * q    = ggml_get_rows(graph.ctx, mine, graph.input(GGML_TYPE_I32, slots.size(), 1, slots.data()));
            const auto rows = [&](ggml_tensor * pool) {
                return ggml_view_2d(graph.ctx, pool, pool->ne[0], n, pool->nb[1], store.held_row(head)*pool->nb[1]);
            };
            ggml_tensor * mask = graph.input(GGML_TYPE_F16, n, slots.size(), own_mask.empty() ? shared_mask.data() : own_mask.data());
            ggml_tensor * g    = graph.input(GGML_TYPE_F32, layer.d_v, layer.n_gqa()*layer.d_v, gram);
            ggml_tensor * out  = laprox_scores(graph.ctx, kv.hparams, kv.kq_scales[ikv], rows(store.k), rows(store.v), q, mask, g);
            graph.output(out);
            graph.run();

            std::vector<float> scores(n);
            ggml_backend_tensor_get(out, scores.data(), 0, n*sizeof(float));
            return scores;
        });
    }

private:
    template <typename F> score_table table(F score_head) const {
        score_table result(kv.layers.size());
        for (size_t ikv = 0; ikv < kv.layers.size(); ikv++) {
            for (uint32_t head = 0; head < kv.layers[ikv].n_head_kv; head++) {
                result[ikv].push_back(score_head(ikv, head));
            }
        }
        return result;
    }

    // by tail cell; -1: empty
    std::vector<llama_pos> tail_positions() const {
        std::vector<llama_pos> pos(n_tail, -1);
        for (uint32_t cell = 0; cell < n_tail; cell++) {
            if (!kv.cells[strm].is_empty(cell)) {
                pos[cell] = kv.cells[strm].pos_get(cell);
            }
        }
        return pos;
    }

    std::vector<llama_pos> positions_of(size_t ikv, uint32_t head) const {
        std::vector<llama_pos> pos = st.kept[ikv][head];
        const std::vector<llama_pos> tail = tail_positions();
        pos.insert(pos.end(), tail.begin(), tail.end());
        return pos;
    }

    // F16 [pos.size(), n_window]
    std::vector<ggml_fp16_t> causal_mask(const std::vector<llama_pos> & pos) const {
        const ggml_fp16_t seen   = ggml_fp32_to_fp16(0.0f);
        const ggml_fp16_t unseen = ggml_fp32_to_fp16(-INFINITY);
        std::vector<ggml_fp16_t> mask;
        mask.reserve(pos.size()*queries.size());
        for (llama_pos query : queries) {
            for (llama_pos key : pos) {
                mask.push_back(key >= 0 && key <= query ? seen : unseen);
            }
        }
        return mask;
    }

    cache & kv;
    const uint32_t strm;
    const stream & st;
    const uint32_t n_tail;
    std::vector<int32_t>   slots;   // of the observed queries, oldest first
    std::vector<llama_pos> queries; // and their positions
};

score_table score_stream(llama_context & lctx, cache & kv, uint32_t strm, scorer_type type) {
    const scorer s(kv, strm);
    switch (type) {
        case scorer_type::none:
        case scorer_type::position: return s.positions();
        case scorer_type::laprox:   return s.laprox(lctx);
    }
    GGML_ABORT("unknown scorer");
}

}
