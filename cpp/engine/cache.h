// The compressing KV cache: what llama_kv_cache delegates to while a policy is set.
//
// llama_kv_cache keeps its cells, which describe the *tail*: one cell per recent token. This class owns the
// storage (one layer_store per layer and stream), knows what was kept of the tokens before the tail, and
// compresses. A stream holds one sequence.

#pragma once

#include "core/allocate.h"
#include "engine/query_stats.h"
#include "engine/scorer.h"
#include "engine/settings.h"
#include "engine/store.h"

#include "llama-kv-cache.h"
#include "llama-memory.h"

#include <array>
#include <cstdint>
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

class head_graph;
class state_reader;
class window_input;

static const uint32_t tail_block = 256; // llama.cpp pads the number of cells it attends to this

constexpr int32_t max_drafts = 64; // tokens verified at once, of which any may be taken back

// What one sequence holds.
struct stream {
    std::shared_ptr<const settings> own; // its own settings; null: the cache's

    std::vector<std::unique_ptr<layer_store>> layers;

    // [layer][head]: ascending positions of the kept rows. All of them are below `tail_begin`.
    std::vector<std::vector<std::vector<llama_pos>>> kept;
    llama_pos tail_begin  = 0; // first position that was never part of a compression
    int64_t   n_absorbed  = 0; // tokens that left the tail
    llama_pos compressed_for = 0; // positions there were when entries were last chosen; 0: all are held
    llama_pos gen_begin   = -1; // where text began to be generated, or was last compressed; -1: a prompt is coming in
    llama_pos gen_end     = -1; // where it ends so far, tokens that llama.cpp only tries to place not included
    bool      chosen_early = false; // entries were chosen while the prompt came in, without its end

    // The observation window: queries per layer; slot i holds the query of position window_pos[i], -1: none.
    std::vector<llama_pos> window_pos;
    int64_t n_summed   = 0; // queries in the sums of query_stats

    // Scores of what is held, if laprox_score() was called since it last changed: [layer][head][entry by position]
    std::vector<std::vector<std::vector<float>>> scores;

    uint64_t generation = 0; // changes with the storage; graphs built for another one can't be reused
    uint32_t n_wanted   = 0; // tail cells that the last batch found no room for

    int64_t n_compressions = 0;
    int64_t t_score_us     = 0;
    int64_t t_select_us    = 0;
    int64_t t_compact_us   = 0;
};

class cache {
public:
    // Whether this llama_kv_cache is to be a compressing one. Throws std::runtime_error when the model's policy asks
    // for it but the context's settings rule it out.
    static bool wanted(const llama_model & model, const llama_hparams & hparams, bool v_trans, llama_swa_type swa_type,
            bool shares_cells, uint32_t kv_size);

    cache(const llama_model & model, const llama_hparams & hparams, const std::vector<uint32_t> & layer_ids,
            const std::unordered_map<int32_t, int32_t> & map_layer_ids, ggml_type type_k, ggml_type type_v, bool rotated_k, bool rotated_v, bool offload, uint32_t kv_size,
            uint32_t n_stream, llama_kv_cells_vec & cells, std::vector<uint32_t> & cell_heads);

    //
    // llama_memory_i
    //

