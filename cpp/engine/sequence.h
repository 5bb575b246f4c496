// What one sequence holds: the storage of its layers, and the books about it.
//
// llama.cpp's cells describe the *tail*, one cell per recent token. What was kept of the tokens before the tail is in the
// stores of the layers; the sequence also has the queries observed last and, where a scorer wants them, sums over all queries.

#pragma once

#include "engine/archive.h"
#include "engine/probe.h"
#include "engine/query_stats.h"
#include "engine/scoring.h"
#include "engine/settings.h"
#include "engine/store.h"
#include "engine/window.h"

#include "llama-kv-cells.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

struct llama_context;
struct llama_hparams;

namespace laprox {

class state_reader;
class state_writer;

static const uint32_t tail_block = 256; // llama.cpp pads the number of cells it attends to this

constexpr int32_t max_drafts = 64; // tokens verified at once, of which any may be taken back

// What the sequences of a cache have in common.
struct common {
    const llama_hparams & hparams;
    settings config; // of the context
    uint32_t kv_size; // tokens that the context has room for
    uint32_t n_seq;
    bool rotated_k; // llama.cpp rotates the K and V that it quantises (Hadamard)
    bool rotated_v;

    std::vector<layer_info> layers = {};
    int64_t n_pairs = 0; // (layer, KV head)
    std::vector<float> kq_scales = {}; // [layer], known from the first graph on: every graph of an architecture has the same
    std::vector<rotation> rotations = {}; // of the queries, [layer]; known like these
    user_scorer custom = {};
    llama_context * lctx = nullptr; // that computes on this cache, known when it has reserved its graphs
    std::shared_ptr<archive_space> space = {}; // of what leaves the tails; null: evicted entries are gone
    bool archive_in_states = false;
    bool queries_in_states = true;

    // Tokens per KV head that a sequence can come to hold: its kept ones fit into the context, and a tail block may be behind them.
    int64_t most_held() const { return (int64_t) kv_size + tail_block; }
    // One sequence gets all the room its context allows at once, as llama.cpp does; several share what there is and grow as
    // they are used.
    bool grows() const { return config.chunked || n_seq > 1; }
    // What stores of these lengths, [layer][head], take.
    size_t bytes_for(const std::vector<std::vector<uint32_t>> & n_kept, uint32_t n_tail) const;
};

// Tokens that leave a tail, in ascending position: from then on each head has kept them or dropped them.
struct absorbed {
    std::vector<uint32_t>  cell;
    std::vector<llama_pos> pos;
};

class sequence {
public:
    // Empty. Throws std::runtime_error where a device has no room.
    sequence(const llama_model & model, const common & shared, uint32_t id, llama_kv_cells & cells, uint32_t & cell_head);

    const common & shared;
    const uint32_t id;

    const settings & config() const { return own ? *own : shared.config; }
    void set_settings(std::shared_ptr<const settings> s) { own = std::move(s); } // null: the context's
    // A byte budget of the context is shared by its sequences.
    size_t byte_limit() const { return (size_t) config().budget.value/(own ? 1 : shared.n_seq); }
    bool is_sink(llama_pos pos) const { return pos < config().sink; }
    bool is_protected(llama_pos pos) const { return is_sink(pos) || holds(config().protect, pos); }

    //
    // tokens
    //

    uint32_t  n_tail() const { return cells.get_used(); }
    uint32_t  used_cells() const { return cells.used_max_p1(); }
    int64_t   n_absorbed() const { return n_gone; } // tokens that left the tail
    int64_t   n_seen() const { return n_gone + n_tail(); }
    int64_t   n_kept() const; // entries before the tail
    int64_t   n_held() const { return n_tail()*shared.n_pairs + n_kept(); } // entries
    llama_pos first_position() const; // that can be removed
    llama_pos last_position () const;
    llama_pos next_position () const { return last_position() + 1; }
    // Where text would go on if all from p0 on were gone: positions before it may have been removed, too.
    llama_pos next_before(llama_pos p0) const;
    llama_pos tail_begin    () const { return n_gone > 0 ? tail_start : 0; } // first position that was never part of a compression
    llama_pos compressed_for() const { return chosen_for; } // positions there were when entries were last chosen; 0: all are held
    llama_pos turn_begin() const { return turn_start; } // first position of the turn that entries are to be chosen for
    void      end_turn() { turn_start = next_position(); passes = 0; chosen_early = false; }
    int64_t   n_compressions() const { return compressions; }
    tail_view tail() const;
    llama_pos position_in(uint32_t cell) const { return cells.pos_get(cell); }

