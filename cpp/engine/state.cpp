// Saving and restoring what sequences hold: a compressed one is as small in a file as in memory. What is written and what is
// read is visited by the same code, in the same order; a reader checks what it got before it goes on.

#include "engine/cache.h"
#include "engine/error.h"
#include "engine/state_io.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace laprox {

static const uint32_t state_magic   = 0x5358504c; // "LPXS"
static const uint32_t state_version = 6;

// Far above any text, and low enough to count on from.
static const llama_pos max_position = std::numeric_limits<llama_pos>::max() - (1 << 24);

static void expect(const char * what, int64_t saved, int64_t here) {
    if (saved != here) {
        throw std::runtime_error("the saved state doesn't fit this context: " + std::string(what) + " is " + std::to_string(saved) +
                " there and " + std::to_string(here) + " here");
    }
}

// The layout that two contexts must share.
template <typename F> static void visit_layout(const common & shared, F field) {
    field("the number of compressed layers", shared.layers.size());
    for (const layer_info & layer : shared.layers) {
        field("a layer's index",        layer.il);
        field("the number of heads",    layer.n_head);
        field("the number of KV heads", layer.n_head_kv);
        field("the key head size",      layer.d_k);
        field("a mark by gates",        layer.gated);
        field("the value head size",    layer.d_v);
        field("the K cache type",       layer.type_k);
        field("the V cache type",       layer.type_v);
    }
    // after the types, which decide about it unless LLAMA_ATTN_ROT_DISABLE does
    field("a rotation of keys (1: yes)",   shared.rotated_k);
    field("a rotation of values (1: yes)", shared.rotated_v);
}

[[noreturn]] static void damaged(const char * what) {
    throw std::runtime_error(std::string("the saved state is damaged: ") + what);
}

//
// a sequence
//

struct sequence::books {
    struct token { llama_pos pos; llama_kv_cell_ext ext; };

    llama_pos tail_start, chosen_for, turn_start, gen_begin;
    int64_t   n_absorbed, n_kept;
    std::vector<token> tail; // ascending
    uint32_t  n_queries; // in the window
    uint8_t   summed; // whether the queries of all tokens are

    void check(const common & shared, uint32_t n_cells) const;
};

// The tokens of an image may share a position.
static bool shares_positions(const common & shared) {
    return shared.hparams.n_pos_per_embd() > 1;
}

void sequence::books::check(const common & shared, uint32_t n_cells) const {
    if (tail_start < 0 || tail_start > max_position || n_absorbed < 0 || n_absorbed > (shares_positions(shared) ? max_position : tail_start) ||
            (n_absorbed == 0 && tail_start > 0) || chosen_for < tail_start || chosen_for > max_position ||
            turn_start < 0 || turn_start > max_position || gen_begin < -1 || gen_begin > max_position || n_kept < 0 || n_kept > n_absorbed*shared.n_pairs) {
        damaged("its token counts disagree");
    }
    const int64_t n_held = (n_kept + shared.n_pairs - 1)/shared.n_pairs + n_cells; // per KV head
    if (n_cells > shared.kv_size || n_held > shared.most_held()) {
        throw std::runtime_error("the saved state holds " + std::to_string(n_held) + " tokens per KV head, " + std::to_string(n_cells) +
                " of them recent, the context has room for " + std::to_string(shared.kv_size) + "; accepted: a context (-c, n_ctx) of at least " +
                std::to_string(GGML_PAD(n_held, 256)) + " tokens per sequence");
    }
}

