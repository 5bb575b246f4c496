#include "engine/settings.h"

#include "llama-cparams.h"
#include "llama-model.h"

#include <stdexcept>

namespace laprox {

static void check_range(const char * name, int32_t value, int32_t low, int32_t high) {
    if (value < low || value > high) {
        throw std::invalid_argument(std::string(name) + " = " + std::to_string(value) + " is out of range; accepted: " +
                std::to_string(low) + " to " + std::to_string(high));
    }
}

settings make_settings(const laprox_params & params) {
    settings s {};
    s.policy = &find_policy(params.policy ? params.policy : "");

    s.budget = { (budget_unit) params.budget.unit, params.budget.value };
    check_range("budget.unit", params.budget.unit, 0, 2);
    try {
        check_budget(s.budget);
    } catch (const std::invalid_argument & e) {
        throw std::invalid_argument("budget " + std::to_string(params.budget.value) + " " + e.what());
    }

    check_range("window",     params.window,     1, 1024);
    check_range("sink",       params.sink,       0, 1 << 20);
    check_range("recent",     params.recent,     1, 1 << 20); // the last token anchors the sequence's position
    check_range("min_tokens", params.min_tokens, 0, 1 << 30);
    s.window     = params.window;
    s.sink       = params.sink;
    s.recent     = params.recent;
    s.min_tokens = params.min_tokens;

    check_range("prefill", params.prefill, LAPROX_PREFILL_DENSE, LAPROX_PREFILL_CHUNKED);
    s.chunked = params.prefill == LAPROX_PREFILL_CHUNKED;

    if (s.budget.unit == budget_unit::tokens && s.policy->scorer != scorer_type::none && s.budget.value < s.sink + s.recent) {
        throw std::invalid_argument("budget of " + std::to_string((int64_t) s.budget.value) + " tokens is less than the " +
                std::to_string(s.sink + s.recent) + " that are never evicted (sink " + std::to_string(s.sink) +
                " + recent " + std::to_string(s.recent) + "); accepted: at least that many");
    }
    return s;
}

laprox_params to_params(const settings & s) {
    return {
        /*.policy     =*/ s.policy->name,
        /*.budget     =*/ { (laprox_budget_unit) s.budget.unit, s.budget.value },
        /*.window     =*/ s.window,
        /*.sink       =*/ s.sink,
        /*.recent     =*/ s.recent,
        /*.min_tokens =*/ s.min_tokens,
        /*.prefill    =*/ s.chunked ? LAPROX_PREFILL_CHUNKED : LAPROX_PREFILL_DENSE,
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
    state->weights = weight_reader(splits.empty() ? std::vector<std::string> { path } : splits);
    return state;
}

static bool enabled(const llama_model & model) {
    return model.laprox && model.laprox->enabled;
}

void adjust_cparams(const llama_model & model, llama_cparams & cparams) {
    if (enabled(model) && cparams.kv_unified && cparams.n_seq_max > 1) {
        cparams.kv_unified = false;
        cparams.n_ctx *= cparams.n_seq_max; // a sequence may still be as long as the whole context
    }
}

uint32_t extra_graph_nodes(const llama_model & model, const llama_cparams & cparams) {
    return enabled(model) ? 64*cparams.n_seq_max*model.hparams.n_layer_all : 0;
}

}
