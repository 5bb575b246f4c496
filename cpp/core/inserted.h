// What one text has and another hasn't.

#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace laprox {

// Where `text` has more than `without`: first byte and first byte behind, ascending. Nothing where `without` has something that
// `text` hasn't, too.
std::vector<std::pair<size_t, size_t>> find_inserted(const std::string & text, const std::string & without);

}
