// Which candidates survive: allocators turn scores and one budget into a choice per (layer, KV head).

#pragma once

#include <cstdint>
#include <vector>

namespace laprox {

// The candidates of one (layer, KV head), in ascending position.
struct head_candidates {
    int32_t layer;
    int32_t head;
    std::vector<int32_t> pos;
    std::vector<float>   score;
};

// For each head: the indices of its surviving candidates, ascending.
using choice = std::vector<std::vector<uint32_t>>;

// The best `n_keep` candidates of the whole model (LaProx, Algorithm 2). Equal scores: the later position first,
// then the lower layer, then the lower head. NaN counts as the lowest score.
choice allocate_global(const std::vector<head_candidates> & heads, int64_t n_keep);

}
