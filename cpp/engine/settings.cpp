#include "engine/settings.h"
#include "engine/gates.h"
#include "engine/profile_file.h"

#include "llama-model.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <stdexcept>

namespace laprox {

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

// What differs where a file was replaced; empty where there is none.
static std::string file_version(const std::string & path) {
    std::error_code absent;
    const auto file = std::filesystem::u8path(path);
    const auto size = std::filesystem::file_size(file, absent);
    const auto time = std::filesystem::last_write_time(file, absent);
    return absent ? "" : path + '\n' + std::to_string(size) + '\n' + std::to_string(time.time_since_epoch().count());
}

// The named file, or MODEL.kv-KIND.gguf beside the model.
template <typename T>
static std::shared_ptr<const T> load_companion(const llama_model & model, last_read<T> & last, const settings & s, const std::string & named,
        const char * kind, const char * what, const char * advice) {
    std::string path = named;
    if (path.empty()) {
        path = std::filesystem::u8path(model.laprox->path).replace_extension(std::string(".kv-") + kind + ".gguf").u8string();
    }
    const std::string version = file_version(path);
    if (named.empty() && version.empty()) {
        throw std::invalid_argument("policy \"" + s.policy.name + "\" needs " + what + " of this model: none is named, and there is no " + path +
                "; " + advice);
    }
    std::lock_guard<std::mutex> lock(model.laprox->mutex);
    if (version.empty() || last.version != version) {
        last = { version, std::make_shared<const T>(model, path) };
    }
    return last.file;
}

static std::shared_ptr<const gate_set> load_gates(const llama_model & model, const settings & s) {
    return load_companion(model, model.laprox->gates, s, s.gates, "gates", "retention gates",
            "`laprox train-gates` and `laprox convert-gates` make them");
}

static std::shared_ptr<const budget_profile> load_profile(const llama_model & model, const settings & s) {
    const auto file = load_companion(model, model.laprox->profile, s, s.profile, "profile", "a profile",
            "`laprox profile` makes one");
    if (!file->scorer.empty() && file->scorer != s.policy.score->name) {
        throw std::invalid_argument("profile " + file->path + " was made for scorer " + file->scorer + ", policy \"" + s.policy.name +
                "\" has " + s.policy.score->name + "; accepted: policy \"" + file->scorer + ":profile\"");
    }
    return { file, &file->table };
}

static bool is_policy(const option & row) {
    return std::string(row.kind) == "policy";
}

std::string accepted_texts(const option & row) {
    return is_policy(row) ? policy_off + (", " + accepted_policies()) : accepted_values(row);
}

// A text that is a policy's name; of what is typed, a custom scorer is none.
static policy check_policy(const option_texts & given, const option & row, const std::string & text, bool typed) {
    if (text == policy_off) {
        return { text };
    }
    try {
        const policy found = find_policy(text);
        if (typed && found.score && std::string(found.score->name) == custom_scorer) {
            throw std::invalid_argument("a scorer of your own has no name");
        }
        return found;
    } catch (const std::invalid_argument & e) {
        given.refuse(row, text, e.what(), accepted_texts(row));
    }
}

void set_option(option_texts & given, const option & row, const std::string & text) {
    if (is_policy(row)) {
        check_policy(given, row, text, true);
    }
    given.set(row, text);
}

void set_custom(option_texts & given, const std::string & allocator) {
    const option & row = find_option("policy");
    const std::string text = std::string(custom_scorer) + ":" + allocator;
    check_policy(given, row, text, false);
    given.set(row, text);
}

settings read_settings(const option_texts & given) {
    settings s {};
    static_cast<option_values &>(s) = given.values();
    s.given   = given;
    s.policy  = check_policy(given, find_option("policy"), s.policy_name, false);
    s.chunked = s.prefill == "chunked";

    if (s.budget.unit == budget_unit::tokens && s.evicts() && s.budget.value < s.sink + s.recent) {
        const option & row = find_option("budget");
        const std::string least = std::to_string(s.sink + s.recent);
        given.refuse(row, given.get(row), "less than the " + least + " tokens that are never evicted, " +
                given.spell(find_option("sink")) + " " + std::to_string(s.sink) + " and " +
                given.spell(find_option("recent")) + " " + std::to_string(s.recent), "at least " + least + " tokens");
    }
    if (std::filesystem::u8path(s.profile).extension() == ".npy") {
        given.refuse(find_option("profile"), s.profile, "curves as they are published", "what `laprox profile MODEL --convert " + s.profile +
                " -o MODEL.kv-profile.gguf` makes of them");
    }
    return s;
}

settings make_settings(const llama_model & model, const option_texts & given, const settings * read) {
    settings s = read_settings(given);
    const auto same = [&](const char * name) { return given.get(find_option(name)) == read->given.get(find_option(name)); };
    if (read && same("policy") && same("profile") && same("gates")) {
        s.table = read->table;
        s.gate  = read->gate;
        return s;
    }
    if (s.policy.share && s.policy.share->needs && std::string(s.policy.share->needs) == "profile") {
        s.table = load_profile(model, s);
    }
    if (!s.gates.empty() || (s.evicts() && s.policy.score->needs_gates())) {
        s.gate = load_gates(model, s);
    }
    return s;
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

}
