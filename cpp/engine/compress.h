// A compression: score what a sequence holds, select what stays, compact.

#pragma once

#include <cstdint>

struct llama_context;

namespace laprox {

class sequence;

// Both throw std::runtime_error with the reason; the sequence is as it was.

// Down to its budget, if anything may be evicted.
// n_budget_seen: what a percentage refers to; more than was seen while a prompt is still coming in.
// n_least: tokens per KV head that stay in any case.
void compress(llama_context & lctx, sequence & seq, int64_t n_budget_seen, int64_t n_least);

// Fill sequence::scores.
void score(llama_context & lctx, sequence & seq);

}
