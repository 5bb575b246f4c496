#include "engine/settings.h"
#include "engine/gates.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <stdexcept>

namespace laprox {

static void check_range(const char * name, int32_t value, int32_t low, int32_t high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + " is out of range; accepted: " +
                std::to_string(low) + " to " + std::to_string(high));
    }
}

// A C caller may put any number into an enum; reading one of no enumerator's as the enum is undefined.
template <typename T> static int32_t number_in(const T & value) {
    static_assert(sizeof(T) == sizeof(int32_t), "an enum of C is an int");
    int32_t number;
    std::memcpy(&number, &value, sizeof(number));
    return number;
}

std::string fingerprint(const llama_model & model) {
    uint64_t hash = 0xcbf29ce484222325ull; // FNV-1a
    const auto add = [&](const void * data, size_t n) {
        for (size_t i = 0; i < n; i++) {
            hash = (hash ^ ((const uint8_t *) data)[i])*0x100000001b3ull;
        }
    };
    const auto add_number = [&](uint32_t value) { add(&value, sizeof(value)); };

    bool any = false;
    add_number(model.hparams.n_layer());
    add_number(model.hparams.n_embd);
    for (uint32_t il = 0; il < model.hparams.n_layer(); il++) {
        add_number(model.hparams.n_head(il));
        add_number(model.hparams.n_head_kv(il));
        const ggml_tensor * norm = model.layers[il].attn_norm;
        if (norm && norm->type == GGML_TYPE_F32) {
            std::vector<uint8_t> bytes(ggml_nbytes(norm));
            ggml_backend_tensor_get(norm, bytes.data(), 0, bytes.size());
            add(bytes.data(), bytes.size());
            any = true;
        }
    }
    if (!any) {
        throw std::runtime_error("a model of architecture " + model.arch_name() + " has no attention norms to tell it by");
    }
    char text[17];
    std::snprintf(text, sizeof(text), "%016llx", (unsigned long long) hash);
    return text;
}

// The named file, or the one beside the model.
static std::string find_companion(const llama_model & model, const settings & s, const std::string & named, const char * extension,
        const char * what, const char * advice) {
    if (!named.empty()) {
        return named;
    }
    const std::string path = std::filesystem::u8path(model.laprox->path).replace_extension(extension).u8string();
    if (!std::filesystem::exists(std::filesystem::u8path(path))) {
        throw std::invalid_argument("policy \"" + s.policy.name + "\" needs " + what + " of this model: none is named, and there is no " + path +
                "; " + advice);
    }
    return path;
}

static std::shared_ptr<const gate_set> load_gates(const llama_model & model, const settings & s) {
    const std::string path = find_companion(model, s, s.gates, ".kv-gates.gguf", "retention gates",
            "`laprox train-gates` and `laprox convert-gates` make them");
    model_state & state = *model.laprox;
    std::lock_guard<std::mutex> lock(state.mutex);
    if (!state.gates || state.gates_path != path) {
        state.gates      = std::make_shared<gate_set>(model, path);
        state.gates_path = path;
    }
    return state.gates;
}

// LU-KV's table for this model, checked against it.
static std::shared_ptr<const budget_profile> load_profile(const llama_model & model, const settings & s) {
    const std::string path = find_companion(model, s, s.profile, ".kv-profile.npy", "a profile", "`laprox profile` makes one");
    profile_file file = read_profile(path);

    const auto shape = [](int32_t n_layer, int32_t n_head_kv) {
        return "[99, " + std::to_string(n_layer) + ", " + std::to_string(n_head_kv) + "]";
    };
    const int32_t n_layer = model.hparams.n_layer();
    int32_t n_head_kv = 0;
    for (int32_t il = 0; il < n_layer; il++) {
        n_head_kv = std::max<int32_t>(n_head_kv, model.hparams.n_head_kv(il));
    }
    if (file.table.n_layer != n_layer || file.table.n_head_kv != n_head_kv) {
        throw std::invalid_argument("profile " + path + " is " + shape(file.table.n_layer, file.table.n_head_kv) + ", the model needs " +
                shape(n_layer, n_head_kv) + " (eviction, layers, KV heads)");
    }
    const auto note = [&](const char * key) {
        const auto it = file.notes.find(key);
        return it == file.notes.end() ? std::string() : it->second;
    };
    if (!note("fingerprint").empty() && note("fingerprint") != fingerprint(model)) {
        throw std::invalid_argument("profile " + path + " was made for " + note("model") + " (" + note("fingerprint") +
                "), this model is another one (" + fingerprint(model) + ")");
    }
    if (!note("scorer").empty() && note("scorer") != s.policy.score->name) {
        throw std::invalid_argument("profile " + path + " was made for scorer " + note("scorer") + ", policy \"" + s.policy.name + "\" has " +
                s.policy.score->name + "; accepted: policy \"" + note("scorer") + ":profile\"");
    }
    return std::make_shared<budget_profile>(std::move(file.table));
}

