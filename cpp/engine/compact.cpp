#include "engine/compact.h"
#include "engine/graph.h"
#include "engine/recall.h"
#include "engine/refit.h"
#include "engine/sequence.h"

#include <algorithm>
#include <numeric>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace laprox {

// Small models' buffers come from the heap, which glibc would hold on to.
static void trim_heap() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// Cache rows as rows of int32, so that moving them is exact for every type.
static ggml_tensor * as_i32(ggml_context * ctx, ggml_tensor * t) {
    ggml_tensor * view = ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], 0);
    view->type  = GGML_TYPE_I32;
    view->ne[0] = t->nb[1]/sizeof(int32_t);
    view->nb[0] = sizeof(int32_t);
    return view;
}

// The first n rows of each run of a class, as int32: [words, n, n_heads]
static ggml_tensor * runs_of(ggml_context * ctx, ggml_tensor * pool, const store_class & cls, int64_t n) {
    ggml_tensor * words = as_i32(ctx, pool);
    return ggml_view_3d(ctx, words, words->ne[0], n, cls.plan.heads.size(), words->nb[1], cls.stride*words->nb[1], cls.row0*words->nb[1]);
}

static void run_if_any(graph_runner & graph) {
    if (ggml_graph_n_nodes(graph.gf) > 0) {
        graph.run();
    }
}

// Copy the rows of a layer that stay.
static void move_rows(workbench & bench, const layer_store & from, const layer_store & to, const std::vector<std::vector<uint32_t>> & kept_rows, const std::vector<uint32_t> & cells) {
    graph_runner graph(bench);
    std::vector<std::vector<int32_t>> indices(to.classes.size());
    for (size_t c = 0; c < to.classes.size(); c++) {
        const store_class & cls = to.classes[c];
        for (uint32_t head : cls.plan.heads) {
            const auto & rows = kept_rows[head];
            indices[c].insert(indices[c].end(), cls.plan.n_rows - rows.size(), 0); // padding: any row will do
            for (uint32_t row : rows) {
                indices[c].push_back((int32_t) (from.held_row(head) + row));
            }
            for (uint32_t cell : cells) {
                indices[c].push_back((int32_t) (from.tail_row(head) + cell));
            }
        }
        if (indices[c].empty()) {
            continue;
        }
        ggml_tensor * index = graph.input(GGML_TYPE_I32, indices[c].size(), 1, indices[c].data());
        for (size_t i = 0; i < to.pools.size(); i++) {
            ggml_tensor * runs = runs_of(graph.ctx, to.pools[i], cls, cls.plan.n_rows + cells.size());
            ggml_tensor * rows = ggml_get_rows(graph.ctx, as_i32(graph.ctx, from.pools[i]), index);
            ggml_build_forward_expand(graph.gf, ggml_cpy(graph.ctx, ggml_reshape_3d(graph.ctx, rows, runs->ne[0], runs->ne[1], runs->ne[2]), runs));
        }
    }
    run_if_any(graph);
}

std::vector<std::unique_ptr<layer_store>> gather(llama_context & lctx, const entry_source & from, const selection & keep, uint32_t n_tail,
        std::optional<llama_pos> biased_from) {
    const auto & layers = from.seq.shared.layers;
    std::vector<std::unique_ptr<layer_store>> fresh;
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        layer_store::positions kept;
        for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
            kept.push_back(from.positions_at(ikv, head, keep.rows[ikv][head]));
        }
        head_bias bias = from.bias(ikv);
        if (biased_from) {
            bias = { std::vector<float>(layers[ikv].n_head_kv), *biased_from };
        }
        fresh.push_back(std::make_unique<layer_store>(layers[ikv], std::move(kept), n_tail, std::move(bias)));
    }
    workbench bench(lctx);
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        move_rows(bench, from.store(ikv), *fresh[ikv], keep.rows[ikv], keep.cells);
    }
    return fresh;
}

void compact(llama_context & lctx, sequence & seq, const entry_source & from, const selection & keep, uint32_t n_tail) {
    const bool fits = seq.probed && !seq.probed->queries.empty();
    auto fresh = gather(lctx, from, keep, n_tail, fits ? std::optional(seq.probed->n_prefix) : std::nullopt);
    if (fits) {
        refit(lctx, seq, keep, fresh);
    }
    // The one place where tokens leave the tail: their rows, of every head, are still in the storage that is replaced next.
    const absorbed gone = seq.leaving(keep.cells);
    seq.absorb(gone, keep.cells, std::move(fresh)); // can't fail
    trim_heap();
}

static std::vector<uint32_t> up_to(uint32_t n) {
    std::vector<uint32_t> result(n);
    std::iota(result.begin(), result.end(), 0);
    return result;
}

// All rows of a layer, to a store with a longer tail.
static void copy_rows(workbench & bench, const layer_store & from, const layer_store & to, uint32_t n_cells) {
    const bool alike = std::equal(from.classes.begin(), from.classes.end(), to.classes.begin(), to.classes.end(),
            [](const store_class & a, const store_class & b) { return a.plan.heads == b.plan.heads && a.plan.n_rows == b.plan.n_rows; });
    if (!alike) { // something was dropped from it
        std::vector<std::vector<uint32_t>> all;
        for (uint32_t n : from.n_kept()) {
            all.push_back(up_to(n));
        }
        move_rows(bench, from, to, all, up_to(n_cells));
        return;
    }
    graph_runner graph(bench);
    for (size_t c = 0; c < from.classes.size(); c++) { // without a copy in between
        const int64_t n = from.classes[c].plan.n_rows + n_cells;
        for (size_t i = 0; n > 0 && i < from.pools.size(); i++) {
            ggml_build_forward_expand(graph.gf, ggml_cpy(graph.ctx, runs_of(graph.ctx, from.pools[i], from.classes[c], n),
                    runs_of(graph.ctx, to.pools[i], to.classes[c], n)));
        }
    }
    run_if_any(graph);
}

void grow_tail(llama_context & lctx, sequence & seq, uint32_t n_tail) {
    workbench bench(lctx);
    for (size_t ikv = 0; ikv < seq.shared.layers.size(); ikv++) {
        const layer_store & from = seq.store(ikv);
        auto fresh = std::make_unique<layer_store>(seq.shared.layers[ikv], from.kept, n_tail, from.bias);
        copy_rows(bench, from, *fresh, std::min(seq.used_cells(), from.n_tail));
        seq.replace(ikv, std::move(fresh));
    }
    trim_heap();
}

}
