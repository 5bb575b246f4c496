// What the user asked for, checked, in the one place where it is; and what the engine keeps beside a loaded model.

#pragma once

#include "laprox.h"
#include "core/allocate.h"
#include "core/options.h"
#include "engine/policies/policy.h"
#include "engine/weights.h"

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

struct ggml_tensor;
struct llama_hparams;
struct llama_model;

// What laprox.h's pointers point to.
struct laprox_params {
    laprox::option_texts given;
};

namespace laprox {

class gate_set;
struct profile_file;

constexpr const char * policy_off = "off"; // stock llama.cpp's cache

// The settings in force, as values. A policy's files are loaded.
struct settings : option_values {
    option_texts   given;
    laprox::policy policy;
    bool           chunked;
    std::shared_ptr<const budget_profile> table; // of the files that `profile` and `gates` name, where they are needed
    std::shared_ptr<const gate_set>       gate;

    bool evicts() const { return policy.score != nullptr; }
};

// These throw std::invalid_argument, which names the setting, what was given and what would be accepted.
void set_option(option_texts & given, const option & row, const std::string & text);
void set_custom(option_texts & given, const std::string & allocator);
// What can be said without a model.
settings read_settings(const option_texts & given);
// `read`: other settings, or null; where these name the same files for the same policy, they are not read again.
settings make_settings(const llama_model & model, const option_texts & given, const settings * read = nullptr);

// What can be given for a setting, in words.
std::string accepted_texts(const option & row);

// Why this model can't be compressed; empty if it can.
std::string reason_not_compressible(const llama_model & model);

// 16 hexadecimal digits over a model's sizes and attention norms, which no quantisation changes. Throws std::runtime_error
// where it has none.
std::string fingerprint(const llama_model & model);

// A file that goes with a model: settings of sequences change often, these files hardly ever.
template <typename T> struct last_read {
    std::string version; // path, size and time
    std::shared_ptr<const T> file;
};

// Hangs off llama_model, so that it lives exactly as long.
struct model_state {
    bool enabled = false;
    settings config {};
    std::string path;

    // layer -> Gram matrices of the output projection, see projection.h; shared by all contexts of the model
    std::mutex mutex;
    std::map<uint32_t, std::vector<float>> grams;
    weight_reader weights;

    last_read<gate_set>     gates;
    last_read<profile_file> profile;
};

// The state of a model just loaded, off. `splits`: its files where there are several.
std::shared_ptr<model_state> make_model_state(const std::string & path, const std::vector<std::string> & splits);

// Whether contexts of this model get a compressing cache.
bool enabled(const llama_model & model);

}
