#include "engine/refit.h"
#include "core/parallel.h"
#include "core/ridge.h"
#include "engine/probe.h"
#include "engine/projection.h"
#include "engine/score_graph.h"
#include "engine/sequence.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace laprox {

static const double ridge    = 1.0;  // in units of summed squared attention
static const float  max_bias = 3.0f; // e^3 times the mass
static const double untouched = 0.75; // heads that keep more than that share are left alone

// Entries and rows are filled up with nothing to multiples of that, which the CPU's matrix products are quickest with.
static const int64_t even = 16;

// Every fifth run of queries is held out.
static const size_t held_out_run = 4;

namespace {

// The probe's queries, where a layer's cache is.
struct reference {
    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
    ggml_tensor           * queries;

    reference(const layer_info & layer, const std::vector<float> & rows, int64_t n) :
            ctx(ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true })) {
        queries = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, (int64_t) layer.d_k*layer.n_head, n);
        buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), layer.buft));
        if (!buffer) {
            throw std::runtime_error("no room on " + std::string(ggml_backend_buft_name(layer.buft)) + " for the queries of a refit");
        }
        ggml_backend_tensor_set(queries, rows.data(), 0, ggml_nbytes(queries));
    }
};

// The queries of a set, and what attention over all entries gives for each: [query head, query] rows.
struct targets {
    observed which;
    std::vector<float> output; // [d_v] each
    std::vector<float> mass;   // of the kept entries that are to have no bias, and of those that are
};

struct system {
    int64_t n = 0;      // 0: nothing to do
    bool    dual;       // one unknown per query, not per entry
    std::vector<float> gram;
    std::vector<float> right; // [d_v][n]
    std::vector<float> solution;
};

// One KV head.
class head_fit {
public:
    head_fit(workbench & bench, const sequence & seq, size_t ikv, uint32_t head, const reference & ref, int64_t n_queries,
            layer_store & fresh, const tail_view & before, const tail_view & after) :
            bench(bench), seq(seq), layer(seq.shared.layers[ikv]), ikv(ikv), head(head), ref(ref), fresh(fresh),
            before(before), after(after), pos(fresh.positions_of(head, after)) {
        for (int64_t i = 0; i < n_queries; i++) {
            targets & set = i/held_out_run % 5 == 4 ? held_out : fitted;
            set.which.slot.push_back((uint32_t) i);
            set.which.pos.push_back(seq.next_position()); // sees everything
        }
    }

    bool worth_it() const {
        return (double) pos.size() <= untouched*(double) before.pos.size() && !fitted.which.slot.empty() && !held_out.which.slot.empty();
    }

    // The system whose solution says how the values change.
    void prepare() {
        attend_to_all(fitted);
        attend_to_all(held_out);
        error_before = error_of({});
        fresh.bias.value[head] = find_bias();
        build_system();
    }

    void solve() { equations.solution = solve_ridge(equations.gram, equations.n, ridge, equations.right); }

    // Whether it is better on the queries that were held out; else nothing has changed.
    bool apply() {
        const int64_t d = layer.d_v, t = (int64_t) pos.size();
        const std::vector<float> change = equations.dual ? from_dual() : equations.solution; // [d_v][t, filled up]
        const int64_t n_change = (int64_t) change.size()/d;
        std::vector<float> rows(t*d); // [t][d_v]
        for (int64_t i = 0; i < t; i++) {
            for (int64_t j = 0; j < d; j++) {
                rows[i*d + j] = values[i*d + j] + change[j*n_change + i];
            }
        }
        const std::vector<uint8_t> stored = as_stored(rows);
        if (!(error_of(rows) < error_before)) {
            fresh.bias.value[head] = 0.0f;
            return false;
        }
        const size_t size = fresh.v->nb[1], n_kept = fresh.n_kept(head);
        ggml_backend_tensor_set(fresh.v, stored.data(), fresh.held_row(head)*size, n_kept*size);
        ggml_backend_tensor_set(fresh.v, stored.data() + n_kept*size, fresh.tail_row(head)*size, stored.size() - n_kept*size);
        return true;
    }

private:
    workbench        & bench;
    const sequence   & seq;
    const layer_info & layer;
    const size_t       ikv;
    const uint32_t     head;
    const reference  & ref;
    layer_store      & fresh;
    const tail_view  & before; // all of the text
    const tail_view  & after;  // what of it stays in the tail
    const std::vector<llama_pos> pos; // of the entries that stay