// `kept`: positions of each KV head's kept entries, by layer and head.
template <typename IO, typename Positions> void sequence::visit(IO & io, const common & shared, books & b, const std::vector<Positions *> & kept) {
    const bool sharing = shares_positions(shared);
    const auto disordered = [&](llama_pos before, llama_pos after) { return sharing ? before > after : before >= after; };

    io.field(b.tail_start);
    io.field(b.n_absorbed);
    io.field(b.chosen_for);
    io.field(b.turn_start);
    io.field(b.gen_begin);
    io.field(b.n_kept);
    uint32_t n_cells = b.tail.size();
    io.field(n_cells);
    if constexpr (IO::reads) {
        b.check(shared, n_cells);
        b.tail.resize(n_cells);
    }
    for (books::token & token : b.tail) {
        io.field(token.pos);
        io.field(token.ext);
        if (IO::reads && (token.pos < b.tail_start || token.pos > max_position)) {
            damaged("a recent token lies before the compressed ones, or beyond any text");
        }
    }
    if (IO::reads && std::adjacent_find(b.tail.begin(), b.tail.end(), [&](const auto & p, const auto & q) { return disordered(p.pos, q.pos); }) != b.tail.end()) {
        damaged("recent positions are out of order");
    }

    int64_t n_visited = 0;
    for (Positions * pos : kept) {
        uint32_t n = pos->size();
        io.field(n);
        n_visited += n;
        if (IO::reads && (n > b.n_absorbed || n_visited > b.n_kept)) {
            damaged("a head holds more entries than tokens were seen");
        }
        io.list(*pos, n);
        if (IO::reads && (std::adjacent_find(pos->begin(), pos->end(), disordered) != pos->end() ||
                (n > 0 && (pos->front() < 0 || pos->back() >= b.tail_start + sharing)))) {
            damaged("kept positions are out of order");
        }
    }
    if (IO::reads && n_visited != b.n_kept) {
        damaged("its numbers of entries disagree");
    }
}

template <typename IO> void sequence::visit_bias(IO & io, head_bias & bias, size_t n_heads, const books & b) {
    uint8_t any = !bias.value.empty();
    io.field(any);
    if (!any) {
        return;
    }
    io.field(bias.from);
    io.list(bias.value, n_heads);
    if (IO::reads && (any > 1 || bias.from < 0 || bias.from > max_position ||
            !std::all_of(bias.value.begin(), bias.value.end(), [](float value) { return std::abs(value) <= 16.0f; }))) {
        damaged("a bias of attention is none");
    }
}

template <typename IO> void sequence::visit_query(IO & io, uint32_t slot) const {
    for (size_t ikv = 0; ikv < stores.size(); ikv++) {
        io.rows(window.rows[ikv], slot, 1);
    }
}

// Entries by position: a head's kept rows, then these cells of its tail.
template <typename IO> void sequence::visit_rows(IO & io, const layer_store & store, const std::vector<uint32_t> & tail_cells) {
    for (ggml_tensor * pool : store.pools) {
        for (uint32_t head = 0; head < store.kept.size(); head++) {
            io.rows(pool, store.held_row(head), store.n_kept(head));
            for (size_t i = 0; i < tail_cells.size();) { // neighbouring cells at once
                size_t n = 1;
                while (i + n < tail_cells.size() && tail_cells[i + n] == tail_cells[i] + n) {
                    n++;
                }
                io.rows(pool, store.tail_row(head) + tail_cells[i], n);
                i += n;
            }
        }
    }
}

