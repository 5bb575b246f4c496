// What llama_context asks, whatever the kind of memory. Without a compressing cache in it it gets stock llama.cpp's answer.

#pragma once

#include "llama.h"

#include <cstdint>

struct llama_context;
struct llama_cparams;
struct llama_memory_context_i;
struct llama_memory_i;
struct llama_model;

namespace laprox {

class cache;

// The compressing cache in a memory: it, or its part for full attention; null: there is none.
cache * cache_in(const llama_memory_i * memory);

// Several sequences in one cache each keep their own entries, so each gets a stream of its own even where
// --kv-unified asked for a common pool; storage is allocated as they grow. Throws std::runtime_error where the context
// would read the compressed cache of another one.
void adjust_cparams(const llama_model & model, llama_cparams & cparams);

// What a context shows of its memory: see whole_memory.h.
llama_memory_i * memory_of(llama_memory_i * parts);

// A state was refused for what is before the memory's part.
void state_refused(const llama_memory_i * memory, const char * reason);

// Graph nodes beyond the stock graph's, for llama_context::graph_max_nodes().
uint32_t extra_graph_nodes(const llama_context & ctx);

// Attention over all that mctx has room for must run where the cache is. Throws std::runtime_error with the reason.
void check_attention(llama_context & ctx, const llama_memory_context_i * mctx);

// Whether training is refused.
bool refuses_training(const llama_context & ctx);

}
