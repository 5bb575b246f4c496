#include "engine/document_context.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <vector>

namespace laprox {

// No text that is given has a dot in its key.
static const std::string prefix   = "context.";
static const std::string adapters = prefix + "lora";
static const std::string far      = prefix + "rope_long";

namespace {

struct setting {
    const char * name; // in llama_context_params
    double here;
    double unsaid; // what a document was made with that doesn't say
};

}

static std::vector<setting> rope_of(const llama_context & ctx) {
    const llama_cparams & c = ctx.get_cparams();
    const llama_hparams & h = ctx.get_model().hparams;
    const bool yarn = h.rope_scaling_type_train == LLAMA_ROPE_SCALING_TYPE_YARN;
    return {
        { "rope_scaling_type", (double) c.rope_scaling_type, (double) h.rope_scaling_type_train },
        { "rope_freq_base",    c.rope_freq_base,             h.rope_freq_base_train },
        { "rope_freq_scale",   c.rope_freq_scale,            h.rope_scaling_type_train == LLAMA_ROPE_SCALING_TYPE_NONE ? 1 : h.rope_freq_scale_train },
        { "yarn_ext_factor",   c.yarn_ext_factor,            h.yarn_ext_factor >= 0 ? h.yarn_ext_factor : (double) yarn },
        { "yarn_attn_factor",  c.yarn_attn_factor,           c.yarn_attn_factor }, // llama.cpp makes it of several
        { "yarn_beta_fast",    c.yarn_beta_fast,             h.yarn_beta_fast },
        { "yarn_beta_slow",    c.yarn_beta_slow,             h.yarn_beta_slow },
        { "yarn_orig_ctx",     (double) c.n_ctx_orig_yarn,   (double) (h.n_ctx_orig_yarn ? h.n_ctx_orig_yarn : h.n_ctx_train) },
    };
}

static bool has_adapters(llama_context & ctx) {
    return !ctx.adapters_lora_are_same(nullptr, 0, nullptr);
}

// Some models have two sets of factors, of which the context's size decides.
static bool rotates_far(const llama_context & ctx) {
    const llama_model & model = ctx.get_model();
    return ctx.get_cparams().n_ctx_seq > model.hparams.n_ctx_orig_yarn &&
           std::any_of(model.layers.begin(), model.layers.end(), [](const llama_layer & layer) { return layer.rope_long && !layer.rope_freqs; });
}

static std::string spelt(double value) {
    char text[32];
    snprintf(text, sizeof(text), "%.9g", value);
    return text;
}

void note_context(llama_context & ctx, std::map<std::string, std::string> & texts) {
    for (const setting & s : rope_of(ctx)) {
        texts[prefix + s.name] = spelt(s.here);
    }
    if (has_adapters(ctx)) {
        texts[adapters] = "1";
    }
    if (rotates_far(ctx)) {
        texts[far] = "1";
    }
}

void check_context(llama_context & ctx, const std::map<std::string, std::string> & texts) {
    for (const setting & s : rope_of(ctx)) {
        const auto found = texts.find(prefix + s.name);
        const double there = found == texts.end() ? s.unsaid : strtod(found->second.c_str(), nullptr);
        if (!(std::abs(there - s.here) <= 1e-6*std::abs(s.here))) { // or not a number
            throw std::runtime_error(std::string(s.name) + " is " + spelt(s.here) + " here; accepted: " + spelt(there) + ", as the document was made with");
        }
    }
    if (rotates_far(ctx) != (texts.count(far) > 0)) {
        throw std::runtime_error("n_ctx is " + std::to_string(ctx.get_cparams().n_ctx_seq) + " here, for which this model rotates keys otherwise; accepted: " +
                (rotates_far(ctx) ? "at most " : "more than ") + std::to_string(ctx.get_model().hparams.n_ctx_orig_yarn) + ", as the document was made with");
    }
    if (has_adapters(ctx) != (texts.count(adapters) > 0)) {
        throw std::runtime_error(has_adapters(ctx) ? "a LoRA adapter is set here; accepted: none, as the document was made with"
                                                   : "no LoRA adapter is set here; accepted: the one that the document was made with");
    }
}

}
