#include "engine/score_graph.h"
#include "engine/projection.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace laprox {

// What one tensor of a score graph may take; a graph holds a few at a time.
static const int64_t scratch_bytes = 16ll << 20;

// t: dim 1 halved until one is left
static ggml_tensor * fold_dim1(ggml_context * ctx, ggml_tensor * t, ggml_tensor * (*join)(ggml_context *, ggml_tensor *, ggml_tensor *)) {
    const auto part = [&](ggml_tensor * a, int64_t first, int64_t n) {
        return ggml_view_3d(ctx, a, a->ne[0], n, a->ne[2], a->nb[1], a->nb[2], first*a->nb[1]);
    };
    while (t->ne[1] > 1) {
        const int64_t half = t->ne[1]/2;
        ggml_tensor * joined = join(ctx, part(t, 0, half), part(t, half, half));
        t = t->ne[1] % 2 ? ggml_concat(ctx, joined, part(t, 2*half, 1), 1) : joined;
    }
    return t;
}

ggml_tensor * sum_dim1(ggml_context * ctx, ggml_tensor * t) {
    return fold_dim1(ctx, t, ggml_add);
}

ggml_tensor * max_dim1(ggml_context * ctx, ggml_tensor * t) {
    return fold_dim1(ctx, t, max_of);
}

ggml_tensor * max_of(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
    return ggml_add(ctx, b, ggml_relu(ctx, ggml_sub(ctx, a, b)));
}

ggml_tensor * unit_rows(ggml_context * ctx, ggml_tensor * rows) {
    return ggml_scale(ctx, ggml_rms_norm(ctx, rows, 1e-20f), 1.0f/std::sqrt((float) rows->ne[0]));
}

static ggml_tensor * as_f32(ggml_context * ctx, ggml_tensor * t) {
    return t->type == GGML_TYPE_F32 ? t : ggml_cast(ctx, t, GGML_TYPE_F32);
}

head_graph::head_graph(graph_runner & runner, const score_source & from, uint32_t head, const std::vector<llama_pos> & pos, int64_t even) :
        runner(runner), bench(runner.bench), from(from), head(head), pos(pos), n(((int64_t) pos.size() + even - 1)/even*even), n_gqa(from.layer().n_gqa()),
        shared(from.seq.shared), layer(from.layer()) {
    const layer_store & store = from.store;

    n_before = std::max<int64_t>(0, (int64_t) pos.size() - std::min<int64_t>(from.seq.config().recent, from.tail.cell.size()));

    std::vector<uint32_t> held = store.rows_of(head, from.tail);
    held.resize(n, held.back());
    ggml_tensor * index = nullptr;
    const bool adjacent = held.back() + 1 == held.size() && std::is_sorted(held.begin(), held.end());
    if (!adjacent || store.held_row(head) % start_block(layer) != 0) {
        ints.emplace_back();
        for (uint32_t row : held) {
            ints.back().push_back((int32_t) (store.held_row(head) + row));
        }
        index = runner.input(GGML_TYPE_I32, n, 1, ints.back().data());
    }
    const auto rows = [&](ggml_tensor * pool) {
        return index ? ggml_get_rows(ctx(), pool, index)
                     : ggml_view_2d(ctx(), pool, pool->ne[0], n, pool->nb[1], store.held_row(head)*pool->nb[1]);
    };
    k = rows(store.k);
    v = rows(store.v);
    z = store.z ? rows(store.z) : nullptr;

    // a query older than all that is held sees nothing here
    const auto first_query = std::lower_bound(from.window.pos.begin(), from.window.pos.end(), pos.front());
    query_pos.assign(first_query, from.window.pos.end());
    const uint32_t * slots = from.window.slot.data() + (first_query - from.window.pos.begin());
    n_window = (int64_t) query_pos.size();
    if (n_window == 0) {
        return;
    }
    const int64_t d_q  = n_gqa*layer.d_k;
    ggml_tensor * mine = ggml_view_2d(ctx(), from.queries, d_q, from.queries->ne[1], from.queries->nb[1], head*d_q*from.queries->nb[0]);
    q = ggml_get_rows(ctx(), mine, runner.input(GGML_TYPE_I32, n_window, 1, slots));

    if (n_visible(0) == (int64_t) pos.size()) { // and the later ones see everything, too: one row does for all
        std::vector<float> added(n, -INFINITY);
        for (size_t entry = 0; entry < pos.size(); entry++) {
            added[entry] = entry < store.n_kept(head) ? store.bias.at(head, pos[entry]) : 0.0f;
        }
        seen_by_all = constant(n, 1, std::move(added));
        return;
    }
    score_source::mask & data = store.n_kept(head) == 0 ? from.unbroken : own_mask;
    if (data.empty()) {
        data.reserve(n*n_window);
        score_source::mask added(n, ggml_fp32_to_fp16(0.0f)); // where it is seen
        for (uint32_t entry = 0; entry < store.n_kept(head); entry++) {
            added[entry] = ggml_fp32_to_fp16(store.bias.at(head, pos[entry]));
        }
        for (int64_t t = 0; t < n_window; t++) {
            data.insert(data.end(), added.begin(), added.begin() + n_visible(t));
            data.insert(data.end(), n - n_visible(t), ggml_fp32_to_fp16(-INFINITY));
        }
    }
    visible = runner.input(GGML_TYPE_F16, n, n_window, data.data());
}

