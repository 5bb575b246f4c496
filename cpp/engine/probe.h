// A probe: tokens evaluated behind a text to see what they look at in it, as KVzip does (arXiv 2505.23416) with a prompt to
// repeat the text. Its queries stand for the questions that nobody has asked yet: they score the entries in the place of an
// observation window, and are then removed again.

#pragma once

#include "laprox.h"
#include "engine/policies/policy.h"

#include <cstdint>
#include <vector>

struct llama_context;

namespace laprox {

class sequence;

// What was found so far. Belongs to the layers of a model and to a text of that length.
struct probe {
    const scorer * how;
    llama_pos n_text;   // the text: positions before that
    llama_pos n_prefix; // of these, the first so many are seen by every query
    llama_pos next;     // queries before that have been looked at
    std::vector<layer_scores> layers; // each number's highest or L2 norm over all looks; 0 where nothing looked

    int64_t n_looked = 0; // queries
    int64_t n_queries = 0; // of these, kept for a refit
    std::vector<std::vector<float>> queries = {}; // [layer]: [n_queries, d_k*n_head], as the cache's keys are; empty: none
};

// The queries since the last look score that part of the text. Throws std::runtime_error or std::invalid_argument with the reason;
// nothing has changed.
void look(llama_context & lctx, sequence & seq, const laprox_look & part);

// The sequence holds the text of that probe again, whole. Throws std::invalid_argument with the reason where it doesn't.
void look_again(sequence & seq, const probe & found);

// The scores of a text that a probe looked at, in the place of those by an observation window.
// Throws std::runtime_error where the sequence holds something else now.
std::vector<layer_scores> scores_by_probe(const sequence & seq);

}
