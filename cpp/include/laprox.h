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
#define LAPROX_API_VERSION 4

LLAMA_API int32_t laprox_api_version(void);

// The reason of this thread's last refusal; never NULL, valid until the next call on this thread.
LLAMA_API const char * laprox_last_error(void);

//
// settings
//

// One setting: what it is called, what can be given, and what it does. Everything is text that stays as long as the library.
struct laprox_option {
    const char * name;     // "min_tokens"; --kv-min-tokens and LLAMA_ARG_KV_MIN_TOKENS to llama-server
    const char * kind;     // "policy", "budget", "integer", "number", "choice" or "path"
    const char * initial;  // where none is given; of a path "": the file beside the model
    const char * accepted; // "an integer from 1 to 1024"
    const char * value;    // stands for the value in `help` and in usage lines: "N"
    const char * help;
};

// The settings there are. 0 <= i < count; zeroes beyond.
LLAMA_API int32_t              laprox_option_count(void);
LLAMA_API struct laprox_option laprox_option_at   (int32_t i);

// A text for each setting.
struct laprox_params;

// All as they are where none is given. `before_names` stands before the names of settings in refusals, as the user knows them:
// NULL (window), "kv_" or "--kv-" (ending with a -, in the names, too: --kv-min-tokens). To be freed; NULL is never returned.
LLAMA_API struct laprox_params * laprox_params_new (const char * before_names);
LLAMA_API void                   laprox_params_free(struct laprox_params * params);

// Set one by its name; text == NULL: as where none is given. Refuses what isn't accepted, and leaves it as it was.
//   budget: "5%" or "0.05" of the entries seen, "2048" tokens on average per (layer, KV head), or "512MiB" (also KiB, GiB, kB, MB,
//           GB) allocated for the cache: tail, padding and masks included
//   policy: one of laprox_policy_name(), a scorer, or "<scorer>:<allocator>"; "off": laprox_model_set_params turns the cache off
LLAMA_API bool laprox_params_set(struct laprox_params * params, const char * name, const char * text);

// The policy "custom:<allocator>": a scorer of your own, which laprox_set_scorer() gives to each context.
LLAMA_API bool laprox_params_set_custom(struct laprox_params * params, const char * allocator);

// The text in force; NULL if there is no such setting. Stays until it is set again.
LLAMA_API const char * laprox_params_get(const struct laprox_params * params, const char * name);

// Whether the settings go together, which takes no model: a budget in tokens holds what is never evicted.
LLAMA_API bool laprox_params_check(const struct laprox_params * params);

// The named policies this build has, and what they are made of. A policy is a scorer (what does the output lose without
// this entry?) and an allocator (who keeps how many under one budget?): "snapkv:ada". A scorer alone, "snapkv", is its
// paper's policy. 0 <= i < count; NULL beyond.
LLAMA_API int32_t      laprox_policy_count   (void);
LLAMA_API const char * laprox_policy_name    (int32_t i);
LLAMA_API const char * laprox_policy_meaning (int32_t i); // "snapkv:pyramid"
// Whether a policy scores by the latest queries, so that those of a probe (below) can stand for them; false of what is no policy.
LLAMA_API bool         laprox_policy_probes  (const char * policy);
LLAMA_API int32_t      laprox_scorer_count   (void);
LLAMA_API const char * laprox_scorer_name    (int32_t i);
LLAMA_API int32_t      laprox_allocator_count(void);
LLAMA_API const char * laprox_allocator_name (int32_t i);

// Turn the compressing cache on for contexts made from this model afterwards; params == NULL, or policy "off", turns it off.
// Refuses unknown policies, values out of range, and models that can't be compressed.
LLAMA_API bool laprox_model_set_params(struct llama_model * model, const struct laprox_params * params);

// Whether this model can be compressed at all.
LLAMA_API bool laprox_model_check(const struct llama_model * model);

// Change the policy and budget of a live context. It must have been made with the compressing cache on; `prefill` and
// `gates` can't change any more, `window` can't grow, and scorer "expected" must have been there from the start.
LLAMA_API bool laprox_set_params(struct llama_context * ctx, const struct laprox_params * params);

// A copy of the context's settings, to be freed; NULL when it was made without the compressing cache.
LLAMA_API struct laprox_params * laprox_get_params(const struct llama_context * ctx);

// The same for one sequence, instead of the context's settings; NULL: the context's again. It stays when the sequence is
// removed. A byte budget is then this sequence's alone.
LLAMA_API bool laprox_seq_set_params(struct llama_context * ctx, llama_seq_id seq_id, const struct laprox_params * params);
LLAMA_API struct laprox_params * laprox_seq_get_params(struct llama_context * ctx, llama_seq_id seq_id);

