// StreamingLLM (arXiv 2309.17453): attention sinks plus recent tokens. Original positions are kept.

#include "engine/policies/blocks.h"

namespace laprox::policies {

static float streaming_place(int32_t, int32_t, llama_pos pos) {
    return (float) pos;
}

extern const scorer streaming {
    .name     = "streaming",
    .paper    = "2309.17453",
    .of_place = streaming_place,
};

}
