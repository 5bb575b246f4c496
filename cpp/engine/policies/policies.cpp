// The list of policies.

#include "engine/policies/blocks.h"

#include <iterator>
#include <stdexcept>

namespace laprox {

namespace policies {

extern const scorer laprox, snapkv, criticalkv, defensivekv, cake, lava, rkv, tova, kvzip, energy, expected, keydiff, knorm, retention, streaming, random,
    oracle, vnorm;

static const scorer custom { .name = custom_scorer, .allocator = "global" }; // laprox_set_scorer()

}

static const scorer * const scorers[] = {
    &policies::laprox, &policies::snapkv, &policies::criticalkv, &policies::defensivekv, &policies::cake, &policies::lava, &policies::rkv,
    &policies::tova, &policies::kvzip, &policies::energy, &policies::expected, &policies::keydiff, &policies::knorm, &policies::retention, &policies::streaming, &policies::random,
    &policies::custom, &policies::oracle, &policies::vnorm,
};

// Papers that share another one's scores out in their own way.
struct alias { const char * name; const char * scorer; const char * allocator; };

static const alias aliases[] = {
    { "lukv",      "laprox", "profile" }, // arXiv 2602.08585, with LaProx as the scorer; published tables: snapkv:profile, ...
    { "pyramidkv", "snapkv", "pyramid" }, // 2406.02069
    { "adakv",     "snapkv", "ada"     }, // 2407.11550
};

// Each scorer by the paper's allocator, then its aliases; and "full", which has none.
static const std::vector<alias> & named() {
    static const std::vector<alias> list = [] {
        std::vector<alias> result;
        for (const scorer * s : scorers) {
            if (s->named) {
                result.push_back({ s->name, s->name, s->allocator });
            }
            for (const alias & a : aliases) {
                if (std::string(a.scorer) == s->name) {
                    result.push_back(a);
                }
            }
        }
        result.push_back({ "full", nullptr, nullptr });
        return result;
    }();
    return list;
}

int32_t n_scorers() {
    return (int32_t) std::size(scorers);
}

const scorer & scorer_at(int32_t i) {
    return *scorers[i];
}

int32_t n_policies() {
    return (int32_t) named().size();
}

const char * policy_name(int32_t i) {
    return named()[i].name;
}

std::string policy_meaning(int32_t i) {
    const alias & a = named()[i];
    return a.scorer ? std::string(a.scorer) + ":" + a.allocator : "nothing is evicted";
}

static const char * scorer_name_at   (int32_t i) { return scorer_at(i).name; }
static const char * allocator_name_at(int32_t i) { return allocator_at(i).name; }

static int32_t place_of(const char * what, const std::string & name, int32_t n, const char * (*name_at)(int32_t)) {
    for (int32_t i = 0; i < n; i++) {
        if (name == name_at(i)) {
            return i;
        }
    }
    throw std::invalid_argument(std::string("there is no ") + what + " \"" + name + "\"");
}

static policy compose(const std::string & text, const std::string & scorer_name, const std::string & allocator_name) {
    const scorer & score = scorer_at(place_of("scorer", scorer_name, n_scorers(), scorer_name_at));
    const policy p { text, &score, &allocator_at(place_of("allocator", allocator_name, n_allocators(), allocator_name_at)) };
    if (p.share->needs && std::string(p.share->needs) == "layer_preference" && !p.score->has_preference) {
        throw std::invalid_argument(std::string("allocator ") + p.share->name + " shares by preferences of the layers, which scorer " +
                p.score->name + " doesn't have; cake:" + p.share->name + " works");
    }
    return p;
}

policy find_policy(const std::string & text) {
    for (const alias & a : named()) {
        if (text == a.name) {
            return a.scorer ? compose(text, a.scorer, a.allocator) : policy { text };
        }
    }
    const size_t colon = text.find(':');
    if (colon != std::string::npos) {
        return compose(text, text.substr(0, colon), text.substr(colon + 1));
    }
    for (const scorer * s : scorers) {
        if (text == s->name) {
            return compose(text, s->name, s->allocator);
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

void finish(const scorer & how, layer_scores & layer) {
    for (auto & h : layer.heads) {
        h.score = policies::pooled(h, h.numbers[0], how.pool, how.kernel);
    }
    if (how.finish) {
        how.finish(layer);
    }
}

}