std::vector<std::vector<float>> head_graph::compute(const std::vector<ggml_tensor *> & results) {
    for (ggml_tensor * t : results) {
        runner.output(t);
    }
    runner.run();
    return runner.read(results);
}

int64_t head_graph::n_visible(int64_t query) const {
    return std::upper_bound(pos.begin(), pos.end(), query_pos[query]) - pos.begin();
}

ggml_tensor * head_graph::constant(int64_t ne0, int64_t ne1, std::vector<float> data) {
    floats.push_back(std::move(data));
    return runner.input(GGML_TYPE_F32, ne0, ne1, floats.back().data());
}

int64_t head_graph::heads_at_once(int64_t n_queries) const {
    return std::clamp<int64_t>(scratch_bytes/(n*n_queries*(int64_t) sizeof(float)), 1, n_gqa);
}

// q k^T: [n, n_queries, m], to be multiplied by *scale
ggml_tensor * head_graph::products(int64_t first_query, int64_t n_queries, int64_t first_head, int64_t m, float * scale) {
    const int64_t d = k->ne[0];
    ggml_tensor * part = ggml_view_3d(ctx(), q, d, m, n_queries, d*q->nb[0], q->nb[1], first_head*d*q->nb[0] + first_query*q->nb[1]);
    part = ggml_cont(ctx(), ggml_permute(ctx(), part, 0, 2, 1, 3)); // [d, n_queries, m]

    // products of quantised keys would quantise the queries too
    if (!multiplied) {
        multiplied = ggml_is_quantized(k->type) || k->type == GGML_TYPE_BF16 ? as_f32(ctx(), k) : k;
    }
    ggml_tensor * a = ggml_mul_mat(ctx(), multiplied, ggml_reshape_2d(ctx(), part, d, n_queries*m));
    ggml_prec_set_acc(a, GGML_PREC_F32);
    a = ggml_reshape_3d(ctx(), a, n, n_queries, m);
    *scale = shared.kq_scales[from.ikv];
    if (shared.hparams.attn_soft_cap) {
        const float cap = shared.hparams.f_attn_logit_softcapping;
        a = ggml_scale(ctx(), ggml_tanh(ctx(), ggml_scale(ctx(), a, *scale/cap)), cap);
        *scale = 1.0f;
    }
    return a;
}

void head_graph::attention(int64_t first_query, int64_t n_queries, const part & use) {
    const int64_t step = heads_at_once(n_queries);
    ggml_tensor * seen = visible ? ggml_view_2d(ctx(), visible, n, n_queries, visible->nb[1], first_query*visible->nb[1]) : nullptr;
    for (int64_t first = 0; first < n_gqa; first += step) {
        const int64_t m = std::min(step, n_gqa - first);
        float scale;
        ggml_tensor * a = products(first_query, n_queries, first, m, &scale);
        if (!seen) { // a mask would be a row for each query
            a = ggml_add(ctx(), a, ggml_scale(ctx(), seen_by_all, 1.0f/scale));
        }
        use(ggml_soft_max_ext(ctx(), a, seen, scale, 0.0f), first, m);
    }
}

void head_graph::logits(const part & use) {
    const int64_t step = heads_at_once(n_window);
    for (int64_t first = 0; first < n_gqa; first += step) {
        const int64_t m = std::min(step, n_gqa - first);
        float scale;
        ggml_tensor * a = products(0, n_window, first, m, &scale);
        use(ggml_scale(ctx(), a, scale), first, m);
    }
}

// Rows of a pool as float32, llama.cpp's rotation in blocks undone.
ggml_tensor * head_graph::plain_rows(ggml_tensor * pool, int64_t first, int64_t m, int64_t block) {
    const int64_t d = pool->ne[0];
    ggml_tensor * rows = as_f32(ctx(), ggml_view_2d(ctx(), pool, d, m, pool->nb[1], first*pool->nb[1]));
    if (!block) {
        return rows;
    }
    ggml_tensor * blocks = ggml_reshape_2d(ctx(), ggml_cont(ctx(), rows), block, d*m/block);
    blocks = ggml_mul_mat(ctx(), constant(block, block, hadamard_matrix(block)), blocks);
    ggml_prec_set_acc(blocks, GGML_PREC_F32);
    return ggml_reshape_2d(ctx(), blocks, d, m);
}

