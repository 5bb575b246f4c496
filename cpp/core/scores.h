// From raw scores to scores that can be compared over the whole model.

#pragma once

#include <cstddef>
#include <vector>

namespace laprox {

// Average over `kernel` neighbours (odd) in the order given, zero-padded at both ends and always divided by
// `kernel`, as SnapKV and LaProx do. Sums in double, so that the result does not depend on the compiler.
std::vector<float> average_pool(const float * score, size_t n, int kernel);

// Divide by the sum over all heads of a layer: what an entry weighs among its layer's candidates (LaProx,
// Algorithm 2). A layer whose scores are all 0 stays 0.
void normalise_layer(std::vector<std::vector<float>> & heads);

}
