// Ridge regression in float64.

#pragma once

#include <cstdint>
#include <vector>

namespace laprox {

// Solves (gram + ridge*I) x = right side. gram: symmetric [n, n], positive semidefinite up to rounding; right: n numbers for each of
// n_right sides, one after the other, as the result is. ridge > 0.
std::vector<float> solve_ridge(const std::vector<float> & gram, int64_t n, double ridge, const std::vector<float> & right);

}