    // The tokens that left the tail, with every entry, but for those that it had to lose; empty where it was given up.
    const archive & stored() const { return archived; }
    // Whether what was evicted can come back, and is to.
    bool remembers() const;
    // What is held was chosen by queries, so that another prompt needs something else.
    bool chosen_by_queries() const { return by_queries; }

    // Whether that is all of it.
    bool covers(llama_pos p0, llama_pos p1) const { return p0 <= 0 && (p1 < 0 || p1 > last_position()); }
    // Whether that begins among the tokens that left the tail.
    bool reaches_in(llama_pos p0, llama_pos p1) const { return n_gone > 0 && p0 < gone_end() && (p1 < 0 || std::max(p0, 0) < p1); }
    // Whether that can be removed: the part that was compressed goes as a whole or, where it is remembered, from a position on.
    bool can_remove(llama_pos p0, llama_pos p1) const;
    void remove(llama_pos p0, llama_pos p1); // without reaching in
    // Tokens from p0 on are gone, some that left the tail among them: `fresh` holds what is held of the others. Can't fail.
    void cut(llama_pos p0, std::vector<std::unique_ptr<layer_store>> fresh);
    // All of it, whatever becomes of its storage: that is given back where the device has room for less.
    void clear();
    // Throws std::runtime_error where there is no room; then it is empty.
    void copy(const sequence & from);

    //
    // a batch
    //

    // A ubatch of the sequence's next tokens is being computed; `generated`: text, not a prompt.
    void place(const llama_pos * pos, size_t n_tokens, bool generated);
    // Its graph has found room. Before, removing its tokens takes back what place() did.
    void begin_compute() { unplaced.reset(); }
    // It was computed. Before, removing its tokens means that it was aborted, and comes again.
    void end_compute() { computing = false; }
    // Tokens that are removed from there on come again.
    void expect_again(llama_pos p0) { comes_again = p0; }
    // Of the positions before that one, those whose queries are summed up; negative: its own aren't.
    int32_t n_summable(llama_pos pos) const { return pos - std::max(config().sink, sums->begin); }
    // Slots of the window for the queries of its last tokens.
    const std::vector<uint32_t> & placed() const { return placed_slots; }

    // The prompt is in: what comes now is generated.
    void begin_generation() { gen_begin = gen_end = next_position(); }
    // Whether it is time to compress where a prompt ends. What came since the last compression stays exact until it is more
    // than min_tokens; but where entries were chosen while this prompt came in, its end, the question, has its say, too.
    bool prompt_is_due() const { return chosen_early || next_position() - chosen_for > config().min_tokens; }
    int64_t n_generated() const { return gen_begin < 0 ? 0 : gen_end - gen_begin; } // since, or since the last compression

    // Passes of recall for the prompt that ends there.
    int32_t  passes = 0;

    bool     chosen_early = false; // entries were chosen while the prompt came in, without its end
    uint32_t n_wanted = 0; // tail cells that the last batch found no room for
    // llama.cpp looks for cells from the first empty one on: beyond the last there is no storage.
    void rewind_cells();

    //
    // storage
    //

    const layer_store & store(size_t ikv) const { return *stores[ikv]; }
    uint32_t tail_rows() const; // what every layer has room for
    uint64_t generation() const { return n_storages; } // changes with the storage; graphs built for another one can't be reused
    std::vector<std::vector<uint32_t>> kept_lengths() const; // [layer][head]
    size_t   bytes() const;
    void     add_bytes(std::map<ggml_backend_buffer_type_t, size_t> & total) const; // the window and sums included

