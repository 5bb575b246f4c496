// llama-server's slots on a compressing KV cache. Without one, every call does nothing.

#pragma once

#include "server/kv_documents.h"
#include "server/kv_metrics.h"
#include "server/kv_params.h"

#include "server-task.h"

#include <memory>
#include <string>
#include <vector>

struct server_queue;

// The "kv" object of a request, checked. Throws std::invalid_argument.
common_kv_request server_kv_parse_request(const json & request);

// The "kv" object of /props.
json server_kv_props();

// The "filename" of a request to save or restore a slot. Throws std::invalid_argument.
std::string server_kv_filename(const std::string & body);
bool        server_kv_archive (const std::string & body); // "archive" of the same request

// How many positions a slot had when its KV cache was last compressed; 0: it holds everything.
llama_pos server_kv_compressed_for(llama_context * ctx, int id_slot);

// How many cached tokens serve another prompt: those that both begin with, but none if the KV cache was compressed for
// tokens that the other one doesn't have. What was kept was chosen with those in view.
size_t server_kv_common(const server_prompt & cached, const server_tokens & tokens);

class server_kv {
public:
    explicit server_kv(server_kv_metrics & metrics) : metrics(metrics) {}

    // The context was made, or made again after sleeping.
    void init(llama_context * ctx, size_t n_slots);

    bool on() const { return ctx != nullptr; }

    // Whether saved states carry what was evicted.
    void archive_in_states(bool carried) const;

    // A request takes the slot. Returns why it can't, or nothing.
    std::string begin(int id_slot, const common_kv_request & request);

    // Whether what the slot holds of this prompt can be used without reading it again.
    bool can_reuse(int id_slot, const server_tokens & cached, const server_tokens & prompt) const;

    // Where the task is about a document, and what is cached isn't part of its prompt, all of it, the slot then holds the document and
    // nothing else. `draft` may be null. Returns why it can't, or nothing.
    std::string start_from_document(int id_slot, const server_task & task, server_prompt & cached, int & n_past, llama_context * draft);

    // How many of n_past cached tokens can be used for the prompt: all or none. `ram` may be null.
    int reuse(int id_slot, const server_task & task, const server_tokens & cached, int n_past, const server_prompt_cache * ram);

    // Around llama_decode, which may compress by itself.
    void before_decode();
    void after_decode(int ret);

    // Why the last llama_decode found no room, after what llama-server says about it.
    std::string explain(const std::string & error) const;

    // The slot's prompt is in, and nothing was sampled yet. How many tokens of it stay evaluated: all, or fewer where those that
    // follow are to be evaluated again, on what came back for them.
    size_t prompt_done(int id_slot, const server_tokens & prompt, server_queue & queue);

    // Whether a token of the slot's prompt that was evaluated counts: not those that are evaluated again.
    bool counts(int id_slot);

    // Whether tokens of the slot's prompt are being evaluated again: its progress was said already.
    bool is_again(int id_slot) const;

    // Forget the reason of an earlier refusal, and the reason of one since then, if any.
    void        clear_reason() const;
    std::string reason_or(const std::string & otherwise) const;

    // For /slots and /metrics, which may be read while the engine is at work: take the numbers, then show them.
    void refresh();
    json slot_json(int id_slot) const;

    // The final reply of a slot, with a "kv" object beside its timings.
    std::unique_ptr<server_task_result_cmpl_final> make_final_result(int id_slot);

private:
    struct slot {
        std::string  policy;
        std::string  budget;
        laprox_stats stats {};

        // of the request
        std::shared_ptr<const server_kv_document> document; // that it is about
        int32_t     n_document_read = 0; // tokens of it that had to be evaluated
        double      compress_ms    = 0;
        int32_t     n_reread       = 0;
        int64_t     n_recalled_before = 0; // entries that had come back before
        llama_pos   again = -1; // the first position of its prompt that is being evaluated again
        size_t      n_again = 0;  // tokens of it that were to be, so far
        bool        goes_on = false; // what it found in the slot had been compressed
        bool        stale = false; // its prompt is answered from what was kept for an earlier one
        std::string refused; // why its prompt wasn't compressed
    };

    // The bytes that a request has: its own, or its slot's share where they are the server's. 0: the budget isn't in bytes.
    double bytes_of_request(const common_params_kv & merged) const;

    // What the request's prompt says of functions is protected, but where a budget in bytes has no room for it.
    void protect_functions(const common_kv_request & request, double bytes, common_params_kv & merged) const;

    laprox_stats get_stats(int id_slot) const;
    llama_pos    cut_from(int id_slot) const; // the first position at which the sequence can be cut

    server_kv_metrics & metrics;
    llama_context    * ctx = nullptr;
    std::vector<slot>  slots;
    laprox_stats       stats_before {};
    std::string        reason; // of the last llama_decode that failed
};
