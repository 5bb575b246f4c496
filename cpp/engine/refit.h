// Refitting what stays after a selection, so that attention over it reproduces attention over all: per KV head, one bias for the
// mass that went, and the values by ridge regression towards what they were. After Attention Matching (arXiv 2602.16284), whose
// plain least squares and biases per key destroy answers of small models; the ridge must not be scaled by the data either.

#pragma once

#include "engine/select.h"

#include <memory>
#include <vector>

struct llama_context;

namespace laprox {

class layer_store;

// `fresh`: storage with biases of 0 that holds the selection. Each KV head is fitted to four fifths of the probe's queries, and
// changed if that makes its output for the others better. Throws std::runtime_error where there is no room for the work.
void refit(llama_context & lctx, const sequence & seq, const selection & keep, std::vector<std::unique_ptr<layer_store>> & fresh);

}