//
// compression
//

// Evict down to the budget now and give the memory back. Succeeds without evicting when the sequence is within min_tokens
// or within its budget.
LLAMA_API bool laprox_compress(struct llama_context * ctx, llama_seq_id seq_id);

// What is evaluated after this can be taken back (llama_memory_seq_rm from here on), whatever the layers: recurrent ones and sliding
// windows, which can't go back by themselves, keep a copy of what they hold, in host memory. A sequence has one such mark, the latest.
LLAMA_API bool laprox_mark(struct llama_context * ctx, llama_seq_id seq_id);

// The prompt is in, and what is evaluated next is generated: compress if it is time. What came since the last compression
// stays exact until it is more than min_tokens; but where entries were chosen while the prompt came in, its end, the question,
// has its say, too. To be called after every prompt, also one that goes on with what is held.
//
// Where entries were evicted before and an archive has them, those that this prompt needs come back, by its last queries.
// Then *again is the first position, at most n_again before the end, that has been cut off for the caller to evaluate again, on
// what is held now; after that the function is to be called again with it, until it is -1, as it has to be at the first call
// for a prompt, and is after one that fails. n_again = 0: nothing is cut off. Where there are recurrent layers, nothing is either,
// unless laprox_mark() was called before what is to be cut off was evaluated. Where entries can't come back for want of room, it succeeds
// without, and laprox_last_error() says so.
LLAMA_API bool laprox_prompt_done(struct llama_context * ctx, llama_seq_id seq_id, int32_t n_again, llama_pos * again);

// A look of a probe: tokens evaluated behind a text to see what they look at in it, in the place of questions that nobody has asked
// yet. Positions.
struct laprox_look {
    llama_pos n_text;   // the text: everything before
    llama_pos n_prefix; // its beginning, which every query sees (a chat template's)
    llama_pos first;    // the part of the text, [first, last), that these tokens are about
    llama_pos last;
    int32_t   every;    // > 0: the queries of every so many-th of these tokens are kept for a refit
    int32_t   stride;   // > 1: only the queries of every so many-th of these tokens score; the others are only seen
};

// The tokens at n_text and behind, as many as were evaluated since the last look, at most `window`, score the prefix and that part:
// they compete for attention with each other, and the rest of the text is out of it. Over all looks the highest score counts, or where
// scores are norms, their norm. Then the probe's tokens are to be removed (llama_memory_seq_rm from n_text on), which another look may
// follow, with other tokens there; the next laprox_compress() chooses by what was found, the policy saying how scores are made of
// attention. Where queries were kept, it also refits what stays: the values, so that what these queries read from the kept entries is
// what they read from all; and a bias per KV head, for the attention that the others had. A prompt that is done instead
// (laprox_prompt_done) has a question of its own.
//
// Refuses policies that don't score by the latest queries. Evaluating a token more than the context has room for would evict, and
// fails while a probe goes on, so a probe needs room beside the text.
LLAMA_API bool laprox_probe(struct llama_context * ctx, llama_seq_id seq_id, const struct laprox_look * look);

// What a probe found so far, for when the sequence holds the same text again, whole, and another budget is tried, say: a copy, to be
// freed. NULL where no probe has looked. laprox_probe_again() refuses one of another model or policy, or of a text of another length;
// that it is the same text, the caller knows.
struct laprox_found;
LLAMA_API struct laprox_found * laprox_probe_found(struct llama_context * ctx, llama_seq_id seq_id);
LLAMA_API bool                  laprox_probe_again(struct llama_context * ctx, llama_seq_id seq_id, const struct laprox_found * found);
LLAMA_API void                  laprox_found_free (struct laprox_found * found);

// Whether states carry the archive, beside what is held. They don't unless they are asked to.
LLAMA_API bool laprox_set_archive_in_states(struct llama_context * ctx, bool on);

struct laprox_stats {
    int64_t tokens_seen;    // positions evaluated and not removed
    int64_t entries_held;   // (layer, KV head, token) entries in the cache
    int64_t entries_full;   // what an uncompressed cache would hold
    int64_t kv_bytes;       // allocated for K, V and their masks, tail and padding included
    int64_t kv_bytes_full;  // what llama.cpp would need to cache the tokens seen
    int64_t window_bytes;   // allocated for the observation window's queries
    int64_t compressions;
    int64_t recalls;          // passes in which entries were chosen for a later prompt, from the archive, too
    int64_t entries_recalled; // that came back from it
    int64_t archived_entries; // of tokens that are not in the tail any more, held ones included
    int64_t archived_bytes;   // taken by the archive; of sequences that share some of it, counted for each, but once in their sum
    int64_t tokens_lost;      // that are neither in the tail nor in an archive: what was evicted of them can't come back
    double  score_seconds;
    double  select_seconds;
    double  compact_seconds;
};

