// Scorers: what would the model's output lose without an entry?
//
// A scorer is a graph over one KV head's entries that runs where the cache lives and yields a few numbers per entry,
// and a function on the host that makes one score per entry out of a whole layer's numbers. Adding one: both, and a row
// of the table, in scorers.cpp.

#pragma once

#include "laprox.h"

#include <cstdint>
#include <string>
#include <vector>

struct ggml_tensor;
struct llama_context;

namespace laprox {

class head_graph;
class sequence;
class workbench;
struct score_source;

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
    double preference = 0.0; // CAKE's, where the scorer has one
};

enum class pooling { none, average, max };

struct scorer {
    const char * name;

    // the numbers per entry: [n, n_numbers] from a graph, or one number from an entry's place
    int32_t n_numbers;
    ggml_tensor * (*graph)(head_graph & g);
    float (*of_place)(int32_t layer, int32_t head, llama_pos pos);

    // along tokens, over the candidates' first number; where that isn't all, `finish` does it
    pooling pool;
    int32_t kernel;
    void (*finish)(layer_scores & layer);

    bool needs_queries;     // of the observation window
    bool needs_all_queries; // summed up from the first token on
    bool has_preference;    // of layers

    // gates: what the number of an entry is worth at an age of so many tokens
    float (*at_age)(float number, int64_t age);

    bool needs_gates() const { return at_age != nullptr; }
};

int32_t n_scorers();
const scorer & scorer_at(int32_t i);

// Throws std::invalid_argument naming the scorers there are.
const scorer & find_scorer(const std::string & name);

// Fills in what a layer's numbers amount to: head::score, head::second, preference.
void finish(const scorer & how, layer_scores & layer);

// The scorer of policy "custom": laprox_set_scorer().
struct user_scorer {
    laprox_scorer_callback callback = nullptr;
    void * data = nullptr;
    mutable bool running = false; // nothing else may happen to the cache meanwhile

    // Throws std::runtime_error where there is none, or it refuses.
    void call(llama_context & lctx, const sequence & seq, int32_t il, int32_t head, const std::vector<llama_pos> & pos, float * score) const;
};

// The numbers of a layer's entries.
layer_scores score_layer(workbench & bench, const score_source & from, const scorer & how);

// The numbers of everything that a sequence holds, by layer. Throws std::runtime_error with the reason.
std::vector<layer_scores> score_sequence(llama_context & lctx, const sequence & seq, const scorer & how);

}
