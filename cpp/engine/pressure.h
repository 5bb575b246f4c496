// Room for tokens to come: how long a tail may be, and what is done when a batch finds none.

#pragma once

struct llama_context;

namespace laprox {

class sequence;

// Whether text has been generated long enough since the last compression to be compressed itself, so that a generation
// of any length stays within its budget and a tail.
bool overgrown(const sequence & seq);

// Room for the tokens that found none: a longer tail, or a compression. Throws std::runtime_error where there is neither.
void make_room(llama_context & lctx, sequence & seq);

}