    // What leaves the tail if only these cells stay.
    absorbed leaving(const std::vector<uint32_t> & cells_kept) const;
    // It has left, for the archive, if there is one: `fresh` has the rows that were kept, and the tail in its first cells.
    // Can't fail.
    void absorb(const absorbed & gone, const std::vector<uint32_t> & cells_kept, std::vector<std::unique_ptr<layer_store>> fresh);
    // The same entries with another length of the tail.
    void replace(size_t ikv, std::unique_ptr<layer_store> fresh);

    query_window window;
    std::unique_ptr<probe> probed; // of the text, all of which is in the tail; null: none
    std::unique_ptr<query_stats> sums; // where the policy the context was made with needs them; else null

    //
    // looking inside
    //

    std::vector<layer_scores> scores; // of what is held, by laprox_score(): the first number alone, and the candidates' scores; empty: none

    // Float32 rows without llama.cpp's rotation; null: not wanted.
    void entries(size_t ikv, uint32_t head, float * k, float * v) const;
    observed observed_queries() const { return window.latest(config().window); }
    void queries(size_t ikv, const observed & which, float * q) const;

    laprox_stats stats() const;
    void add_recall(int64_t n_back) { recalls++; n_recalled += n_back; }
    void add_times(int64_t score_us, int64_t select_us, int64_t compact_us); // of a compression

    //
    // state (state.cpp)
    //

    void write(state_writer & out) const;
    // Into an empty one. Throws std::runtime_error with the reason; what it then holds is to be cleared.
    void read(state_reader & in);

private:
    struct books; // what a state has beside rows

    // First position behind all that left the tail: tokens of an image share one, of which some may have left.
    llama_pos gone_end() const { return archived.pos().empty() ? tail_start : std::max(tail_start, archived.pos().back() + 1); }
    void replace_all(std::vector<std::unique_ptr<layer_store>> fresh);
    void store_away(const absorbed & gone, const std::vector<std::unique_ptr<layer_store>> & fresh);
    absorbed make_archive_room(const absorbed & gone, const std::vector<std::unique_ptr<layer_store>> & fresh,
            const archive_full & why);
    void forget_probe(llama_pos p0);
    void forget_queries(llama_pos p0, llama_pos p1);
    void read_archive(state_reader & in);
    template <typename IO, typename Positions> static void visit(IO & io, const common & shared, books & b, const std::vector<Positions *> & kept);
    template <typename IO> static void visit_bias(IO & io, head_bias & bias, size_t n_heads, const books & b);
    template <typename IO> void visit_query(IO & io, uint32_t slot) const;
    template <typename IO> static void visit_rows(IO & io, const layer_store & store, const std::vector<uint32_t> & tail_cells);

    std::shared_ptr<const settings> own; // null: the context's

    llama_kv_cells & cells;
    uint32_t       & cell_head;

    std::vector<std::unique_ptr<layer_store>> stores; // [layer]
    uint64_t n_storages = 0;

    llama_pos tail_start = 0;
    int64_t   n_gone     = 0; // tokens that left the tail
    llama_pos chosen_for = 0;
    llama_pos turn_start = 0;
    bool      by_queries = false;
    archive   archived; // of the tokens that left the tail
    llama_pos gen_begin  = -1; // where text began to be generated, or was last compressed; -1: a prompt is coming in
    llama_pos gen_end    = -1; // where it ends so far, tokens that llama.cpp only tries to place not included

    std::vector<uint32_t> placed_slots;
    struct placement { query_window::positions window; llama_pos gen_begin, gen_end; bool chosen_early; };
    std::optional<placement> unplaced; // what was before a ubatch that isn't computed yet
    bool      computing   = false; // a ubatch
    llama_pos comes_again = -1;

    int64_t compressions = 0;
    int64_t recalls      = 0;
    int64_t n_recalled   = 0;
    std::array<int64_t, 3> times_us {}; // scoring, selecting, compacting
};

}