void sequence::write(state_writer & out) const {
    const tail_view held   = tail();
    const observed  window_now = shared.queries_in_states ? observed_queries() : observed {};
    books b { tail_start, chosen_for, turn_start, gen_begin, n_gone, n_kept(), {}, (uint32_t) window_now.slot.size(),
            sums && sums->begin == 0 };
    for (size_t i = 0; i < held.cell.size(); i++) {
        b.tail.push_back({ held.pos[i], cells.ext_get(held.cell[i]) });
    }
    std::vector<const std::vector<llama_pos> *> kept;
    for (const auto & store : stores) {
        for (const auto & pos : store->kept) {
            kept.push_back(&pos);
        }
    }
    visit(out, shared, b, kept);
    for (const auto & store : stores) {
        head_bias bias = store->bias;
        visit_bias(out, bias, bias.value.size(), b);
    }

    // the observation window, so that what was restored can be compressed again before new tokens come
    out.field(b.n_queries);
    for (uint32_t i = 0; i < b.n_queries; i++) {
        llama_pos pos = window_now.pos[i];
        out.field(pos);
        visit_query(out, window_now.slot[i]);
    }
    out.field(b.summed);
    for (size_t ikv = 0; b.summed && ikv < stores.size(); ikv++) {
        out.rows(sums->sums[ikv], 0, ggml_nrows(sums->sums[ikv]));
    }
    for (const auto & store : stores) {
        visit_rows(out, *store, held.cell);
    }

    const uint8_t carried = shared.archive_in_states && remembers();
    out.field(carried);
    if (carried) {
        for (const auto * pos : { &archived.pos(), &archived.lost() }) {
            const uint32_t n = pos->size();
            out.field(n);
            out.list(*pos, n);
        }
        archived.visit([&](const std::vector<uint8_t> & rows) { out.write(rows.data(), rows.size()); }, out.counts_only());
    }
}

// What was archived; where there is no archive here or it has no room, it is read and let go.
void sequence::read_archive(state_reader & in) {
    uint8_t carried;
    in.field(carried);
    if (carried > 1) {
        damaged("it neither has an archive nor lacks one");
    }
    if (!carried) {
        return;
    }
    const bool sharing = shares_positions(shared);
    const auto disordered = [&](llama_pos before, llama_pos after) { return sharing ? before > after : before >= after; };
    int64_t n_left = n_gone;
    const auto positions = [&] {
        uint32_t n;
        in.field(n);
        if (n > n_left) {
            damaged("its archive has more tokens than were seen");
        }
        n_left -= n;
        std::vector<llama_pos> pos;
        in.list(pos, n);
        if (n > 0 && (pos.front() < 0 || pos.back() >= tail_start + sharing || std::adjacent_find(pos.begin(), pos.end(), disordered) != pos.end())) {
            damaged("archived positions are out of order");
        }
        return pos;
    };
    const std::vector<llama_pos> pos = positions(), lost = positions();
    if (pos.empty() || n_left > 0) {
        damaged("its archive lacks tokens");
    }
    const auto next = [&](size_t, size_t, uint32_t, uint8_t * rows, size_t size) { in.read(rows, size); };
    try {
        if (shared.space) {
            archived.add(shared.space, pos, next);
            archived.add_lost(lost);
            return;
        }
    } catch (const archive_full & e) {
        LLAMA_LOG_WARN("laprox: what was evicted from sequence %u can't come back: %s\n", id, e.what());
    }
    archived.skip(pos.size(), next);
}

