// Scoring: a scorer's numbers for what a sequence, or a store of a layer, holds.

#pragma once

#include "laprox.h"
#include "engine/policies/policy.h"

#include <cstdint>
#include <vector>

struct llama_context;

namespace laprox {

class entry_source;
class sequence;
class workbench;
struct score_source;
struct settings;

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

// The numbers of all entries, by layer. Throws std::runtime_error with the reason.
std::vector<layer_scores> score_entries(llama_context & lctx, const entry_source & from, const scorer & how);

// The scores of a layer's candidates: what is neither an attention sink nor recent, which are the last `n_recent` tokens and, where a
// cut has left fewer in the tail, what is kept of those before.
void finish(const sequence & seq, uint32_t n_recent, layer_scores & layer);

}
