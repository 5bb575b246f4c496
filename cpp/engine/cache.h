// The compressing KV cache: what llama_kv_cache delegates to while a policy is set.
//
// llama_kv_cache keeps its cells and places batches in them. This class has a sequence (sequence.h) for each of its streams,
// hands every call of llama_memory_i to those it is about, and builds attention over what they hold.

#pragma once

#include "engine/sequence.h"
#include "engine/whole_memory.h"

#include "llama-kv-cache.h"
#include "llama-memory.h"

#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llm_graph_context;
class llama_io_write_i;
class llama_io_read_i;

namespace laprox {

// How llama.cpp stores an entry.
struct entry_format {
    ggml_type type_k;
    ggml_type type_v;
    bool rotated_k;
    bool rotated_v;
};

class cache {
public:
    // Whether this llama_kv_cache is to be a compressing one. Throws std::runtime_error when the model's policy asks
    // for it but the context's settings rule it out.
    static bool wanted(const llama_model & model, const llama_hparams & hparams, bool v_trans, llama_swa_type swa_type,
            bool shares_cells, uint32_t kv_size);

    cache(const llama_model & model, const llama_hparams & hparams, const std::vector<uint32_t> & layer_ids,
            const std::unordered_map<int32_t, int32_t> & map_layer_ids, const entry_format & format, bool offload, uint32_t kv_size, uint32_t n_stream,
            llama_kv_cells_vec & cells, std::vector<uint32_t> & cell_heads);

    //
    // llama_memory_i
    //

    void set_context(llama_context & ctx) { all.lctx = &ctx; }
    void synchronize() const; // what was computed is there
    // The memory that this is, or is in, as its user sees it.
    whole_memory & whole(llama_memory_i & parts);
    whole_memory & whole() const { return *seen_whole; } // which was seen before

    void clear();
    bool can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    // False: refused, nothing changed.
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    // Whether a sequence has had a token there that a sliding window at `next` looks back to.
    bool misses(llama_seq_id seq_id, llama_pos pos, llama_pos next) const;
    // False: there was no room; the destination is empty.
    bool copy_stream(uint32_t src, uint32_t dst);
    llama_pos seq_pos_min(llama_seq_id seq_id) const;
    llama_pos seq_pos_max(llama_seq_id seq_id) const;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize);

    // state.cpp
    void state_write(llama_io_write_i & io, llama_seq_id seq_id);
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id);

    //
    // batches
    //

    // Whether the cells found for a ubatch have storage behind them, and no compression is due before it.
    bool fits(const llama_kv_cache::slot_info & sinfo) const;
    // A batch found no room: how much the next update has to make.
    void note_pressure(const std::vector<llama_ubatch> & ubatches);
    // A ubatch is computed next.
    void apply(const llama_ubatch & ubatch);
    // It was.
    void computed(const llama_ubatch & ubatch);

    //
    // graph (attention.cpp)
    //

    ggml_tensor * build_input_rows(ggml_context * ctx, const llama_ubatch & ubatch, const char * name) const;
    void set_input_rows(ggml_tensor * dst, const llama_kv_cache::slot_info & sinfo) const;

    // Store k_cur, v_cur (null: the layer reads another's cache), observe q_cur, and attend.
    // Result: [d_v*n_head, n_tokens]
    ggml_tensor * build_attn(const llm_graph_context & g, ggml_tensor * q_cur, ggml_tensor * k_cur, ggml_tensor * v_cur,
            ggml_tensor * k_rows, ggml_tensor * v_rows, ggml_tensor * tail_mask, ggml_tensor * kq_b, ggml_tensor * sinks,
            float kq_scale, int il);

    //
    // compression; throws std::runtime_error with the reason, the cache is as it was
    //

    void compress(llama_context & lctx, llama_seq_id seq_id);
    void score   (llama_context & lctx, llama_seq_id seq_id);
    void look(llama_context & lctx, llama_seq_id seq_id, const laprox_look & part);
    void look_again(llama_seq_id seq_id, const probe & found);
    // A prompt is in: see laprox_prompt_done(). The first position to be evaluated again, of at most n_again; -1: none.
    llama_pos prompt_done(llama_context & lctx, llama_seq_id seq_id, int32_t n_again, bool first);
    void end_turn(llama_seq_id seq_id) { mine(seq_id).end_turn(); }

    void set_archive_in_states(bool on) { all.archive_in_states = on; }
    // Whether what was observed of queries is in them, too: without it, only what comes later can choose entries.
    void set_queries_in_states(bool on) { all.queries_in_states = on; }
    const archive_space * get_archive_space() const { return all.space.get(); }
    void set_scorer(laprox_scorer_callback callback, void * user_data);

    // The llama_memory_i update: what was requested, and room for the batch that found none.
    bool update(llama_context & lctx);

    //
    // settings
    //

    const settings & get_settings() const { return all.config; }
    void set_settings(const settings & s);
    // Of one sequence, instead of the context's; null: the context's again.
    void set_settings(llama_seq_id seq_id, std::shared_ptr<const settings> s);

    //
    // looking inside
    //

    const common & shared() const { return all; }
    const std::vector<layer_info> & get_layers() const { return all.layers; }

    size_t n_sequences() const { return sequences.size(); }
    bool has_sequence(llama_seq_id seq_id) const { return seq_id >= 0 && (size_t) seq_id < sequences.size(); }
    // Throws std::out_of_range if there is no such sequence.
    const sequence & at(llama_seq_id seq_id) const;
    // Those that a ubatch is of, in the order of their tokens.
    std::vector<sequence *> sequences_of(const llama_ubatch & ubatch);
    // One, or all for any negative number.
    std::vector<sequence *> sequences_of(llama_seq_id seq_id);

private:
    sequence & mine(llama_seq_id seq_id) { return const_cast<sequence &>(at(seq_id)); }
    // Do that between batches, by way of llama_context's memory update.
    void run(llama_context & lctx, std::function<void()> what);
    void check_settings(const settings & s) const;
    void refuse_while_scoring() const;

    common all;
    std::deque<sequence> sequences; // one per stream of llama.cpp, by number
    std::unordered_map<int32_t, int32_t> layer_of; // place of a layer, also of one that reads another one's cache
    const std::shared_ptr<const gate_set> gates;   // null: none
    std::array<char, 17> print {};                 // the model's fingerprint
    std::unique_ptr<whole_memory> seen_whole;

    // what update() is to do beside making room, and what became of it
    std::function<void()> request;
    std::string refusal;
};

}
