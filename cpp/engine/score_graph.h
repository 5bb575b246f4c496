// Building blocks of score graphs, for the entries of one KV head.

#pragma once

#include "engine/graph.h"
#include "engine/sequence.h"

#include "ggml.h"

#include <deque>
#include <functional>
#include <vector>

namespace laprox {

// What the scores of a layer's entries are made of.
struct score_source {
    using mask = std::vector<ggml_fp16_t>; // [n, n_window]

    const sequence    & seq;   // for its settings, its positions and the sums of its queries
    size_t              ikv;
    const layer_store & store; // the entries: what the sequence holds or, with others among them, a store made for this
    const tail_view   & tail;  // which of the store's tail rows are entries
    const observed    & window;
    ggml_tensor       * queries; // F32 [d_k*n_head, n_slots]: the window's
    mask & unbroken; // of heads that nothing was evicted from, the same for all; made when first needed

    const layer_info & layer() const { return seq.shared.layers[ikv]; }
};

class head_graph {
public:
    // The entries of a KV head, at ascending positions, and the queries that look at them. With `even`, the entries are filled up to
    // a multiple of it by ones that no query sees: the CPU's matrix products take several times as long for other sizes.
    // It is a part of the runner's graph, and has to live until that has run.
    head_graph(graph_runner & runner, const score_source & from, uint32_t head, const std::vector<llama_pos> & pos, int64_t even = 1);

    ggml_context * ctx() const { return runner.ctx; }

    // Run the graph: F32 results on the host.
    std::vector<std::vector<float>> compute(const std::vector<ggml_tensor *> & results);

    graph_runner & runner;
    workbench & bench;
    const score_source & from;
    const uint32_t head;
    const std::vector<llama_pos> & pos; // of the entries

    const int64_t n; // entries, those included
    const int64_t n_gqa;
    int64_t n_before; // entries before the recent tokens
    int64_t n_window; // queries

    // Entries that an observed query sees: the first so many.
    int64_t n_visible(int64_t query) const;

    // Attention of the observed queries, a few query heads of the group at a time to bound the scratch memory:
    // weights [n, n_queries, m] of query heads [first, first + m).
    using part = std::function<void(ggml_tensor * weights, int64_t first, int64_t m)>;
    void attention(const part & use) { attention(0, n_window, use); }
    void last_attention(const part & use) { attention(n_window - 1, 1, use); }

    // The same before the softmax: scaled and capped products.
    void logits(const part & use);

    // Float32 rows [d, m] of entries [first, first + m), free of the rotation that llama.cpp gives quantised caches.
    ggml_tensor * keys  (int64_t first, int64_t m);
    ggml_tensor * values(int64_t first, int64_t m);

    // Run f over all entries in runs short enough that `floats` per entry stay within the scratch limit; joins its results along dim 0.
    ggml_tensor * in_runs(int64_t floats, const std::function<ggml_tensor * (int64_t first, int64_t m)> & f);

    ggml_tensor * gate_logits(); // [n]
    ggml_tensor * value_norms(); // ||v W_h||_2: [n, n_gqa]
    ggml_tensor * projected_l1(); // mean over the group of ||v W_h||_1: [n]

    ggml_tensor * constant(int64_t ne0, int64_t ne1, std::vector<float> data);

private:
    void attention(int64_t first_query, int64_t n_queries, const part & use);
    ggml_tensor * products(int64_t first_query, int64_t n_queries, int64_t first_head, int64_t m, float * scale);
    int64_t heads_at_once(int64_t n_queries) const;
    ggml_tensor * plain_rows(ggml_tensor * pool, int64_t first, int64_t m, int64_t block);

    const common     & shared;
    const layer_info & layer;
    std::vector<llama_pos> query_pos; // of the observed queries

    ggml_tensor * k;    // [d_k, n] of the cache's type, or float32
    ggml_tensor * multiplied = nullptr; // the same in a type that doesn't cost the queries precision
    ggml_tensor * v;    // [d_v, n]
    ggml_tensor * z = nullptr; // [1, n]
    ggml_tensor * q = nullptr; // [d_k*n_gqa, n_window]
    ggml_tensor * visible = nullptr; // F16 [n, n_window]: what is added to products; or, where all queries see all entries,
    ggml_tensor * seen_by_all = nullptr; // F32 [n]

    std::deque<std::vector<float>>       floats; // data of inputs, until the graph has run
    std::deque<std::vector<int32_t>>     ints;
    score_source::mask own_mask;
};

// [n, m, r] -> [n, 1, r], by halves: coalesced on a GPU, and deterministic.
ggml_tensor * sum_dim1(ggml_context * ctx, ggml_tensor * t);
ggml_tensor * max_dim1(ggml_context * ctx, ggml_tensor * t);

// Elementwise.
ggml_tensor * max_of(ggml_context * ctx, ggml_tensor * a, ggml_tensor * b);

// Rows of length 1.
ggml_tensor * unit_rows(ggml_context * ctx, ggml_tensor * rows);

}
