// Retention gates (DBTrimKV, arXiv 2605.09649; TRIM-KV, 2512.03324): small networks that say, when a token is created, how long
// it will matter to each KV head. They are trained once per model and live in a GGUF file beside it; docs/retention-gates.md
// has its format.

#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_cgraph;
struct llama_model;

namespace laprox {

class gate_set {
public:
    // Throws std::runtime_error naming the file and what is wrong with it, or with it for this model.
    gate_set(const llama_model & model, const std::string & path);

    // In the model's graph: the logits of beta for the tokens of a layer, from the attention block's normed input.
    // Result: F32 [1, n_head_kv, n_tokens]
    ggml_tensor * build(ggml_context * ctx, ggml_cgraph * gf, uint32_t il) const;

    const std::string path;

private:
    struct layer_gate {
        ggml_tensor * in  = nullptr; // [n_embd, hidden]
        ggml_tensor * in_b = nullptr;
        ggml_tensor * mid = nullptr; // [hidden, hidden]: rg10 only
        ggml_tensor * mid_b = nullptr;
        ggml_tensor * out = nullptr; // [hidden, n_head_kv]
        ggml_tensor * out_b = nullptr;
    };

    ggml_tensor * activate(ggml_context * ctx, ggml_tensor * t) const;

    bool gelu = false;
    std::vector<layer_gate> layers;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;
};

}
