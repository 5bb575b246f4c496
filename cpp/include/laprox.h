// laprox: a KV cache that keeps, per layer and KV head, only the entries that matter.
//
// This header is the contract between the engine (compiled into libllama), llama-server and the
// Python bindings. An *entry* is one (layer, KV head, token) triple: one K row and one V row.
//
// Every function that can refuse returns false (or a negative count) and leaves the cache as it was;
// laprox_last_error() then says why, in words for the person at the keyboard.

#pragma once

#include "llama.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// Bumped when a function or a struct below changes its meaning.
#define LAPROX_API_VERSION 3

LLAMA_API int32_t laprox_api_version(void);

// The reason of this thread's last refusal; never NULL, valid until the next call on this thread.
LLAMA_API const char * laprox_last_error(void);

//
// settings
//

enum laprox_budget_unit {
    LAPROX_BUDGET_FRACTION = 0, // of the entries seen: 0 < value <= 1
    LAPROX_BUDGET_TOKENS   = 1, // average entries per (layer, KV head)
    LAPROX_BUDGET_BYTES    = 2, // bytes allocated for the cache: tail, padding and masks included
};

// The budget where none is named, as text: the one place where it is written. docs/results.md says why this one.
#define LAPROX_DEFAULT_BUDGET "20%"

struct laprox_budget {
    enum laprox_budget_unit unit;
    double value;
};

enum laprox_prefill {
    LAPROX_PREFILL_DENSE   = 0, // cache the whole prompt, then compress once; peak = full cache
    LAPROX_PREFILL_CHUNKED = 1, // compress whenever a small physical cache is full; bounded peak
};

struct laprox_params {
    const char * policy;         // one of laprox_policy_name(), or "<scorer>:<allocator>"
    struct laprox_budget budget;
    int32_t window;              // observation window: the last `window` queries score the entries
    int32_t sink;                // attention sinks: the first `sink` tokens are never evicted
    int32_t recent;              // the last `recent` tokens are never evicted (at least 1)
    int32_t min_tokens;          // nothing is evicted from a sequence of at most this many tokens
    enum laprox_prefill prefill;
    const char * profile;        // LU-KV's table (.npy) for the allocator "profile"; NULL: MODEL.kv-profile.npy beside the model
    const char * gates;          // retention gates (.gguf) for the scorer "retention"; NULL: MODEL.kv-gates.gguf beside the model
    float floor;                 // allocators global and global-raw: the share of the average that every head keeps, 0 to 1
};

LLAMA_API struct laprox_params laprox_default_params(void);

// The named policies this build has, and what they are made of. A policy is a scorer (what does the output lose without
// this entry?) and an allocator (who keeps how many under one budget?): "snapkv:ada". A scorer alone, "snapkv", is its
// paper's policy. 0 <= i < count; NULL beyond.
LLAMA_API int32_t      laprox_policy_count   (void);
LLAMA_API const char * laprox_policy_name    (int32_t i);
LLAMA_API const char * laprox_policy_meaning (int32_t i); // "snapkv:pyramid"
LLAMA_API int32_t      laprox_scorer_count   (void);
LLAMA_API const char * laprox_scorer_name    (int32_t i);
LLAMA_API int32_t      laprox_allocator_count(void);
LLAMA_API const char * laprox_allocator_name (int32_t i);

// "5%", "0.05", "2048" (tokens), "512MiB" (also KiB, GiB, kB, MB, GB). Refuses anything else, 0 and negative values.
LLAMA_API bool laprox_parse_budget(const char * text, struct laprox_budget * out);

// Turn the compressing cache on for contexts made from this model afterwards; params == NULL turns it off.
// Refuses unknown policies, values out of range, and models that can't be compressed.
LLAMA_API bool laprox_model_set_params(struct llama_model * model, const struct laprox_params * params);

// Whether this model can be compressed at all.
LLAMA_API bool laprox_model_check(const struct llama_model * model);

// Change the policy and budget of a live context. It must have been made with the compressing cache on; `prefill` and
// `gates` can't change any more, `window` can't grow, and scorer "expected" must have been there from the start.
LLAMA_API bool laprox_set_params(struct llama_context * ctx, const struct laprox_params * params);

// The context's settings; false when it was made without the compressing cache. Strings live until they change.
LLAMA_API bool laprox_get_params(const struct llama_context * ctx, struct laprox_params * out);

// The same for one sequence, instead of the context's settings; NULL: the context's again. It stays when the sequence is
// removed. A byte budget is then this sequence's alone.
LLAMA_API bool laprox_seq_set_params(struct llama_context * ctx, llama_seq_id seq_id, const struct laprox_params * params);
LLAMA_API bool laprox_seq_get_params(struct llama_context * ctx, llama_seq_id seq_id, struct laprox_params * out);

//
// compression
//

// The prompt is in: evict down to the budget and give the memory back. Succeeds without evicting when the
// sequence is within min_tokens or within its budget.
LLAMA_API bool laprox_compress(struct llama_context * ctx, llama_seq_id seq_id);

