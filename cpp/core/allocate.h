// Which candidates survive. An allocator turns scores and one budget into a number of entries per (layer, KV head);
// a selection then takes that many of each head's best. Any scorer goes with any allocator.
//
// Adding an allocator: a function and a row of the table in allocate.cpp.

#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace laprox {

// What one (layer, KV head) may keep or drop, in ascending position.
struct head_candidates {
    int32_t layer; // of the model
    int32_t head;
    std::vector<int32_t> pos;
    std::vector<float>   score;  // higher is better; NaN counts as the lowest
    std::vector<float>   second; // what decides after the first stage of a two-stage selection; empty: one stage
    int64_t n_protected = 0;     // entries that this head keeps whatever happens: counted by the profile allocator only
};

// LU-KV's table: which share of each head's entries is evicted at an overall eviction of 1% ... 99%.
struct budget_profile {
    int32_t n_layer = 0;
    int32_t n_head_kv = 0;
    std::vector<double> evicted; // [99, n_layer, n_head_kv]
};

struct allocation {
    std::vector<head_candidates> heads;   // by layer, then by head; a layer's heads are adjacent
    std::vector<double> layer_preference; // CAKE: one per layer in the order of `heads`; empty where the scorer has none
    const budget_profile * profile = nullptr;
    int64_t n_seen = 0;                   // tokens seen
    double  floor  = 0.0;                 // global allocators: share of the average that every head keeps (0 to 1)
    int     n_threads = 1;
};

// Entries per head, in the order of allocation::heads: none more than the head has candidates, and together exactly
// min(n_keep, all candidates).
using head_counts = std::vector<int64_t>;

// Answers for one allocation, which must outlive it, and any number of entries.
using counter = std::function<head_counts (int64_t n_keep)>;

struct allocator {
    const char * name;
    const char * needs; // what a scorer or the settings must bring: nullptr, "layer_preference" or "profile"
    counter (*prepare)(const allocation & a);

    head_counts count(const allocation & a, int64_t n_keep) const { return prepare(a)(n_keep); }
};

int32_t n_allocators();
const allocator & allocator_at(int32_t i);

// Throws std::invalid_argument naming the allocators there are.
const allocator & find_allocator(const std::string & name);

// For each head: the indices of its surviving candidates, ascending.
using choice = std::vector<std::vector<uint32_t>>;

// The best counts[i] candidates of each head; equal scores: the later position first. Where `second` is given, the
// first half is chosen by `score`, the rest by `second` (CriticalKV, arXiv 2502.03805: first_stage_ratio 0.5).
choice select(const std::vector<head_candidates> & heads, const head_counts & counts, int n_threads = 1);

// Share a total out in proportion to `weight` (0 where negative or not finite), at most `room` to each: largest remainders first, then the lower
// index; what full places leave over goes to the others in the same proportion (evenly once those weigh nothing).
// Sums to min(total, all room).
head_counts apportion(const std::vector<double> & weight, const head_counts & room, int64_t total);

}
