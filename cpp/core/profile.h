// LU-KV (arXiv 2602.08585): head budgets solved offline from what a head's entries turned out to be worth.

#pragma once

#include "core/allocate.h"

#include <cstdint>
#include <vector>

namespace laprox {

static const int32_t profile_rows = 99; // overall eviction of 1% ... 99%

// What one (layer, KV head) of a calibration pair looked like. Both in the order of positions, without protected ones.
struct head_utility {
    std::vector<float> score;   // of the scorer that will choose at run time
    std::vector<float> utility; // what each entry was worth later: the oracle
};

// The share of entries to evict from each head, [99, n_heads] row-major, for one calibration pair (section 3 of the
// paper): a head's entries are discarded in the scorer's order, at the non-decreasing marginal cost that
// isotonic regression (the lower convex hull of the cumulative loss) makes of their utility; one greedy over all heads
// takes the cheapest next discard. n_tokens: entries per head, protected ones included; min_keep: entries every head
// keeps. Rows that are out of reach hold the uniform share. Equal costs: the head that has given least so far, then the
// earlier in the list; equal scores within a head: the earlier position. Throws std::invalid_argument on utilities that
// are not finite and on lengths that do not fit together.
std::vector<double> solve_profile(const std::vector<head_utility> & heads, int64_t n_tokens, int64_t min_keep);

// Non-decreasing least-squares fit (pool adjacent violators).
std::vector<double> isotonic_increasing(const std::vector<double> & y);

}
