#include "core/scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace laprox {

std::vector<float> average_pool(const float * score, size_t n, int kernel) {
    std::vector<float> pooled(n);
    const size_t half = (size_t) kernel/2;
    for (size_t i = 0; i < n; i++) {
        const size_t begin = i > half ? i - half : 0;
        const size_t end   = std::min(n, i + half + 1);
        double sum = 0.0;
        for (size_t j = begin; j < end; j++) {
            sum += score[j];
        }
        pooled[i] = (float) (sum/kernel);
    }
    return pooled;
}

std::vector<float> max_pool(const float * score, size_t n, int kernel) {
    std::vector<float> pooled(n, -std::numeric_limits<float>::infinity());
    const size_t half = (size_t) kernel/2;
    for (size_t i = 0; i < n; i++) {
        const size_t begin = i > half ? i - half : 0;
        const size_t end   = std::min(n, i + half + 1);
        for (size_t j = begin; j < end; j++) {
            pooled[i] = std::max(pooled[i], score[j]); // in this order a NaN never wins
        }
    }
    return pooled;
}

layer_scale scale_of_layer(const std::vector<const std::vector<float> *> & heads) {
    layer_scale scale;
    for (const auto * head : heads) {
        for (float score : *head) {
            if (std::isfinite(score)) {
                scale.lowest = std::min(scale.lowest, (double) score);
            }
        }
    }
    double sum = 0.0;
    for (const auto * head : heads) {
        for (float score : *head) {
            sum += std::isfinite(score) ? score - scale.lowest : 0.0;
        }
    }
    scale.unit = sum > 0.0 ? sum : 1.0;
    return scale;
}

void normalise_layer(std::vector<std::vector<float>> & heads) {
    std::vector<const std::vector<float> *> scores;
    for (const auto & head : heads) {
        scores.push_back(&head);
    }
    const layer_scale scale = scale_of_layer(scores);
    for (auto & head : heads) {
        for (float & score : head) {
            score = scale.value(score);
        }
    }
}

}