    targets fitted, held_out;
    double  error_before = 0.0;
    std::vector<float> values; // of the entries that stay: [t, filled up][d_v]
    system  equations;

    score_source::mask unbroken;

    score_source source(const layer_store & store, const tail_view & tail, const observed & which) {
        unbroken.clear();
        return { seq, ikv, store, tail, which, ref.queries, unbroken };
    }

    // [rows, n_queries*n_gqa] of what `f` makes of the attention weights [n, n_queries, m]
    static ggml_tensor * of_attention(head_graph & g, const std::function<ggml_tensor * (ggml_tensor * weights)> & f) {
        ggml_tensor * all = nullptr;
        g.attention([&](ggml_tensor * a, int64_t, int64_t) {
            ggml_tensor * part = f(a);
            all = all ? ggml_concat(g.ctx(), all, part, 2) : part;
        });
        return ggml_reshape_2d(g.ctx(), all, all->ne[0], all->ne[1]*all->ne[2]);
    }

    static ggml_tensor * product(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b) {
        ggml_tensor * t = ggml_mul_mat(ctx, a, b);
        ggml_prec_set_acc(t, GGML_PREC_F32);
        return t;
    }

    static int64_t filled_up(int64_t n) { return (n + even - 1)/even*even; }

    // The weights of all queries as rows, [n, N], filled up with zeros.
    static ggml_tensor * all_attention(head_graph & g) {
        ggml_tensor * x = of_attention(g, [](ggml_tensor * a) { return a; });
        return ggml_pad(g.ctx(), x, 0, (int) (filled_up(x->ne[1]) - x->ne[1]), 0, 0);
    }

    static ggml_tensor * turned(ggml_context * ctx, ggml_tensor * t) {
        return ggml_cont(ctx, ggml_transpose(ctx, t));
    }

    void attend_to_all(targets & set) {
        const score_source from = source(seq.store(ikv), before, set.which);
        graph_runner runner(bench);
        head_graph g(runner, from, head, before.pos, even);
        std::vector<float> stays(2*g.n);
        for (size_t i = 0; i < pos.size(); i++) {
            const bool biased = i < fresh.n_kept(head) && pos[i] >= fresh.bias.from;
            const size_t entry = std::lower_bound(before.pos.begin(), before.pos.end(), pos[i]) - before.pos.begin();
            stays[biased*g.n + entry] = 1.0f;
        }
        ggml_tensor * indicator = g.constant(g.n, 2, std::move(stays));
        ggml_tensor * v = turned(g.ctx(), g.values(0, g.n));
        ggml_tensor * output = of_attention(g, [&](ggml_tensor * a) { return product(g.ctx(), v, a); });
        ggml_tensor * mass   = of_attention(g, [&](ggml_tensor * a) { return product(g.ctx(), indicator, a); });
        auto found = g.compute({ output, mass });
        set.output = std::move(found[0]);
        set.mass   = std::move(found[1]);
    }

    // w = sum B(1 - A) / sum B^2: the weight of biased entries with which the mass of the kept is nearest to that of all, 1.
    float find_bias() const {
        double above = 0.0, below = 0.0;
        for (size_t i = 0; i < fitted.mass.size(); i += 2) {
            const double free = fitted.mass[i], biased = fitted.mass[i + 1];
            above += biased*(1.0 - free);
            below += biased*biased;
        }
        if (below <= 0.0 || above <= 0.0) {
            return 0.0f;
        }
        const float bias = std::clamp((float) std::log(above/below), -max_bias, max_bias);
        return ggml_fp16_to_fp32(ggml_fp32_to_fp16(bias)); // as masks are
    }

    void build_system() {
        const score_source from = source(fresh, after, fitted.which);
        graph_runner runner(bench);
        head_graph g(runner, from, head, pos, even);
        ggml_context * ctx = g.ctx();
        ggml_tensor * v = g.values(0, g.n);                                          // [d_v, t]
        ggml_tensor * x = all_attention(g);                                          // [t, N]
        std::vector<float> wanted = fitted.output;
        wanted.resize(layer.d_v*x->ne[1]);
        ggml_tensor * y = g.constant(layer.d_v, x->ne[1], std::move(wanted));        // [d_v, N]
        ggml_tensor * left = ggml_sub(ctx, y, product(ctx, turned(ctx, v), x));      // what is missing
        ggml_tensor * missing = turned(ctx, left);                                   // [N, d_v]
        equations.dual = g.n > x->ne[1];
        ggml_tensor * gram, * right;
        if (equations.dual) {
            gram  = product(ctx, x, x);
            right = missing;
        } else {
            ggml_tensor * columns = turned(ctx, x); // [N, t]
            gram  = product(ctx, columns, columns);
            right = product(ctx, columns, missing); // [t, d_v]
        }
        equations.n = gram->ne[0];
        auto found = g.compute({ gram, right, ggml_cont(ctx, v) });
        equations.gram  = std::move(found[0]);
        equations.right = std::move(found[1]);
        values          = std::move(found[2]);
    }

