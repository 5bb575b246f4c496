// A policy = a scorer (what does the output lose without this entry?) + how its scores become comparable.
// Adding one: a row in policy.cpp, and for a new scorer a case in scorer.cpp.

#pragma once

#include <cstdint>
#include <string>

namespace laprox {

enum class scorer_type {
    none,     // nothing is ever evicted
    position, // later is better: attention sinks plus recent tokens (StreamingLLM, arXiv 2309.17453)
    laprox,   // what the entry adds to the attention block's output (LaProx, arXiv 2605.07234, Algorithm 1)
};

struct policy {
    const char * name;
    scorer_type  scorer;
    int32_t      pool_kernel;     // average pooling along tokens; 1: none
    bool         normalise_layer; // divide by the layer's sum before layers compete
};

int32_t n_policies();
const policy & policy_at(int32_t i);

// Throws std::invalid_argument naming the policies there are.
const policy & find_policy(const std::string & name);

}
