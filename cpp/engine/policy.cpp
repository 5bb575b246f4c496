#include "engine/policy.h"

#include <iterator>
#include <stdexcept>

namespace laprox {

struct preset { const char * name; const char * scorer; const char * allocator; };

static const preset presets[] = {
    { "laprox",      "laprox",      "global"  }, // arXiv 2605.07234
    { "lukv",        "laprox",      "profile" }, // 2602.08585, with LaProx as the scorer; published tables: snapkv:profile, ...
    { "snapkv",      "snapkv",      "uniform" }, // 2404.14469
    { "pyramidkv",   "snapkv",      "pyramid" }, // 2406.02069
    { "adakv",       "snapkv",      "ada"     }, // 2407.11550
    { "criticalkv",  "criticalkv",  "uniform" }, // 2502.03805; criticalkv:ada is its CriticalAda
    { "defensivekv", "defensivekv", "ada"     }, // defensivekv:global-raw is its Layer-DefensiveKV
    { "cake",        "cake",        "cake"    }, // 2503.12491
    { "lava",        "lava",        "lava"    },
    { "rkv",         "rkv",         "uniform" }, // 2505.24133
    { "tova",        "tova",        "uniform" }, // 2401.06104
    { "expected",    "expected",    "uniform" }, // 2510.00636
    { "keydiff",     "keydiff",     "uniform" }, // 2504.15364
    { "knorm",       "knorm",       "uniform" }, // 2406.11430
    { "retention",   "retention",   "global-raw" }, // 2605.09649; retention:uniform is TRIM-KV's form (2512.03324)
    { "streaming",   "streaming",   "uniform" }, // 2309.17453
    { "random",      "random",      "uniform" },
    { "custom",      "custom",      "global"  }, // laprox_set_scorer()
    { "full",        nullptr,       nullptr   },
};

int32_t n_policies() {
    return (int32_t) std::size(presets);
}

const char * policy_name(int32_t i) {
    return presets[i].name;
}

std::string policy_meaning(int32_t i) {
    return presets[i].scorer ? std::string(presets[i].scorer) + ":" + presets[i].allocator : "nothing is evicted";
}

static const char * scorer_name_at   (int32_t i) { return scorer_at(i).name; }
static const char * allocator_name_at(int32_t i) { return allocator_at(i).name; }

static void check_listed(const char * what, const std::string & name, int32_t n, const char * (*name_at)(int32_t)) {
    for (int32_t i = 0; i < n; i++) {
        if (name == name_at(i)) {
            return;
        }
    }
    throw std::invalid_argument(std::string("there is no ") + what + " \"" + name + "\"");
}

static policy compose(const std::string & text, const std::string & scorer_name, const std::string & allocator_name) {
    check_listed("scorer",    scorer_name,    n_scorers(),    scorer_name_at);
    check_listed("allocator", allocator_name, n_allocators(), allocator_name_at);
    const policy p { text, &find_scorer(scorer_name), &find_allocator(allocator_name) };
    if (p.share->needs && std::string(p.share->needs) == "layer_preference" && !p.score->has_preference) {
        throw std::invalid_argument(std::string("allocator ") + p.share->name + " shares by preferences of the layers, which scorer " +
                p.score->name + " doesn't have; cake:" + p.share->name + " works");
    }
    return p;
}

policy find_policy(const std::string & text) {
    for (const preset & p : presets) {
        if (text == p.name) {
            return p.scorer ? compose(text, p.scorer, p.allocator) : policy { text };
        }
    }
    const size_t colon = text.find(':');
    if (colon != std::string::npos) {
        return compose(text, text.substr(0, colon), text.substr(colon + 1));
    }
    for (int32_t i = 0; i < n_scorers(); i++) {
        if (text == scorer_at(i).name) {
            return compose(text, text, "uniform");
        }
    }
    throw std::invalid_argument("");
}

static std::string listed(int32_t n, const char * (*name_at)(int32_t)) {
    std::string names;
    for (int32_t i = 0; i < n; i++) {
        if (std::string(name_at(i)) != custom_scorer) {
            names += (names.empty() ? "" : ", ") + std::string(name_at(i));
        }
    }
    return names;
}

std::string accepted_policies() {
    return listed(n_policies(), policy_name) + "; <scorer> or <scorer>:<allocator> of the scorers " +
            listed(n_scorers(), scorer_name_at) + " and the allocators " + listed(n_allocators(), allocator_name_at);
}

}
