// A policy = a scorer (what does the output lose without this entry?) + an allocator (who keeps how many?).
// Adding a named one: a row in policy.cpp.

#pragma once

#include "core/allocate.h"
#include "engine/scorer.h"

#include <cstdint>
#include <string>

namespace laprox {

struct policy {
    std::string name;                    // as it was asked for
    const scorer    * score = nullptr;   // null: nothing is ever evicted
    const allocator * share = nullptr;
};

// The named ones.
int32_t n_policies();
const char * policy_name(int32_t i);
std::string  policy_meaning(int32_t i); // "snapkv:pyramid"

// A named policy, "<scorer>" or "<scorer>:<allocator>". Throws std::invalid_argument saying what is wrong, if that isn't plain.
policy find_policy(const std::string & text);

// Those that can be named, in words.
std::string accepted_policies();

constexpr const char * custom_scorer = "custom"; // laprox_set_scorer()

}
