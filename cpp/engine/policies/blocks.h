// What policies are made of, beside head_graph.

#pragma once

#include "engine/policies/policy.h"
#include "engine/score_graph.h"

#include <functional>
#include <vector>

namespace laprox::policies {

// total + t; null: nothing yet
ggml_tensor * plus(ggml_context * ctx, ggml_tensor * total, ggml_tensor * t);

// [n, 1, m] -> [n]: over query heads
ggml_tensor * sum_heads(ggml_context * ctx, ggml_tensor * t);
ggml_tensor * max_heads(ggml_context * ctx, ggml_tensor * t);

// Columns of `norms` [n, n_gqa] as [n, 1, m]
ggml_tensor * of_heads(ggml_context * ctx, ggml_tensor * norms, int64_t first, int64_t m);

// ||v_i||_p before the projection: [n]
ggml_tensor * raw_value_norms(head_graph & g, int p);

// Mean over the window and the group of the attention weights: [n]
ggml_tensor * mean_attention(head_graph & g);

// Of a head's candidates.
std::vector<float> pooled(const layer_scores::head & h, const std::vector<float> & number, pooling pool, int kernel);

// A number's sum over the heads of a layer that hold a token, by position. Positions may lie far apart: memory follows the
// number of tokens, not the last position.
class sums_by_position {
public:
    using number_of = std::function<double (const layer_scores::head & h, size_t entry)>;

    sums_by_position(const layer_scores & layer, const number_of & number);
    double at(llama_pos pos) const;

private:
    std::vector<llama_pos> positions; // ascending
    std::vector<double>    sums;
};

}