    void clear();
    // Whether that can be removed: the part of a sequence that was compressed only goes as a whole.
    bool can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    // False: refused, nothing changed.
    bool seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1);
    // Whether that is all of a sequence.
    bool covers(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    // Whether a sequence has had a token there that a sliding window at `next` looks back to.
    bool misses(llama_seq_id seq_id, llama_pos pos, llama_pos next) const;
    // False: there was no room; the destination is empty.
    bool copy_stream(uint32_t src, uint32_t dst);
    llama_pos seq_pos_min(llama_seq_id seq_id) const;
    llama_pos seq_pos_max(llama_seq_id seq_id) const;

    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const;

    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize);

    void state_write(llama_io_write_i & io, llama_seq_id seq_id) const;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id);

    //
    // placing a batch
    //

    // Whether the cells found for a ubatch have storage behind them, and no compression is due before it.
    bool fits(const llama_kv_cache::slot_info & sinfo) const;
    // A batch found no room: how much the next update has to make.
    void note_pressure(const std::vector<llama_ubatch> & ubatches);

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
    // compression (compress.cpp); throws std::runtime_error with the reason, the cache is as it was
    //

    void compress(llama_context & lctx, llama_seq_id seq_id);
    // A prompt is in. Whether it is to be compressed now.
    bool prompt_done(llama_seq_id seq_id);
    void score   (llama_context & lctx, llama_seq_id seq_id);

    // The scorer of policy "custom".
    void set_scorer(laprox_scorer_callback callback, void * user_data) { custom = callback; custom_data = user_data; }
    // Throws std::runtime_error where there is none, or it refuses.
    void call_scorer(llama_context & lctx, uint32_t strm, int32_t il, int32_t head, const std::vector<llama_pos> & pos, float * score) const;

    // Do that between batches, by way of llama_context's memory update.
    void run(llama_context & lctx, std::function<void(llama_context &)> what);

    // The llama_memory_i update: what was requested, and room for the batch that found none.
    bool update(llama_context & lctx);

    //
    // looking inside
    //

    const settings & get_settings() const { return config; }
    void set_settings(const settings & s);

    // Of one sequence, instead of the context's; null: the context's again.
    const settings & config_of(uint32_t strm) const { return streams[strm].own ? *streams[strm].own : config; }
    void set_settings(llama_seq_id seq_id, std::shared_ptr<const settings> s);

    const std::vector<layer_info> & get_layers() const { return layers; }
    uint32_t n_streams() const { return streams.size(); }
    const stream & get_stream(uint32_t strm) const { return streams[strm]; }
    // A stream holds the sequence of its number, and there are as many as sequences.
    bool     has_sequence(llama_seq_id seq_id) const { return seq_id >= 0 && (size_t) seq_id < streams.size(); }
    uint32_t stream_index(llama_seq_id seq_id) const;

    int64_t n_seen(uint32_t strm) const;
    int64_t n_kept(uint32_t strm) const; // entries before the tail
    llama_pos next_position(uint32_t strm) const { return last_position(strm) + 1; }

    // Where the policy the context was made with needs them; else null.
    const query_stats * get_query_stats() const { return queries_seen.get(); }
    laprox_stats stats(uint32_t strm) const;

    // Slots of the observed queries, oldest first; at most settings::window.
    std::vector<uint32_t> window_slots(uint32_t strm) const;
    // Where to put the next n queries: empty slots, then the oldest.
    std::vector<uint32_t> free_slots(uint32_t strm, size_t n) const;

    // Ascending positions held by a KV head, and the row of each (relative to held_row()). Who asks for many heads finds
    // the tail's cells once.
    struct held { std::vector<llama_pos> pos; std::vector<uint32_t> row; };
    held held_by(uint32_t strm, size_t ikv, uint32_t head) const { return held_by(strm, ikv, head, cells_by_position(strm)); }
    held held_by(uint32_t strm, size_t ikv, uint32_t head, const std::vector<uint32_t> & tail) const;
    std::vector<uint32_t> cells_by_position(uint32_t strm) const;
    // Row of the entry that is the n-th by position.
    uint32_t row_of(uint32_t strm, size_t ikv, uint32_t head, size_t n, const std::vector<uint32_t> & tail) const {
        const size_t n_kept = streams[strm].kept[ikv][head].size();
        return n < n_kept ? n : n_kept + tail[n - n_kept];
    }

    void entries(llama_seq_id seq_id, size_t ikv, uint32_t head, float * k, float * v) const;
    float kq_scale(size_t ikv) const { return kq_scales[ikv]; }
    std::vector<llama_pos> queries(llama_seq_id seq_id, size_t ikv, float * q) const;

    // Throws std::out_of_range if the layer isn't compressed.
    size_t layer_index(int32_t il) const { return layer_of.at(il); }

