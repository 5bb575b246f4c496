// A compression: score what a sequence holds, select what stays, compact.

#pragma once

#include "engine/recall.h"

#include "llama.h"

#include <cstdint>

struct llama_context;

namespace laprox {

class sequence;

// All throw std::runtime_error with the reason; the sequence is as it was.

// Down to its budget, if anything may be evicted; what was evicted before may come back.
// n_budget_seen: what a percentage refers to; more than was seen while a prompt is still coming in.
// n_least: tokens per KV head that stay in any case.
// from: what to choose from, where an archive has more than is held.
void compress(llama_context & lctx, sequence & seq, int64_t n_budget_seen, int64_t n_least, entry_source::scope from = entry_source::scope::seen);

// The same for a turn whose tokens, from that position on, stay as they are beside the budget's entries.
void compress_turn(llama_context & lctx, sequence & seq, llama_pos from);

// Fill sequence::scores.
void score(llama_context & lctx, sequence & seq);

}
