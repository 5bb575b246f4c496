// Whether attention runs on the device that holds the cache. Where it doesn't, for want of a kernel, keys and values of
// a layer would be copied for every token.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace laprox {

struct attention_place {
    uint32_t layer;
    uint32_t head_size;
    std::string cache;     // device that holds the layer's keys and values
    std::string attention; // device that attends to them
};

// What to tell the person at the keyboard; empty if all is where it should be.
std::string reason_misplaced(const std::vector<attention_place> & places);

}
