// One ranking over many heads: each head's candidates are sorted once, and then any number of questions are answered by
// binary searches.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace laprox {

struct head_candidates;

// What a layer's scores are worth beside other layers': (score - lowest)/unit.
struct layer_scale {
    double lowest = 0.0;
    double unit   = 1.0;

    float value(float score) const;
};

// Takes 8 bytes per candidate, and as much for one head per thread while it is made.
class ranking {
public:
    // By the scores as they are.
    ranking(const head_candidates * begin, const head_candidates * end, int n_threads);
    // By what they are worth in their layer: one scale per head.
    ranking(const head_candidates * begin, const head_candidates * end, std::vector<layer_scale> scales, int n_threads);

    // How many of each head's candidates are among the best n_keep of all; equal ones: later position, then lower layer,
    // then lower head. Every head first takes its best `floor` times the average (0 to 1).
    std::vector<int64_t> best(int64_t n_keep, double floor = 0.0) const;

private:
    struct entry { uint32_t order; uint32_t index; }; // ascending: the better, then the later one

    size_t count_above(size_t row, size_t first, uint32_t value) const;
    uint32_t value_of(size_t row, size_t i) const;
    void share_ties(std::vector<int64_t> & counts, const std::vector<size_t> & begin, const std::vector<size_t> & end, int64_t n) const;
    void sort(int n_threads);

    const head_candidates * heads;
    std::vector<layer_scale> scales; // empty: scores as they are
    std::vector<std::vector<entry>> sorted; // by head
};

}