ggml_tensor * head_graph::keys(int64_t first, int64_t m) {
    return plain_rows(k, first, m, shared.rotated_k ? rotation_block_k(layer.d_k) : 0);
}

ggml_tensor * head_graph::values(int64_t first, int64_t m) {
    return plain_rows(v, first, m, shared.rotated_v ? rotation_block_v(layer.d_v) : 0);
}

ggml_tensor * head_graph::in_runs(int64_t floats_per_entry, const std::function<ggml_tensor * (int64_t first, int64_t m)> & f) {
    // at most 64 runs: a graph holds only so many nodes
    const int64_t step = std::clamp<int64_t>(scratch_bytes/(floats_per_entry*(int64_t) sizeof(float)), (n + 63)/64, n);
    ggml_tensor * result = nullptr;
    for (int64_t first = 0; first < n; first += step) {
        ggml_tensor * part = f(first, std::min(step, n - first));
        result = result ? ggml_concat(ctx(), result, part, 0) : part;
    }
    return result;
}

ggml_tensor * head_graph::gate_logits() {
    return ggml_cont_2d(ctx(), z, n, 1);
}

ggml_tensor * head_graph::value_norms() {
    const int64_t d = layer.d_v;
    const std::vector<float> & of_layer = output_grams(bench, layer.il);
    ggml_tensor * gram;
    if (shared.rotated_v) { // turning d x d once is cheaper than turning every value back
        std::vector<float> grams;
        for (int64_t i = 0; i < n_gqa; i++) {
            const auto one = rotated_gram(of_layer.data() + (head*n_gqa + i)*d*d, d);
            grams.insert(grams.end(), one.begin(), one.end());
        }
        gram = constant(d, d*n_gqa, std::move(grams));
    } else {
        ggml_tensor * all = runner.input(GGML_TYPE_F32, d, d*layer.n_head, of_layer.data());
        gram = ggml_view_2d(ctx(), all, d, d*n_gqa, all->nb[1], head*n_gqa*d*all->nb[1]);
    }
    return in_runs(d*n_gqa, [&](int64_t first, int64_t m) {
        ggml_tensor * part = as_f32(ctx(), ggml_view_2d(ctx(), v, d, m, v->nb[1], first*v->nb[1]));
        ggml_tensor * gv   = ggml_mul_mat(ctx(), gram, part);
        ggml_prec_set_acc(gv, GGML_PREC_F32);
        gv = ggml_mul(ctx(), ggml_reshape_3d(ctx(), gv, d, n_gqa, m), ggml_view_3d(ctx(), part, d, 1, m, part->nb[1], part->nb[1], 0));
        ggml_tensor * squares = ggml_clamp(ctx(), ggml_sum_rows(ctx(), gv), 0.0f, INFINITY); // rounding can make them negative
        return ggml_cont(ctx(), ggml_transpose(ctx(), ggml_reshape_2d(ctx(), ggml_sqrt(ctx(), squares), n_gqa, m)));
    });
}

ggml_tensor * head_graph::projected_l1() {
    const int64_t d      = layer.d_v;
    const auto  & rows   = output_rows(bench, layer.il); // an L1 norm has no short cut: project
    const int64_t n_embd = (int64_t) rows.size()/(d*layer.n_head);
    const auto    begin  = rows.begin() + head*n_gqa*d*n_embd;
    ggml_tensor * w = constant(n_embd, d*n_gqa, { begin, begin + n_gqa*d*n_embd });
    w = ggml_cont(ctx(), ggml_transpose(ctx(), w)); // [d*n_gqa, n_embd]
    return in_runs(n_embd, [&](int64_t first, int64_t m) {
        ggml_tensor * part  = values(first, m);
        ggml_tensor * total = nullptr;
        for (int64_t h = 0; h < n_gqa; h++) {
            ggml_tensor * mine = ggml_view_2d(ctx(), w, d, n_embd, w->nb[1], h*d*w->nb[0]);
            ggml_tensor * out  = ggml_mul_mat(ctx(), mine, part); // [n_embd, m]
            ggml_prec_set_acc(out, GGML_PREC_F32);
            ggml_tensor * l1 = ggml_sum_rows(ctx(), ggml_abs(ctx(), out));
            total = total ? ggml_add(ctx(), total, l1) : l1;
        }
        return ggml_reshape_1d(ctx(), ggml_scale(ctx(), total, 1.0f/(float) n_gqa), m);
    });
}

}
