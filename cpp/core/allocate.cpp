#include "core/allocate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <tuple>

namespace laprox {

static float rank_of(float score) {
    return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
}

choice allocate_global(const std::vector<head_candidates> & heads, int64_t n_keep) {
    choice kept(heads.size());

    std::vector<float> ranks;
    for (const auto & h : heads) {
        for (float score : h.score) {
            ranks.push_back(rank_of(score));
        }
    }
    n_keep = std::clamp<int64_t>(n_keep, 0, (int64_t) ranks.size());
    if (n_keep == 0) {
        return kept;
    }

    // The n-th best score splits the candidates into kept, dropped and a few equal ones; sorting only the latter
    // keeps the selection linear in the number of entries of the model.
    std::nth_element(ranks.begin(), ranks.begin() + (n_keep - 1), ranks.end(), std::greater<float>());
    const float threshold = ranks[n_keep - 1];

    struct tie { int32_t pos; int32_t layer; int32_t head; size_t row; uint32_t index; };
    std::vector<tie> ties;
    for (size_t row = 0; row < heads.size(); row++) {
        const auto & h = heads[row];
        for (uint32_t i = 0; i < h.score.size(); i++) {
            const float rank = rank_of(h.score[i]);
            if (rank > threshold) {
                kept[row].push_back(i);
                n_keep--;
            } else if (rank == threshold) {
                ties.push_back({ h.pos[i], h.layer, h.head, row, i });
            }
        }
    }

    std::sort(ties.begin(), ties.end(), [](const tie & a, const tie & b) {
        return std::tie(b.pos, a.layer, a.head, a.index) < std::tie(a.pos, b.layer, b.head, b.index);
    });
    for (int64_t i = 0; i < n_keep; i++) {
        kept[ties[i].row].push_back(ties[i].index);
    }
    for (auto & indices : kept) {
        std::sort(indices.begin(), indices.end());
    }
    return kept;
}

}