void sequence::read(state_reader & in) {
    books b {};
    std::vector<layer_store::positions> kept;
    std::vector<std::vector<llama_pos> *> kept_of_heads;
    for (const layer_info & layer : shared.layers) {
        kept.emplace_back(layer.n_head_kv);
    }
    for (auto & heads : kept) {
        for (auto & pos : heads) {
            kept_of_heads.push_back(&pos);
        }
    }
    visit(in, shared, b, kept_of_heads);
    std::vector<head_bias> biases;
    for (const layer_info & layer : shared.layers) {
        biases.emplace_back();
        visit_bias(in, biases.back(), layer.n_head_kv, b);
    }

    in.field(b.n_queries);
    if (b.n_queries > max_window) {
        damaged("it has more queries than a window can have");
    }
    for (uint32_t i = 0; i < b.n_queries; i++) {
        llama_pos pos;
        in.field(pos);
        if (pos < 0 || pos > max_position) {
            damaged("a query has no position");
        }
        visit_query(in, window.take(&pos, 1).front());
    }
    in.field(b.summed);
    if (b.summed > 1) {
        damaged("it neither has sums of queries nor lacks them");
    }
    for (size_t ikv = 0; b.summed && ikv < stores.size(); ikv++) {
        const layer_info & layer = shared.layers[ikv];
        if (sums) {
            in.rows(sums->sums[ikv], 0, ggml_nrows(sums->sums[ikv]));
        } else { // another policy has no use for them
            std::vector<float> unused((size_t) layer.d_k*(layer.d_k + 2)*layer.n_head);
            in.read(unused.data(), unused.size()*sizeof(float));
        }
    }
    const uint32_t n_cells = b.tail.size();
    std::vector<uint32_t> first_cells(n_cells);
    std::iota(first_cells.begin(), first_cells.end(), 0);
    std::vector<std::unique_ptr<layer_store>> fresh;
    for (size_t ikv = 0; ikv < stores.size(); ikv++) {
        fresh.push_back(std::make_unique<layer_store>(shared.layers[ikv], std::move(kept[ikv]), std::min<uint32_t>(shared.kv_size, GGML_PAD(n_cells + 1, tail_block)), std::move(biases[ikv])));
        visit_rows(in, *fresh.back(), first_cells);
    }
    replace_all(std::move(fresh));
    tail_start   = b.tail_start;
    n_gone       = b.n_absorbed;
    chosen_for   = b.chosen_for;
    gen_begin    = b.gen_begin;
    compressions = b.n_absorbed > 0;
    by_queries   = b.n_absorbed > 0; // who knows

    for (uint32_t cell = 0; cell < n_cells; cell++) {
        cells.pos_set(cell, b.tail[cell].pos);
        cells.ext_set(cell, b.tail[cell].ext);
        cells.seq_add(cell, (llama_seq_id) id);
    }
    cell_head = n_cells;
    gen_end   = next_position();
    turn_start = std::min(b.turn_start, next_position());
    if (sums && !b.summed) {
        sums->begin = next_position();
    }
    read_archive(in);
}

//
// the cache
//

void cache::state_write(llama_io_write_i & io, llama_seq_id seq_id) {
    state_writer out(io);
    out.put(state_magic);
    out.put(state_version);
    out.put(print);
    visit_layout(all, [&](const char *, int64_t value) { out.put(value); });
    const auto written = sequences_of(seq_id);
    out.put((uint32_t) written.size());
    for (const sequence * seq : written) {
        seq->write(out);
    }
    out.finish();
    if (auto * frame = dynamic_cast<framed_writer *>(&io)) {
        frame->begin_rest();
    }
}

// What of another model's name may be shown, whatever is in the file.
static std::string printable(const std::array<char, 17> & text) {
    std::string result(text.begin(), text.end() - 1);
    std::replace_if(result.begin(), result.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
    return result;
}

void cache::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    const auto targets = sequences_of(seq_id);
    const auto empty   = [&] {
        for (sequence * seq : targets) {
            seq->clear();
        }
    };
    empty();
    try {
        state_reader in(io);
        if (in.get<uint32_t>() != state_magic) {
            throw std::runtime_error("the saved state is not one of a compressing cache (it may be one of stock llama.cpp)");
        }
        expect("the format version", in.get<uint32_t>(), state_version);
        const auto saved_print = in.get<std::array<char, 17>>();
        if (saved_print != print) {
            throw std::runtime_error("the saved state is of another model (" + printable(saved_print) +
                    " there, " + print.data() + " here)");
        }
        visit_layout(all, [&](const char * what, int64_t here) { expect(what, in.get<int64_t>(), here); });
        expect("the number of sequences", in.get<uint32_t>(), targets.size());
        for (sequence * seq : targets) {
            seq->read(in);
        }
        in.finish();
        if (auto * frame = dynamic_cast<framed_reader *>(&io)) {
            frame->begin_rest();
        }
    } catch (const std::exception & e) {
        empty();
        set_last_error(e.what());
        throw;
    }
}

}
