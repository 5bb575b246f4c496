// From scores to the rows that stay: candidates, how many each head keeps of them, and which.

#pragma once

#include "engine/scoring.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

namespace laprox {

struct selection {
    std::vector<std::vector<std::vector<uint32_t>>> rows; // [layer][head]: held rows that stay, ascending
    std::vector<uint32_t> cells;                          // tail cells that stay in the tail
};

// What may stay, attention sinks and recent tokens included, protected ones not.
struct quota {
    int64_t n_entries;             // at most
    int64_t n_room;                // that the context has for all
    std::optional<size_t> n_bytes; // and no more than that, with padding and a tail of n_tail; none: any
    uint32_t n_tail;
    uint32_t n_recent; // the latest tokens, which stay as they are

    // At most, with protected ones beside, as far as there is room.
    int64_t with(int64_t n_protected) const { return std::min(n_entries + n_protected, std::max(n_entries, n_room)); }
};

// Throws std::runtime_error where not even what is never evicted has room.
selection choose(const entry_source & from, std::vector<layer_scores> scores, const quota & most, int n_threads);

}
