// Attention over a compressed cache, from stock ggml operations.

#include "engine/cache.h"
#include "engine/gates.h"
#include "engine/graph_input.h"

#include "llama-graph.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

namespace laprox {

// The rows that a ubatch is written to differ by layer once heads hold different numbers of entries. One input
// holds them all: for each layer a run of n_tokens*n_head_kv row indices, token-major.
ggml_tensor * cache::build_input_rows(ggml_context * ctx, const llama_ubatch & ubatch, const char * name) const {
    ggml_tensor * rows = ggml_new_tensor_2d(ctx, GGML_TYPE_I64, ubatch.n_tokens, all.n_pairs);
    ggml_set_input(rows);
    ggml_set_name(rows, name);
    return rows;
}

void cache::set_input_rows(ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const {
    std::vector<int64_t> rows;
    rows.reserve(ggml_nelements(dst));
    for (size_t ikv = 0; ikv < all.layers.size(); ikv++) {
        for (size_t s = 0; s < sinfo.n_stream(); s++) {
            const layer_store & store = sequences[sinfo.strm[s]].store(ikv);
            for (uint32_t cell : sinfo.idxs[s]) {
                for (uint32_t head = 0; head < all.layers[ikv].n_head_kv; head++) {
                    rows.push_back((int64_t) store.tail_row(head) + cell);
                }
            }
        }
    }
    GGML_ASSERT((int64_t) rows.size() == ggml_nelements(dst));
    ggml_backend_tensor_set(dst, rows.data(), 0, ggml_nbytes(dst));
}

// As rows of ne0 elements, copied only if they aren't adjacent.
static ggml_tensor * flatten(ggml_context * ctx, ggml_tensor * t, int64_t ne0) {
    return ggml_reshape_2d(ctx, ggml_is_contiguous(t) ? t : ggml_cont(ctx, t), ne0, ggml_nelements(t)/ne0);
}

static ggml_tensor * tokens_of(ggml_context * ctx, ggml_tensor * t, int64_t first, int64_t n) {
    return ggml_view_3d(ctx, t, t->ne[0], t->ne[1], n, t->nb[1], t->nb[2], first*t->nb[2]);
}

// n_kv rows for each head of a class, one stride apart: [ne0, n_kv, n_heads], or [ne0, n_kv, 1, n_heads] as streams. The views
// of neighbours overlap where n_kv is padded; ggml's check of bounds takes what it makes for contiguous, so it makes one row.
static ggml_tensor * rows_of_heads(ggml_context * ctx, ggml_tensor * t, int64_t n_kv, int64_t n_heads, size_t stride, size_t row, bool streams) {
    GGML_ASSERT(row + (n_heads - 1)*stride + n_kv <= (size_t) t->ne[1]);
    ggml_tensor * rows = ggml_view_4d(ctx, t, t->ne[0], 1, streams ? 1 : n_heads, streams ? n_heads : 1,
            t->nb[1], t->nb[1]*(streams ? n_kv : stride), t->nb[1]*stride*(streams ? 1 : n_heads), t->nb[1]*row);
    rows->ne[1] = n_kv;
    return rows;
}

// One attention call for a class of heads; q: [d, n_tokens, n_gqa*n_heads], result: [d_v, n_gqa, n_heads, n_tokens].
// Where all heads share a mask it is llama.cpp's own form. Where each has its own, the heads become the streams of the
// operation, and the mask has a slice for each: CUDA looks through the masks of streams without checking their number.
static ggml_tensor * attend(const llm_graph_context & g, const layer_info & layer, const layer_store & store,
        const store_class & cls, ggml_tensor * q, ggml_tensor * mask, int64_t n_tail, float kq_scale, int il) {
    ggml_context * ctx = g.ctx0;
    const int64_t n_heads  = cls.plan.heads.size();
    const int64_t n_gqa    = layer.n_gqa();
    const int64_t n_tokens = q->ne[1];
    const int64_t n_kv     = cls.n_view + n_tail;
    const size_t  row      = cls.row0 + cls.plan.n_rows - cls.n_view;
    const bool    streams  = mask->ne[3] > 1;
    GGML_ASSERT(is_aligned(q) && row % start_block(layer) == 0);

    const auto view = [&](ggml_tensor * t) {
        ggml_tensor * rows = rows_of_heads(ctx, t, n_kv, n_heads, cls.stride, row, streams);
        // as llama.cpp does, except where the CPU attends in F32 without a copy
        const bool cast = t->type == GGML_TYPE_F32 && !ggml_backend_buft_is_host(layer.buft);
        return cast ? ggml_cast(ctx, rows, GGML_TYPE_F16) : rows;
    };
    if (streams) {
        q = ggml_view_4d(ctx, q, q->ne[0], n_tokens, n_gqa, n_heads, q->nb[1], q->nb[2], q->nb[2]*n_gqa, 0);
    }
    ggml_tensor * cur = ggml_flash_attn_ext(ctx, q, view(store.k), view(store.v), mask, kq_scale, 0.0f,
            g.hparams.attn_soft_cap ? g.hparams.f_attn_logit_softcapping : 0.0f);
    ggml_prec_set_acc(cur, GGML_PREC_F32);
    g.res->add_fused_node({ LLM_FUSED_OP_FLASH_ATTN, cur, il });

    if (streams && n_tokens > 1) {
        cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 1, 3, 2)); // from [d_v, n_gqa, n_tokens, n_heads]
    }
    return ggml_reshape_4d(ctx, cur, cur->ne[0], n_gqa, n_heads, n_tokens);
}

