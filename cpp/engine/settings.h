// What the user asked for, checked; and what the engine keeps beside a loaded model.

#pragma once

#include "laprox.h"
#include "core/budget.h"
#include "core/profile.h"
#include "engine/policies/policy.h"
#include "engine/weights.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

struct ggml_tensor;
struct llama_cparams;
struct llama_hparams;
struct llama_model;

namespace laprox {

class gate_set;

static const int32_t max_window = 1024; // queries

struct settings {
    laprox::policy policy;
    laprox::budget budget;
    int32_t window;
    int32_t sink;
    int32_t recent;
    int32_t min_tokens;
    bool    chunked;
    float   floor;

    // paths; empty: MODEL.kv-profile.npy and MODEL.kv-gates.gguf beside the model
    std::string profile;
    std::string gates;
    std::shared_ptr<const budget_profile> table;   // of those files, where they are needed
    std::shared_ptr<const gate_set>       gate;

    bool evicts() const { return policy.score != nullptr; }
};

// Throws std::invalid_argument, which names the setting, its value and what would be accepted.
settings make_settings(const llama_model & model, const laprox_params & params);
// Points into `s`.
laprox_params to_params(const settings & s);

// Why this model can't be compressed; empty if it can.
std::string reason_not_compressible(const llama_model & model);

// 16 hexadecimal digits over a model's sizes and attention norms, which no quantisation changes. Throws std::runtime_error
// where it has none.
std::string fingerprint(const llama_model & model);

// Hangs off llama_model, so that it lives exactly as long.
struct model_state {
    bool enabled = false;
    settings config {};
    std::string path;

    // layer -> Gram matrices of the output projection, see projection.h; shared by all contexts of the model
    std::mutex mutex;
    std::map<uint32_t, std::vector<float>> grams;
    weight_reader weights;

    // as last loaded: settings of sequences change often, gates hardly ever
    std::string gates_path;
    std::shared_ptr<const gate_set> gates;
};

// The state of a model just loaded, off. `splits`: its files where there are several.
std::shared_ptr<model_state> make_model_state(const std::string & path, const std::vector<std::string> & splits);

// Whether contexts of this model get a compressing cache.
bool enabled(const llama_model & model);

// Several sequences in one cache each keep their own entries, so each gets a stream of its own even where
// --kv-unified asked for a common pool; storage is allocated as they grow.
void adjust_cparams(const llama_model & model, llama_cparams & cparams);

}
