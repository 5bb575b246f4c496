#include "core/classes.h"

#include <algorithm>
#include <limits>
#include <numeric>

namespace laprox {

std::vector<length_class> plan_classes(const std::vector<uint32_t> & n_kept, uint32_t max_classes, uint32_t block,
                                       double slack) {
    const size_t n = n_kept.size();
    max_classes = std::min<uint32_t>(max_classes, n);

    std::vector<uint32_t> order(n);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return n_kept[a] < n_kept[b]; });

    const auto padded = [&](size_t i) { return (uint64_t) (n_kept[order[i]] + block - 1)/block*block; };

    uint64_t exact = 0;
    for (size_t i = 0; i < n; i++) {
        exact += padded(i);
    }

    // cost[c][i]: rows stored for the i shortest heads in c classes; a class stores its longest head's length for all
    const uint64_t infinite = std::numeric_limits<uint64_t>::max();
    std::vector<std::vector<uint64_t>> cost(max_classes + 1, std::vector<uint64_t>(n + 1, infinite));
    std::vector<std::vector<size_t>>   from(max_classes + 1, std::vector<size_t>(n + 1, 0));
    cost[0][0] = 0;
    uint32_t used = 0;
    for (uint32_t c = 1; c <= max_classes; c++) {
        for (size_t i = 1; i <= n; i++) {
            for (size_t j = 0; j < i; j++) {
                if (cost[c - 1][j] == infinite) {
                    continue;
                }
                const uint64_t rows = cost[c - 1][j] + (i - j)*padded(i - 1);
                if (rows < cost[c][i]) {
                    cost[c][i] = rows;
                    from[c][i] = j;
                }
            }
        }
        used = c;
        if ((double) cost[c][n] <= (1.0 + slack)*(double) exact) {
            break;
        }
    }

    std::vector<length_class> classes;
    for (size_t i = n; used > 0; i = from[used][i], used--) {
        length_class cls;
        cls.heads.assign(order.begin() + from[used][i], order.begin() + i);
        cls.n_rows = (uint32_t) padded(i - 1);
        std::sort(cls.heads.begin(), cls.heads.end());
        classes.push_back(std::move(cls));
    }
    std::sort(classes.begin(), classes.end(), [](const length_class & a, const length_class & b) {
        return a.heads.front() < b.heads.front();
    });
    return classes;
}

bool in_head_order(const std::vector<length_class> & classes) {
    uint32_t next = 0;
    for (const auto & cls : classes) {
        for (uint32_t head : cls.heads) {
            if (head != next++) {
                return false;
            }
        }
    }
    return true;
}

}
