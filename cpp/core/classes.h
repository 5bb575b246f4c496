// Heads of similar length share one attention call; the rows they are padded to are the price.

#pragma once

#include <cstdint>
#include <vector>

namespace laprox {

struct length_class {
    std::vector<uint32_t> heads; // ascending
    uint32_t n_rows;             // rows stored for each of them
};

// Group the KV heads of one layer into at most `max_classes` classes, padded to a multiple of `block` rows.
// Fewest classes whose padding stays within `slack` of the rows stored exactly; the optimum for that number.
// Classes come in the order of their first head when each is a run of neighbours, so that no gather is needed.
std::vector<length_class> plan_classes(const std::vector<uint32_t> & n_kept, uint32_t max_classes, uint32_t block,
                                       double slack = 0.05);

// Whether every class is a run of neighbouring heads and the classes are in head order.
bool in_head_order(const std::vector<length_class> & classes);

}