struct laprox_stats {
    int64_t tokens_seen;    // positions evaluated and not removed
    int64_t entries_held;   // (layer, KV head, token) entries in the cache
    int64_t entries_full;   // what an uncompressed cache would hold
    int64_t kv_bytes;       // allocated for K, V and their masks, tail and padding included
    int64_t kv_bytes_full;  // what llama.cpp would need to cache the tokens seen
    int64_t window_bytes;   // allocated for the observation window's queries
    int64_t compressions;
    double  score_seconds;
    double  select_seconds;
    double  compact_seconds;
};

// seq_id = -1 sums over all sequences.
LLAMA_API bool laprox_get_stats(struct llama_context * ctx, llama_seq_id seq_id, struct laprox_stats * out);

// A scorer of your own, for the policies "custom" and "custom:<allocator>": writes score[n] for the entries of one KV head,
// whose positions are pos[n], ascending; higher is better, -INFINITY is never kept while it isn't protected. It may read
// positions, entries, queries and stats. Returning false refuses the compression.
typedef bool (*laprox_scorer_callback)(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head,
                                       const llama_pos * pos, int64_t n, float * score, void * user_data);

// NULL takes it away.
LLAMA_API bool laprox_set_scorer(struct llama_context * ctx, laprox_scorer_callback callback, void * user_data);

// The first position from which on every head still holds everything: 0 if nothing was evicted, -1 if refused. Removing
// positions from there to the end succeeds (of hybrid models, the recurrent part may still refuse); what is before can only
// go as a whole.
LLAMA_API llama_pos laprox_tail_begin(struct llama_context * ctx, llama_seq_id seq_id);

// How many positions the sequence had when entries were last chosen: 0 if all are held, -1 if refused. They were chosen
// for these tokens, whose last ones may be a question, so only a prompt that begins with all of them can go on from what is
// held; any other has to be evaluated from its start. Saved states carry it.
LLAMA_API llama_pos laprox_compressed_for(struct llama_context * ctx, llama_seq_id seq_id);

//
// looking inside
//

// Names a model's shape and training, whatever it was quantised to: 16 hexadecimal digits over its norms and sizes.
// Files made for one model (profiles, gates) carry it. Returns false if the model has no attention norms.
LLAMA_API bool laprox_model_fingerprint(const struct llama_model * model, char out[17]);

// The layers that are compressed (sliding-window layers, say, are not). Returns their number and writes at
// most `cap` of them, and the KV heads of each.
LLAMA_API int32_t laprox_layers(struct llama_context * ctx, int32_t * il, int32_t * n_head_kv, int32_t cap);

// Heads of a compressed layer; pointers may be NULL. Refuses a layer that isn't compressed.
LLAMA_API bool laprox_head_shape(struct llama_context * ctx, int32_t il, int32_t * n_head, int32_t * n_embd_head_k, int32_t * n_embd_head_v);

// What a layer multiplies q k^T with before the softmax; 0 if refused.
LLAMA_API float laprox_kq_scale(struct llama_context * ctx, int32_t il);

// Ascending positions held for a KV head. Returns their number and writes at most `cap`; -1 if refused.
LLAMA_API int64_t laprox_positions(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head,
                                   llama_pos * pos, int64_t cap);

// Score everything held by the sequence with the current policy and observation window. Evicts nothing.
LLAMA_API bool laprox_score(struct llama_context * ctx, llama_seq_id seq_id);

// Result of the last laprox_score() for a KV head, aligned with laprox_positions(): raw scores, before pooling and
// normalisation, and before the heads of a layer are looked at together. Returns their number, -1 if there are none for what is
// held now.
LLAMA_API int64_t laprox_scores(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head,
                                float * score, int64_t cap);

// The same, finished: what a KV head's entries are ranked by, pooled, and with the heads of a layer looked at together where the
// scorer does so. NaN for what is never ranked: attention sinks and recent tokens. Where a selection has two stages
// (criticalkv), those of the first.
LLAMA_API int64_t laprox_finished_scores(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head,
                                         float * score, int64_t cap);

// K rows [n, n_embd_head_k] and V rows [n, n_embd_head_v] of a KV head as float32, aligned with laprox_positions()
// and without the rotation that llama.cpp applies to quantised caches. Either pointer may be NULL.
// Returns n, writes nothing if n > cap.
LLAMA_API int64_t laprox_entries(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head,
                                 float * k, float * v, int64_t cap);

// The observed queries of a layer, oldest first: float32 [n, n_head, n_embd_head_k], after RoPE, and their positions.
// Returns n <= window, writes nothing if n > cap.
LLAMA_API int64_t laprox_queries(struct llama_context * ctx, llama_seq_id seq_id, int32_t il,
                                 float * q, llama_pos * pos, int64_t cap);

#ifdef __cplusplus
}
#endif
