#include "core/inserted.h"

#include <algorithm>

namespace laprox {

// So many equal bytes aren't a coincidence.
static const size_t n_telling = 32;

std::vector<std::pair<size_t, size_t>> find_inserted(const std::string & text, const std::string & without) {
    std::vector<std::pair<size_t, size_t>> inserted;
    size_t i = 0, j = 0;
    while (i < text.size()) {
        if (j < without.size() && text[i] == without[j]) {
            i++;
            j++;
            continue;
        }
        // where the two go on together; what was inserted may begin as this does, and then ends as far behind
        const size_t n = std::min(n_telling, without.size() - j);
        const size_t again = n == 0 ? text.size() : text.find(without.c_str() + j, i, n);
        if (again == std::string::npos) {
            return {};
        }
        inserted.emplace_back(i, again);
        i = again;
    }
    return j == without.size() ? inserted : std::vector<std::pair<size_t, size_t>>();
}

}