ggml_tensor * cache::build_attn(const llm_graph_context & g, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
        ggml_tensor * k_rows, ggml_tensor * v_rows, ggml_tensor * tail_mask, ggml_tensor * kq_b, ggml_tensor * sinks,
        float kq_scale, int il) {
    if (kq_b || sinks) {
        throw std::runtime_error("laprox: layer " + std::to_string(il) + " attends with a bias or with learned sinks, which can't be compressed");
    }
    ggml_context * ctx = g.ctx0;

    const size_t       ikv   = layer_of.at(il);
    const layer_info & layer = all.layers[ikv];
    graph_input      & input = graph_input::of(g, *this);

    const int64_t n_tokens = input.n_tokens;
    const int64_t n_head   = layer.n_head;
    const int64_t n_gqa    = layer.n_gqa();

    size_t first_row = 0; // of this layer in k_rows and v_rows
    for (size_t i = 0; i < ikv; i++) {
        first_row += all.layers[i].n_head_kv*g.n_tokens;
    }

    // a layer that reads another one's cache is not the owner of its entries: only the owner's queries score them
    const bool owner = (int) layer.il == il;
    if (owner) {
        all.kq_scales[ikv] = kq_scale; // nobody but the graph says it
        all.rotations[ikv] = rotation_of(q_cur);
    }

    ggml_tensor * marks = nullptr; // of the gates: [1, n_head_kv, n_tokens]
    if (gates && k_cur) {
        ggml_build_forward_expand(g.gf, k_cur);
        marks = gates->build(ctx, g.gf, layer.il);
    }

    ggml_tensor * result = nullptr;
    for (size_t s = 0; s < input.sequences.size(); s++) {
        const sequence    & seq   = *input.sequences[s];
        const layer_store & store = seq.store(ikv);

        const auto write = [&](ggml_tensor * pool, ggml_tensor * cur, ggml_tensor * rows) {
            if (!cur) {
                return;
            }
            const int64_t n = n_tokens*layer.n_head_kv;
            ggml_tensor * index = ggml_view_1d(ctx, rows, n, (first_row + s*n)*rows->nb[0]);
            ggml_tensor * flat  = flatten(ctx, tokens_of(ctx, cur, s*n_tokens, n_tokens), pool->ne[0]);
            ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, pool, flat, index));
        };
        write(store.k, k_cur, k_rows);
        write(store.v, v_cur, v_rows);
        if (store.z && k_cur) {
            write(store.z, marks, k_rows);
        }

        ggml_tensor * q = tokens_of(ctx, q_cur, s*n_tokens, n_tokens);

        if (owner) {
            ggml_tensor * window = seq.window.rows[ikv];
            ggml_tensor * slots  = ggml_view_1d(ctx, input.slots, input.n_observed, s*input.slots->nb[1]);
            ggml_tensor * last   = tokens_of(ctx, q, n_tokens - input.n_observed, input.n_observed);
            ggml_build_forward_expand(g.gf, ggml_set_rows(ctx, window, flatten(ctx, last, window->ne[0]), slots));
            if (seq.sums) {
                seq.sums->observe(g, input, layer, ikv, s, q, all.rotations[ikv]);
            }
        }

        // the part of the host's mask that has storage behind it
        const int64_t n_tail = std::min<int64_t>(tail_mask->ne[0], store.n_tail);
        ggml_tensor * tail = ggml_view_2d(ctx, tail_mask, n_tail, n_tokens, tail_mask->nb[1], s*tail_mask->nb[3]);

        const auto class_mask = [&](const store_class & cls) {
            if (!cls.kept_mask) {
                return input.tail_mask(ctx, s, layer.buft, tail, 1);
            }
            const int64_t n_masks = cls.kept_mask->ne[3];
            ggml_tensor * repeated = input.tail_mask(ctx, s, layer.buft, tail, n_masks);
            ggml_tensor * kept = n_tokens == 1 ? cls.kept_mask
                : ggml_repeat_4d(ctx, cls.kept_mask, cls.n_view, n_tokens, 1, n_masks);
            return ggml_concat(ctx, kept, repeated, 0);
        };

        // [d, n_head, n_tokens] -> [d, n_tokens, n_head], the query heads of a class one after the other
        ggml_tensor * heads = ggml_permute(ctx, q, 0, 2, 1, 3);
        if (store.order) {
            ggml_tensor * flat = flatten(ctx, heads, q->ne[0]*n_tokens*n_gqa);
            heads = ggml_reshape_3d(ctx, ggml_get_rows(ctx, flat, store.order), q->ne[0], n_tokens, n_head);
        }

        ggml_tensor * cur  = nullptr; // [d_v, n_gqa, n_head_kv, n_tokens]
        int64_t       head = 0;
        for (const store_class & cls : store.classes) {
            const int64_t n_heads = cls.plan.heads.size();
            ggml_tensor * part = ggml_view_3d(ctx, heads, heads->ne[0], n_tokens, n_gqa*n_heads,
                    heads->nb[1], heads->nb[2], head*n_gqa*heads->nb[2]);
            part = is_aligned(part) ? part : ggml_cont(ctx, part);
            ggml_tensor * out = attend(g, layer, store, cls, part, class_mask(cls), n_tail, kq_scale, il);
            cur   = cur ? ggml_concat(ctx, cur, out, 2) : out;
            head += n_heads;
        }

        if (store.inverse) {
            // get_rows wants the heads as rows, and has one index for all: tokens go into the row
            const int64_t d = cur->ne[0]*n_gqa;
            cur = ggml_reshape_3d(ctx, cur, d, layer.n_head_kv, n_tokens);
            if (n_tokens > 1) {
                cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3));
            }
            cur = ggml_get_rows(ctx, ggml_reshape_2d(ctx, cur, d*n_tokens, layer.n_head_kv), store.inverse);
            cur = ggml_reshape_3d(ctx, cur, d, n_tokens, layer.n_head_kv);
            if (n_tokens > 1) {
                cur = ggml_cont(ctx, ggml_permute(ctx, cur, 0, 2, 1, 3));
            }
        }
        cur = ggml_reshape_2d(ctx, cur, layer.d_v*n_head, n_tokens);

        result = result ? ggml_concat(ctx, result, cur, 1) : cur;
    }

    ggml_build_forward_expand(g.gf, result);
    return result;
}

}
