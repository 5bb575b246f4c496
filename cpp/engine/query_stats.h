// Mean and covariance of a sequence's queries before their rotation, summed up while it is evaluated: what Expected
// Attention (arXiv 2510.00636) takes future queries to look like. Tokens that are taken back stay in the sums.

#pragma once

#include "engine/store.h"

#include "llama.h"

#include <vector>

struct llama_model;
struct llm_graph_context;

namespace laprox {

class graph_input;
class sequence;
class workbench;

class query_stats {
public:
    // Throws std::runtime_error where queries can't be rotated back, or there is no room.
    query_stats(const llama_model & model, const std::vector<layer_info> & layers);

    // In the model's graph: add queries q [d, n_head, n_tokens] of its sequence, the s-th of the graph, to the sums of a layer.
    void observe(const llm_graph_context & g, graph_input & input, const layer_info & layer, size_t ikv, size_t s, ggml_tensor * q) const;

    void clear();
    void copy(const query_stats & from);

    layer_tensors sums; // F32 [d, d + 1, n_head]: sum of u u^T, then sum of u
    int64_t n_summed = 0;

private:
    const llama_model & model;
};

// The queries of one group over the next `n_future` positions, as a Gaussian after the mean rotation.
struct future_queries {
    std::vector<float> mean;       // [n_gqa, d]
    std::vector<float> covariance; // [n_gqa, d, d]
};

future_queries expect_queries(workbench & bench, const sequence & seq, size_t ikv, uint32_t head, int32_t n_future);

}