// Whether what a prompt says of functions may be protected, so many tokens of it: of a budget in bytes it takes at most a third.
LLAMA_API bool laprox_may_protect(const struct llama_context * ctx, int64_t n_tokens, double budget_bytes);

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
// documents
//

// What a sequence holds, in a file with the tokens it was made of and texts about it. A text is read once, and questions about it are
// answered from the file. One document is all that a sequence holds.
struct laprox_document;

// Write what the sequence holds, with its archive where laprox_set_archive_in_states() says so, and whose tokens these are: one for
// each position. `keys` are lower-case letters, digits and _, `values` UTF-8. "fingerprint" (of the model), "llama.cpp" and "ggml"
// (versions) are added. `path` is replaced when all is written; nothing half-written is left.
LLAMA_API bool laprox_document_save(struct llama_context * ctx, llama_seq_id seq_id, const char * path,
                                    const llama_token * tokens, int32_t n_tokens,
                                    const char * const * keys, const char * const * values, int32_t n_texts);

// Read a file into memory, and check all of it. NULL where it is refused; the reason doesn't say the path. To be freed.
LLAMA_API struct laprox_document * laprox_document_open(const char * path);
LLAMA_API void                     laprox_document_free(struct laprox_document * document);

// A text by its key; NULL if there is none. Stays as long as the document.
LLAMA_API const char * laprox_document_get(const struct laprox_document * document, const char * key);

// Returns the number of tokens and writes at most `cap` of them.
LLAMA_API int32_t laprox_document_tokens(const struct laprox_document * document, llama_token * tokens, int32_t cap);

// The sequence then holds the document, and only it: as laprox_compressed_for() says, a prompt that begins with its tokens goes on
// from there. Any number of sequences can load it. Refuses one of another model, layout (cache types, gates) or llama.cpp, and
// what the context has no room for; the sequence is then empty, unless it is the model that is wrong.
LLAMA_API bool laprox_document_load(struct llama_context * ctx, llama_seq_id seq_id, const struct laprox_document * document);

//
// looking inside
//

// Names a model's shape and training, whatever it was quantised to: 16 hexadecimal digits over its norms and sizes.
// Files made for one model (profiles, gates) carry it. Returns false if the model has no attention norms.
LLAMA_API bool laprox_model_fingerprint(const struct llama_model * model, char out[17]);

// Write a profile of this model: evicted[99][n_layer][n_head_kv], the share of each head's entries to evict at 1% ... 99% overall.
// `values` are texts about it by their `keys`; "scorer" is the only one that it may be used with, and "model" is told where another
// one refuses it.
LLAMA_API bool laprox_profile_save(const struct llama_model * model, const char * path, const double * evicted,
                                   int32_t n_layer, int32_t n_head_kv,
                                   const char * const * keys, const char * const * values, int32_t n_texts);

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
// scorer does so. NaN for what is never ranked: attention sinks, protected and recent tokens. Where a selection has two stages
// (criticalkv), those of the first.
LLAMA_API int64_t laprox_finished_scores(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head,
                                         float * score, int64_t cap);

// K rows [n, n_embd_head_k] and V rows [n, n_embd_head_v] of a KV head as float32, aligned with laprox_positions()
// and without the rotation that llama.cpp applies to quantised caches. Either pointer may be NULL.
// Returns n, writes nothing if n > cap.
LLAMA_API int64_t laprox_entries(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head,
                                 float * k, float * v, int64_t cap);

// What a KV head's kept entries, those before the tail and behind the prefix, have added to their q k^T: 0 without a refit, NaN if
// refused.
LLAMA_API float laprox_bias(struct llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head);

// The observed queries of a layer, oldest first: float32 [n, n_head, n_embd_head_k], after RoPE, and their positions.
// Returns n <= window, writes nothing if n > cap.
LLAMA_API int64_t laprox_queries(struct llama_context * ctx, llama_seq_id seq_id, int32_t il,
                                 float * q, llama_pos * pos, int64_t cap);

#ifdef __cplusplus
}
#endif