    // Dual: (X X^T + r I)^-1 X = X (X^T X + r I)^-1
    std::vector<float> from_dual() {
        const score_source from = source(fresh, after, fitted.which);
        graph_runner runner(bench);
        head_graph g(runner, from, head, pos, even);
        ggml_tensor * x = all_attention(g);
        ggml_tensor * z = g.constant(x->ne[1], layer.d_v, equations.solution);
        return g.compute({ product(g.ctx(), turned(g.ctx(), x), z) }).front(); // [t, d_v]
    }

    // The squared error of the outputs for the queries held out, with these values, [t][d_v]; without any, those that it has.
    double error_of(const std::vector<float> & rows) {
        const score_source from = source(fresh, after, held_out.which);
        graph_runner runner(bench);
        head_graph g(runner, from, head, pos, even);
        ggml_context * ctx = g.ctx();
        std::vector<float> filled = rows;
        filled.resize(layer.d_v*g.n);
        ggml_tensor * v = rows.empty() ? g.values(0, g.n) : g.constant(layer.d_v, g.n, std::move(filled));
        ggml_tensor * turned_v = turned(ctx, v);
        ggml_tensor * output = of_attention(g, [&](ggml_tensor * a) { return product(ctx, turned_v, a); });
        const auto found = g.compute({ output }).front();
        double error = 0.0;
        for (size_t i = 0; i < found.size(); i++) {
            const double difference = found[i] - held_out.output[i];
            error += difference*difference;
        }
        return error;
    }

    // Rows in the cache's type; `rows` become what they are then.
    std::vector<uint8_t> as_stored(std::vector<float> & rows) const {
        const int64_t d = layer.d_v, block = seq.shared.rotated_v ? rotation_block_v(d) : 0;
        const ggml_type type = layer.type_v;
        const int64_t n = (int64_t) rows.size()/d;
        std::vector<uint8_t> stored(n*ggml_row_size(type, d));
        const auto rotate = [&] {
            for (int64_t i = 0; block && i < n; i++) {
                hadamard_rotate(rows.data() + i*d, d, block);
            }
        };
        rotate();
        ggml_quantize_chunk(type, rows.data(), stored.data(), 0, n, d, nullptr);
        if (type != GGML_TYPE_F32) {
            ggml_get_type_traits(type)->to_float(stored.data(), rows.data(), n*d);
        }
        rotate();
        return stored;
    }
};

}

void refit(llama_context & lctx, const sequence & seq, const selection & keep, std::vector<std::unique_ptr<layer_store>> & fresh) {
    const probe & found = *seq.probed;
    const tail_view before = seq.tail();
    tail_view after;
    for (uint32_t i = 0; i < keep.cells.size(); i++) {
        after.cell.push_back(i);
        after.pos.push_back(seq.position_in(keep.cells[i]));
    }
    workbench bench(lctx);
    int64_t n_better = 0;
    const int64_t t0 = ggml_time_us();
    for (size_t ikv = 0; ikv < fresh.size(); ikv++) {
        const layer_info & layer = seq.shared.layers[ikv];
        const reference ref(layer, found.queries[ikv], found.n_queries);
        std::vector<std::unique_ptr<head_fit>> fits;
        for (uint32_t head = 0; head < layer.n_head_kv; head++) {
            auto fit = std::make_unique<head_fit>(bench, seq, ikv, head, ref, found.n_queries, *fresh[ikv], before, after);
            if (fit->worth_it()) {
                fit->prepare();
                fits.push_back(std::move(fit));
            }
        }
        parallel_for(fits.size(), lctx.n_threads_batch(), [&](size_t i) { fits[i]->solve(); });
        for (auto & fit : fits) {
            n_better += fit->apply();
        }
        fresh[ikv]->set_bias(std::move(fresh[ikv]->bias));
    }
    LLAMA_LOG_DEBUG("%s: sequence %u: %lld of %lld KV heads, %.1f ms\n", __func__, seq.id, (long long) n_better, (long long) seq.shared.n_pairs,
            (ggml_time_us() - t0)/1e3);
}

}
