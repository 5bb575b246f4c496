#include "core/scores.h"

#include <algorithm>

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

void normalise_layer(std::vector<std::vector<float>> & heads) {
    double sum = 0.0;
    for (const auto & head : heads) {
        for (float score : head) {
            sum += score;
        }
    }
    if (sum <= 0.0) {
        return;
    }
    for (auto & head : heads) {
        for (float & score : head) {
            score = (float) (score/sum);
        }
    }
}

}
