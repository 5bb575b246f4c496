// The observation window of a sequence: the queries of its latest tokens, in a ring of slots.

#pragma once

#include "engine/store.h"

#include "llama.h"

#include <cstdint>
#include <utility>
#include <vector>

namespace laprox {

// Observed queries, oldest first.
struct observed {
    std::vector<uint32_t>  slot;
    std::vector<llama_pos> pos;
};

class query_window {
public:
    // Throws std::runtime_error where a device has no room for them.
    query_window(const std::vector<layer_info> & layers, int32_t n_observed, uint32_t n_slots);

    using positions = std::vector<llama_pos>; // of the query in each slot; -1: none

    const positions & get_positions() const { return position; }
    void set_positions(positions before) { position = std::move(before); }
    void clear();
    void remove(llama_pos p0, llama_pos p1);
    void copy(const query_window & from);

    // Slots for n tokens more: empty ones, then the oldest. What was there is gone.
    std::vector<uint32_t> take(const llama_pos * pos, size_t n);

    // The latest, at most n.
    observed latest(size_t n) const;

    layer_tensors rows; // F32 [d_k*n_head, n_slots]
    const uint32_t n_slots;

private:
    positions position;
};

}
