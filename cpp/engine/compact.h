// Moving what stays into storage of its size.

#pragma once

#include "engine/select.h"

#include <memory>
#include <vector>

struct llama_context;

namespace laprox {

class entry_source;
class layer_store;
class sequence;

// All throw std::runtime_error where the device has no room or the work fails.

// Storage of its size for a selection, with room for a tail of n_tail, filled. `biased_from`: the position from which kept entries
// will have a bias of their KV head; none: as they have now.
std::vector<std::unique_ptr<layer_store>> gather(llama_context & lctx, const entry_source & from, const selection & keep, uint32_t n_tail,
        std::optional<llama_pos> biased_from = {});

// Keep a selection, refitted to the queries of a probe that there are. Everything is allocated and filled before anything is dropped; after a failure the sequence is as it was.
void compact(llama_context & lctx, sequence & seq, const entry_source & from, const selection & keep, uint32_t n_tail);

// The same entries with room for a longer tail. One layer after the other: beside what there is, only one layer needs room twice.
// If a layer finds none, those before it have grown, which does no harm.
void grow_tail(llama_context & lctx, sequence & seq, uint32_t n_tail);

}
