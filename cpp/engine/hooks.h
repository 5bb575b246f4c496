// What llama_context and the llama_memory functions of llama.h ask, whatever the kind of memory. Without a compressing
// cache in it they get stock llama.cpp's answer.

#pragma once

#include "llama.h"

#include <cstdint>

struct llama_context;
struct llama_memory_context_i;
struct llama_memory_i;
class llama_io_read_i;
class llama_io_write_i;

namespace laprox {

class cache;

// The compressing cache in a memory: it, or its part for full attention; null: there is none.
cache * cache_in(const llama_memory_i * memory);

// True: that has been dealt with, and there is nothing left for the memory to do. A call about a sequence that doesn't
// exist changes nothing. All parts of a memory agree: either they all do it or none.
bool seq_rm  (llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool & removed);
bool seq_cp  (llama_memory_i * memory, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1);
bool seq_keep(llama_memory_i * memory, llama_seq_id seq_id);
bool seq_shift(llama_memory_i * memory, const char * what);
bool seq_pos_min(llama_memory_i * memory, llama_seq_id seq_id, llama_pos & pos);
bool seq_pos_max(llama_memory_i * memory, llama_seq_id seq_id, llama_pos & pos);

// llama_memory_i::state_write and state_read. After a refusal the sequence, or all of them, is empty.
void state_write(llama_memory_i & memory, llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags);
void state_read (llama_memory_i & memory, llama_io_read_i  & io, llama_seq_id seq_id, llama_state_seq_flags flags);
// A state was refused for what is before the memory's part.
void state_refused(const llama_memory_i * memory, const char * reason);

// Graph nodes beyond the stock graph's, for llama_context::graph_max_nodes().
uint32_t extra_graph_nodes(const llama_context & ctx);

// Attention over all that mctx has room for must run where the cache is. Throws std::runtime_error with the reason.
void check_attention(llama_context & ctx, const llama_memory_context_i * mctx);

// Whether training is refused.
bool refuses_training(const llama_context & ctx);

}
