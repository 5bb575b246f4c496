// Layers that can't go back by themselves: a recurrent state has been overwritten by what came later, and a sliding window has let
// go of what is before. What they held at a position is kept, so that text that came after it can be taken back.

#pragma once

#include "llama.h"

#include <cstdint>
#include <vector>

class llama_memory_i;

namespace laprox {

class mark {
public:
    // What these layers of a sequence hold now.
    mark(const llama_memory_i & parts, llama_seq_id seq_id);

    llama_pos pos() const { return next; } // what comes from here on can be taken back

    // They hold that again. Throws std::runtime_error where they have no room; they may hold anything then.
    void restore(llama_memory_i & parts, llama_seq_id seq_id) const;

private:
    llama_pos            next;
    std::vector<uint8_t> state;
};

}
