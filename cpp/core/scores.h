// From raw scores to scores that can be compared over the whole model.

#pragma once

#include "core/ranking.h"

#include <cstddef>
#include <vector>

namespace laprox {

// Average over `kernel` neighbours (odd) in the order given, zero-padded at both ends and always divided by
// `kernel`, as SnapKV and LaProx do. Sums in double, so that the result does not depend on the compiler.
std::vector<float> average_pool(const float * score, size_t n, int kernel);

// Maximum over the neighbours that there are, of `kernel` (odd). A NaN never wins.
std::vector<float> max_pool(const float * score, size_t n, int kernel);

// Divide by the sum over all heads of a layer: what an entry weighs among its layer's candidates (LaProx,
// Algorithm 2). Where scores are negative (minus a norm or a cosine), the layer's lowest becomes 0 first. Infinities
// and NaN stay what they are and count for nothing in the sum. A layer whose scores are all equal to 0 stays 0.
void normalise_layer(std::vector<std::vector<float>> & heads);

// What it subtracts and divides by.
layer_scale scale_of_layer(const std::vector<const std::vector<float> *> & heads);

}
