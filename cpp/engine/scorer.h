// Scores of everything a stream holds, computed where the cache lives.

#pragma once

#include "engine/cache.h"

namespace laprox {

// [layer][head][held row]; rows of empty tail cells score 0. Raw: neither pooled nor normalised.
using score_table = std::vector<std::vector<std::vector<float>>>;

// Throws std::runtime_error with the reason.
score_table score_stream(llama_context & lctx, cache & kv, uint32_t strm, scorer_type type);

}