private:
    friend class window_input;
    friend class head_graph;

    // [layer][head]: held rows that stay, ascending; and the tail cells that stay in the tail
    struct selection {
        std::vector<std::vector<std::vector<uint32_t>>> rows;
        std::vector<uint32_t> cells;
    };

    // What may be evicted, scored; and what may not.
    struct candidates {
        const allocator * share;
        allocation request;
        // [layer][head]: how many entries are before the candidates; and which of the entries behind are candidates, none: all
        std::vector<std::vector<size_t>> first;
        std::vector<std::vector<std::vector<uint32_t>>> index;
        selection kept;                          // attention sinks, and the tail
        int64_t   n_kept = 0;                    // entries of `kept`
    };

    std::vector<uint32_t> streams_of(const llama_ubatch & ubatch) const;
    // What any layer of a stream has room for.
    uint32_t tail_rows(uint32_t strm) const;
    // Tokens per KV head that a sequence can come to hold: its kept ones fit into the context, and a tail block may be behind them.
    int64_t  most_held() const { return (int64_t) kv_size + tail_block; }
    uint32_t used_tail(uint32_t strm) const { return cells[strm].used_max_p1(); }
    uint32_t tail_limit(uint32_t strm) const;
    uint32_t tail_limit_in_bytes(uint32_t strm) const;
    bool overgrown(uint32_t strm) const;
    void make_room(llama_context & lctx, uint32_t strm);
    size_t stream_bytes(uint32_t strm) const;
    size_t byte_limit(uint32_t strm) const;
    void check_settings(const settings & s) const;
    void refuse_while_scoring() const;

    void reset_stream(uint32_t strm);
    // Other storage: graphs that were built for what it replaces can't run again.
    void replace_storage(uint32_t strm, std::vector<std::unique_ptr<layer_store>> fresh);
    void forget(uint32_t strm);
    template <typename F> void visit_layout(F field) const;
    void read_stream(state_reader & in, uint32_t strm);
    llama_pos last_position(uint32_t strm) const;
    void grow_tail(llama_context & lctx, uint32_t strm, uint32_t n_tail);
    // Replace the storage of a stream; everything is allocated and filled before anything is dropped.
    void relayout(llama_context & lctx, uint32_t strm, const selection & keep, uint32_t n_tail);
    void compress_stream(llama_context & lctx, uint32_t strm, int64_t n_budget_seen, int64_t n_least);
    candidates find_candidates(uint32_t strm, score_table scores, int n_threads) const;
    head_counts count_bytes(const candidates & from, int64_t n_most, uint32_t n_tail, size_t limit) const;
    selection   choose(uint32_t strm, const candidates & from, const head_counts & counts) const;
    score_table read_scores(llama_context & lctx, uint32_t strm);
    static std::vector<std::vector<uint32_t>> kept_lengths(const selection & keep);
    size_t bytes_for(const std::vector<std::vector<uint32_t>> & n_kept, uint32_t n_tail) const;

    const llama_model   & model;
    const llama_hparams & hparams;

    settings config;
    const std::shared_ptr<const gate_set> gates; // null: none
    std::array<char, 17> print {}; // the model's fingerprint

    std::vector<layer_info> layers;
    std::vector<float>      kq_scales; // [layer], as the graph used them
    std::unordered_map<int32_t, int32_t> layer_of; // also of layers that read another one's cache
    int64_t n_pairs = 0;  // (layer, KV head)

    const bool rotated_k; // llama.cpp rotates the K and V that it quantises (Hadamard)
    const bool rotated_v;

    const uint32_t kv_size;

    llama_kv_cells_vec    & cells;
    std::vector<uint32_t> & cell_heads;
    std::vector<stream> streams;

    // the context that computes on this cache, known from its first batch on
    llama_context * lctx = nullptr;

    laprox_scorer_callback custom = nullptr;
    void * custom_data = nullptr;
    bool scoring = false; // a scorer of the user's may be running

    // what update() is to do beside making room, and what became of it
    std::function<void(llama_context &)> request;
    std::string refusal;

    // F32 [d_k*n_head, n_slots, n_stream] per layer
    uint32_t n_slots;
    std::vector<ggml_tensor *> windows;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> window_buffers;

    std::unique_ptr<query_stats> queries_seen;
};

}
