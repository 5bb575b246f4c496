// Mean and covariance of a sequence's queries before their rotation, summed up while it is evaluated: what Expected
// Attention (arXiv 2510.00636) takes future queries to look like. Tokens that are taken back stay in the sums.

#pragma once

#include "engine/store.h"

#include "llama.h"

#include <vector>

struct llama_model;
struct llm_graph_context;

namespace laprox {

class cache;
class window_input;
class workbench;

class query_stats {
public:
    // Throws std::runtime_error where queries can't be rotated back, or there is no room.
    query_stats(const llama_model & model, const std::vector<layer_info> & layers, uint32_t n_stream);

    // In the model's graph: add queries q [d, n_head, n_tokens] of a stream to its sums.
    void observe(const llm_graph_context & g, window_input & win, const cache & kv, size_t ikv, size_t s, ggml_tensor * q) const;

    void clear(uint32_t strm);
    void copy (uint32_t src, uint32_t dst);

    // F32 [d, d + 1, n_head, n_stream] per layer: sum of u u^T, then sum of u
    std::vector<ggml_tensor *> sums;

private:
    const llama_model & model;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;
};

// The queries of one group over the next `n_future` positions, as a Gaussian after the mean rotation.
struct future_queries {
    std::vector<float> mean;       // [n_gqa, d]
    std::vector<float> covariance; // [n_gqa, d, d]
};

future_queries expect_queries(workbench & bench, const cache & kv, uint32_t strm, size_t ikv, uint32_t head, int32_t n_future);

}
