// A control: what chance keeps.

#include "engine/policies/blocks.h"

namespace laprox::policies {

// A fixed draw per entry (SplitMix64), so that a run can be repeated.
static float random_place(int32_t layer, int32_t head, llama_pos pos) {
    uint64_t x = ((uint64_t) layer << 48) ^ ((uint64_t) head << 32) ^ (uint64_t) (uint32_t) pos;
    x += 0x9e3779b97f4a7c15ull;
    x = (x ^ (x >> 30))*0xbf58476d1ce4e5b9ull;
    x = (x ^ (x >> 27))*0x94d049bb133111ebull;
    x ^= x >> 31;
    return (float) (x >> 40)/(float) (1 << 24);
}

extern const scorer random {
    .name     = "random",
    .of_place = random_place,
};

}
