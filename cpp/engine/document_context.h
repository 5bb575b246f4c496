// What the keys and values of a document were computed with beside the model, in its texts: RoPE's settings, and LoRA adapters.

#pragma once

#include "llama.h"

#include <map>
#include <string>

namespace laprox {

void note_context(llama_context & ctx, std::map<std::string, std::string> & texts);

// Throws std::runtime_error where these are of a context that computes others. A text that isn't there is as the model has it.
void check_context(llama_context & ctx, const std::map<std::string, std::string> & texts);

}
