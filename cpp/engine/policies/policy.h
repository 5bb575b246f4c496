// A policy = a scorer (what does the output lose without this entry?) + an allocator (who keeps how many?). Any scorer goes
// with any allocator.
//
// A scorer is a paper's, in a file of its own: a graph over one KV head's entries that runs where the cache lives and yields a few
// numbers per entry, a function on the host that makes scores of a whole layer's numbers, and a row that says so. Adding one: such
// a file, and its name in policies.cpp.

#pragma once

#include "core/allocate.h"

#include "llama.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;

namespace laprox {

class head_graph;

// A layer's numbers on the host, and the scores made of them. Entries of a head are in ascending position.
struct layer_scores {
    struct head {
        std::vector<llama_pos> pos;
        std::vector<std::vector<float>> numbers; // [n_numbers][entry], as the graph gave them
        size_t first = 0; // candidates: entries [first, last); attention sinks are before, recent tokens behind
        size_t last  = 0;

        std::vector<float> score;  // [last - first]; higher is better
        std::vector<float> second; // the same, for the second stage of a selection; empty: none
    };
    std::vector<head> heads; // KV heads
    uint32_t n_gqa = 1;      // query heads per KV head
    double preference = 0.0; // of the layer, where the scorer has one
};

enum class pooling { none, average, max };

// What the numbers of a probe's looks come to.
enum class over_looks {
    highest,
    norm, // L2: they are roots of sums over a look's queries
};

enum class need {
    nothing,     // beside the entries
    window,      // the observed queries
    all_queries, // summed up from the first token on
    gates,       // which wrote a number per entry
};

struct scorer {
    const char * name;
    const char * paper     = nullptr;   // arXiv
    const char * allocator = "uniform"; // the paper's
    need needs = need::nothing;

    // The numbers per entry: [n, n_numbers] from a graph, or one number from an entry's place. Neither: the user's own.
    int32_t n_numbers = 1;
    ggml_tensor * (*graph)(head_graph & g) = nullptr;
    float (*of_place)(int32_t layer, int32_t head, llama_pos pos) = nullptr;
    over_looks looks = over_looks::highest;
    float (*at_age)(float number, int64_t age) = nullptr; // what the number is worth when the entry is so many tokens old

    // The score: the first number, pooled over an odd number of neighbouring candidates; then what `finish` makes of it.
    pooling pool   = pooling::none;
    int32_t kernel = 1;
    void (*finish)(layer_scores & layer) = nullptr;

    bool has_preference = false; // of layers
    bool named = true;           // false: a measure, not a policy of this name

    bool needs_gates() const { return needs == need::gates; }
    bool by_queries()  const { return needs == need::window || needs == need::all_queries; }
};

struct policy {
    std::string name;                    // as it was asked for
    const scorer    * score = nullptr;   // null: nothing is ever evicted
    const allocator * share = nullptr;

    // Whether queries of a probe can stand for those of the latest tokens.
    bool probes() const { return score && score->graph && score->needs == need::window; }

    // Whether it can choose among entries that aren't held: a scorer of the user's looks at those that are.
    bool recalls() const { return score && (score->graph || score->of_place); }
};

int32_t n_scorers();
const scorer & scorer_at(int32_t i);

// The named policies.
int32_t n_policies();
const char * policy_name(int32_t i);
std::string  policy_meaning(int32_t i); // "snapkv:pyramid"

// A named policy, "<scorer>" or "<scorer>:<allocator>". Throws std::invalid_argument saying what is wrong, if that isn't plain.
policy find_policy(const std::string & text);

// Those that can be named, in words.
std::string accepted_policies();

constexpr const char * custom_scorer = "custom"; // laprox_set_scorer()

// Fills in what a layer's numbers amount to: head::score, head::second, preference.
void finish(const scorer & how, layer_scores & layer);

}