settings make_settings(const llama_model & model, const laprox_params & params) {
    settings s {};
    s.policy = find_policy(params.policy ? params.policy : "");

    check_range("budget.unit", number_in(params.budget.unit), 0, 2);
    s.budget = { (budget_unit) params.budget.unit, params.budget.value };
    try {
        check_budget(s.budget);
    } catch (const std::invalid_argument & e) {
        throw std::invalid_argument("budget " + std::to_string(params.budget.value) + " " + e.what());
    }

    check_range("window",     params.window,     1, max_window);
    check_range("sink",       params.sink,       0, 1 << 20);
    check_range("recent",     params.recent,     1, 1 << 20); // the last token anchors the sequence's position
    check_range("min_tokens", params.min_tokens, 0, 1 << 30);
    s.window     = params.window;
    s.sink       = params.sink;
    s.recent     = params.recent;
    s.min_tokens = params.min_tokens;

    check_range("prefill", number_in(params.prefill), LAPROX_PREFILL_DENSE, LAPROX_PREFILL_CHUNKED);
    s.chunked = params.prefill == LAPROX_PREFILL_CHUNKED;

    if (s.budget.unit == budget_unit::tokens && s.evicts() && s.budget.value < s.sink + s.recent) {
        throw std::invalid_argument("budget of " + std::to_string((int64_t) s.budget.value) + " tokens is less than the " +
                std::to_string(s.sink + s.recent) + " that are never evicted (sink " + std::to_string(s.sink) +
                " + recent " + std::to_string(s.recent) + "); accepted: at least that many");
    }
    s.profile = params.profile ? params.profile : "";
    if (s.policy.share && s.policy.share->needs && std::string(s.policy.share->needs) == "profile") {
        s.table = load_profile(model, s);
    }
    s.gates = params.gates ? params.gates : "";
    if (!s.gates.empty() || (s.evicts() && s.policy.score->needs_gates())) {
        s.gate = load_gates(model, s);
    }
    if (!(params.floor >= 0.0f && params.floor <= 1.0f)) {
        throw std::invalid_argument("floor = " + std::to_string(params.floor) + " is out of range; accepted: 0 to 1");
    }
    s.floor = params.floor;
    return s;
}

laprox_params to_params(const settings & s) {
    return {
        /*.policy     =*/ s.policy.name.c_str(),
        /*.budget     =*/ { (laprox_budget_unit) s.budget.unit, s.budget.value },
        /*.window     =*/ s.window,
        /*.sink       =*/ s.sink,
        /*.recent     =*/ s.recent,
        /*.min_tokens =*/ s.min_tokens,
        /*.prefill    =*/ s.chunked ? LAPROX_PREFILL_CHUNKED : LAPROX_PREFILL_DENSE,
        /*.profile    =*/ s.profile.empty() ? nullptr : s.profile.c_str(),
        /*.gates      =*/ s.gates.empty() ? nullptr : s.gates.c_str(),
        /*.floor      =*/ s.floor,
    };
}

std::string reason_not_compressible(const llama_model & model) {
    const auto & hparams = model.hparams;
    const std::string arch = "a model of architecture " + model.arch_name();

    if (hparams.vocab_only) {
        return "the model was loaded without its weights (vocab_only)";
    }
    if (hparams.is_mla()) {
        return arch + " uses multi-head latent attention (MLA), whose cache can't be compressed yet";
    }
    if (hparams.use_alibi) {
        return arch + " uses ALiBi position biases, which depend on the place of an entry in the cache";
    }
    if (!hparams.causal_attn) {
        return arch + " doesn't attend causally (an embedding or diffusion model), so it has no cache to compress";
    }
    if (model.split_mode() == LLAMA_SPLIT_MODE_TENSOR) {
        return "--split-mode tensor cuts the cache across devices, which can't be compressed yet";
    }
    switch (model.arch) {
        // these read the cache by themselves, or keep a second one beside it
        case LLM_ARCH_DEEPSEEK32:
        case LLM_ARCH_DEEPSEEK4:
        case LLM_ARCH_GLM_DSA:
        case LLM_ARCH_GLM5_NEXT:
        case LLM_ARCH_MINIMAX_M3:
        case LLM_ARCH_QWEN4EXP:
        case LLM_ARCH_DOTS3NOTE:
        case LLM_ARCH_HY_V4:
        case LLM_ARCH_KIMI_K3:
        case LLM_ARCH_T5:
        case LLM_ARCH_T5ENCODER:
        case LLM_ARCH_EAGLE3:
        case LLM_ARCH_DFLASH:
        case LLM_ARCH_GEMMA4_ASSISTANT:
            return arch + " attends in a way that can't be compressed yet";
        default:
            break;
    }
    bool any = false;
    for (uint32_t il = 0; il < hparams.n_layer(); il++) {
        const bool cached = hparams.has_kv(il) && !hparams.is_recr(il) && hparams.n_head_kv(il) > 0 && !hparams.is_swa(il);
        if (cached && !model.layers[il].wo) {
            return arch + " has no attn_output weight in layer " + std::to_string(il) + ", which the scores need";
        }
        if (model.layers[il].attn_sinks) {
            return arch + " has learned attention sinks, which can't be compressed yet";
        }
        any = any || cached;
    }
    if (!any) {
        return arch + " has no layer with a full attention cache";
    }
    return "";
}

std::shared_ptr<model_state> make_model_state(const std::string & path, const std::vector<std::string> & splits) {
    auto state = std::make_shared<model_state>();
    state->path = path;
    state->weights = weight_reader(splits.empty() ? std::vector<std::string> { path } : splits);
    return state;
}

bool enabled(const llama_model & model) {
    return model.laprox && model.laprox->enabled;
}

void adjust_cparams(const llama_model & model, llama_cparams & cparams) {
    if (enabled(model) && cparams.kv_unified && cparams.n_seq_max > 1) {
        cparams.kv_unified = false;
        cparams.n_ctx *= cparams.n_seq_max; // a sequence may still be as long as the whole context
    }
}

}
