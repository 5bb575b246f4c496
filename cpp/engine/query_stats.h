// Mean and covariance of a sequence's queries before their rotation, summed up while it is evaluated: what Expected
// Attention (arXiv 2510.00636) takes future queries to look like.
//
// Sums belong to positions, without gaps, and each layer's know how many they are of: a position that comes again, because
// its batch was aborted or is evaluated on other entries, isn't added again. Where other tokens come in the place of some,
// the sums give up their share, the mean staying what it was: single queries can't be taken out.

#pragma once

#include "engine/store.h"

#include "llama.h"

#include <vector>

struct llama_cparams;
struct llama_model;
struct llm_graph_context;

namespace laprox {

class graph_input;

// What a model's graph does to the queries of a layer by their position: nothing, which some architectures choose layer by layer; or
// rotate their first dimensions; or something else.
enum class rotation { none, first, other };
rotation rotation_of(const ggml_tensor * q);

class query_stats {
public:
    // Throws std::runtime_error where queries can't be rotated back, or there is no room.
    query_stats(const llama_model & model, const std::vector<layer_info> & layers);

    // In the model's graph: add queries q [d, n_head, n_tokens] of its sequence, the s-th of the graph, to the sums of a layer.
    // Throws std::runtime_error where they can't be rotated back.
    void observe(const llm_graph_context & g, graph_input & input, const layer_info & layer, size_t ikv, size_t s, ggml_tensor * q, rotation turned) const;

    void clear();
    void copy(const query_stats & from);
    // Of no more than the first n positions. The device must have finished.
    void cut(int64_t n);

    // Positions whose queries are in the sums of a layer.
    int64_t n_summed(size_t ikv) const;

    layer_tensors sums; // F32 [d, d + 2, n_head]: sum of u u^T, then sum of u, then how many they are
    llama_pos begin = 0; // first position that can be in them: what was restored without them isn't

private:
    const llama_model & model;
};

// As the model rotates the queries of a layer: all of `cur` [d, n, n_tokens] at positions `pos` [n_tokens].
ggml_tensor * rope_as_model(ggml_context * ctx, const llama_model & model, const llama_cparams & cparams, int32_t il, rotation turned,
        ggml_tensor * cur, ggml_tensor * pos);

}
