// What a graph reads from the host beside llama.cpp's own inputs: where the queries of the latest tokens are written, and what
// makes a graph that was built for one layout of the cache unfit for another.

#pragma once

#include "engine/cache.h"

#include "llama-graph.h"

#include <map>
#include <vector>

namespace laprox {

class graph_input : public llm_graph_input_i {
public:
    // The input of this graph for this cache, made on first use.
    static graph_input & of(const llm_graph_context & g, cache & kv);

    void set_input(const llama_ubatch * ubatch) override;
    bool can_reuse(const llm_graph_params & params) override;

    std::vector<sequence *> sequences; // that take part in the ubatch, in its order
    int64_t n_tokens;                  // per sequence
    int64_t n_observed;                // of them, the last ones, whose queries are written

    ggml_tensor * slots = nullptr; // I64 [n_observed, n_sequences]

    // where all queries are summed up
    ggml_tensor * back   = nullptr; // I32 [n_tokens*n_sequences]: minus their positions
    ggml_tensor * number = nullptr; // F32 [n_tokens*n_sequences]: which position of those that are summed up it is, + 1/2

    // What undoes llama.cpp's rotation of keys and queries [block, block]; null where it doesn't rotate.
    ggml_tensor * key_rotation(ggml_context * ctx, int64_t d_k);

    // The tail's mask for as many heads of a sequence (by index): F16 [n_tail, n_tokens, 1, n_heads]. Made once for the largest
    // class of heads on a device; the others get a part of it.
    ggml_tensor * tail_mask(ggml_context * ctx, size_t s, ggml_backend_buffer_type_t buft, ggml_tensor * tail, int64_t n_heads);

private:
    graph_input(cache & kv, const llm_graph_context & g);

    std::vector<uint64_t> generations() const;

    cache & kv;
    std::vector<uint64_t> built_for;
    std::map<int64_t, ggml_tensor *> rotations; // by block
    std::map<std::pair<size_t, ggml_backend_buffer_type_t>, ggml_tensor *> repeated; // tail masks
    std::map<size_t, ggml_tensor *> single;
};

}
