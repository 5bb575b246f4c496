// Saving and restoring what streams hold: a compressed sequence is as small in a file as in memory.

#include "engine/cache.h"
#include "engine/state_io.h"

#include "llama-context.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

namespace laprox {

static const uint32_t state_magic   = 0x5358504c; // "LPXS"
static const uint32_t state_version = 3;

// Far above any text, and low enough to count on from.
static const llama_pos max_position = std::numeric_limits<llama_pos>::max() - (1 << 24);

static void expect(const char * what, int64_t saved, int64_t here) {
    if (saved != here) {
        throw std::runtime_error("the saved state doesn't fit this context: " + std::string(what) + " is " + std::to_string(saved) +
                " there and " + std::to_string(here) + " here");
    }
}

// The layout that two contexts must share; visited alike by writing and reading.
template <typename F> void cache::visit_layout(F field) const {
    field("the number of compressed layers", layers.size());
    for (const layer_info & layer : layers) {
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
    field("a rotation of keys (1: yes)",   rotated_k);
    field("a rotation of values (1: yes)", rotated_v);
}

// Runs of neighbouring cells, as (first cell, number of cells).
static std::vector<std::pair<uint32_t, uint32_t>> runs_of(const std::vector<uint32_t> & cells) {
    std::vector<std::pair<uint32_t, uint32_t>> runs;
    for (uint32_t cell : cells) {
        if (!runs.empty() && runs.back().first + runs.back().second == cell) {
            runs.back().second++;
        } else {
            runs.emplace_back(cell, 1);
        }
    }
    return runs;
}

void cache::state_write(llama_io_write_i & io, llama_seq_id seq_id) const {
    state_writer out(io);
    out.put(state_magic);
    out.put(state_version);
    out.put(print);
    visit_layout([&](const char *, int64_t value) { out.put(value); });
    out.put((uint32_t) (seq_id < 0 ? streams.size() : 1));

    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (seq_id >= 0 && seq_id != (llama_seq_id) strm) {
            continue;
        }
        const stream & st = streams[strm];
        const std::vector<uint32_t> tail = cells_by_position(strm);

        out.put(st.tail_begin);
        out.put(st.n_absorbed);
        out.put(st.compressed_for);
        out.put(st.gen_begin);
        out.put(n_kept(strm));
        out.put((uint32_t) tail.size());
        for (uint32_t cell : tail) {
            out.put(cells[strm].pos_get(cell));
            out.put(cells[strm].ext_get(cell));
        }
        for (const auto & layer_kept : st.kept) {
            for (const auto & head_kept : layer_kept) {
                out.put((uint32_t) head_kept.size());
                out.write(head_kept.data(), head_kept.size()*sizeof(llama_pos));
            }
        }
        // the observation window, so that what was restored can be compressed again before new tokens come
        const std::vector<uint32_t> slots = window_slots(strm);
        out.put((uint32_t) slots.size());
        for (uint32_t slot : slots) {
            out.put(st.window_pos[slot]);
            for (const ggml_tensor * ring : windows) {
                out.rows(ring, (size_t) strm*n_slots + slot, 1);
            }
        }
        out.put(st.n_summed);
        if (st.n_summed > 0) {
            for (const ggml_tensor * sums : queries_seen->sums) {
                const size_t n = sums->ne[1]*sums->ne[2];
                out.rows(sums, strm*n, n);
            }
        }
        for (size_t ikv = 0; ikv < layers.size(); ikv++) {
            const layer_store & store = *st.layers[ikv];
            for (const ggml_tensor * pool : store.pools) {
                for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
                    out.rows(pool, store.held_row(head), store.n_kept[head]);
                    for (const auto & [first, n] : runs_of(tail)) {
                        out.rows(pool, store.tail_row(head) + first, n);
                    }
                }
            }
        }
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
    std::vector<uint32_t> targets;
    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (seq_id < 0 || seq_id == (llama_seq_id) strm) {
            targets.push_back(strm);
        }
    }
    const auto empty = [&] {
        for (uint32_t strm : targets) {
            forget(strm);
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
        visit_layout([&](const char * what, int64_t here) { expect(what, in.get<int64_t>(), here); });
        expect("the number of sequences", in.get<uint32_t>(), targets.size());
        for (uint32_t strm : targets) {
            read_stream(in, strm);
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

void cache::read_stream(state_reader & in, uint32_t strm) {
    const auto damaged = [](const char * what) { throw std::runtime_error(std::string("the saved state is damaged: ") + what); };
    // the tokens of an image may share a position
    const bool shared = hparams.n_pos_per_embd() > 1;
    const auto ascending = [&](const std::vector<llama_pos> & pos) {
        const auto wrong = [&](llama_pos a, llama_pos b) { return shared ? a > b : a >= b; };
        return std::adjacent_find(pos.begin(), pos.end(), wrong) == pos.end();
    };

    const auto tail_begin = in.get<llama_pos>();
    const auto n_absorbed = in.get<int64_t>();
    const auto compressed_for = in.get<llama_pos>();
    const auto gen_begin  = in.get<llama_pos>();
    const auto n_entries  = in.get<int64_t>();
    const auto n_cells    = in.get<uint32_t>();
    if (tail_begin < 0 || tail_begin > max_position || n_absorbed < 0 || n_absorbed > (shared ? max_position : tail_begin) ||
            (n_absorbed == 0 && tail_begin > 0) || compressed_for < tail_begin || compressed_for > max_position ||
            gen_begin < -1 || gen_begin > max_position || n_entries < 0 || n_entries > n_absorbed*n_pairs) {
        damaged("its token counts disagree");
    }
    const int64_t n_held = (n_entries + n_pairs - 1)/n_pairs + n_cells; // per KV head
    if (n_cells > kv_size || n_held > most_held()) {
        throw std::runtime_error("the saved state holds " + std::to_string(n_held) + " tokens per KV head, " + std::to_string(n_cells) +
                " of them recent, the context has room for " + std::to_string(kv_size) + "; accepted: a context (-c, n_ctx) of at least " +
                std::to_string(GGML_PAD(n_held, 256)) + " tokens per sequence");
    }

    llama_kv_cells tail;
    tail.resize(n_cells);
    std::vector<llama_pos> tail_pos;
    for (uint32_t cell = 0; cell < n_cells; cell++) {
        const auto pos = in.get<llama_pos>();
        const auto ext = in.get<llama_kv_cell_ext>();
        if (pos < tail_begin || pos > max_position) {
            damaged("a recent token lies before the compressed ones, or beyond any text");
        }
        tail.pos_set(cell, pos);
        tail.ext_set(cell, ext);
        tail.seq_add(cell, (llama_seq_id) strm);
        tail_pos.push_back(pos);
    }
    if (!ascending(tail_pos)) {
        damaged("recent positions are out of order");
    }

    std::vector<std::vector<std::vector<llama_pos>>> kept(layers.size());
    std::vector<std::vector<uint32_t>> lengths(layers.size());
    int64_t n_read = 0;
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
            const auto n = in.get<uint32_t>();
            n_read += n;
            if (n > n_absorbed || n_read > n_entries) {
                damaged("a head holds more entries than tokens were seen");
            }
            std::vector<llama_pos> pos = in.list<llama_pos>(n);
            if (!ascending(pos) || (n > 0 && (pos.front() < 0 || pos.back() >= tail_begin + shared))) {
                damaged("kept positions are out of order");
            }
            lengths[ikv].push_back(n);
            kept[ikv].push_back(std::move(pos));
        }
    }
    if (n_read != n_entries) {
        damaged("its numbers of entries disagree");
    }

    stream & st = streams[strm];
    const auto n_queries = in.get<uint32_t>();
    if (n_queries > max_window) {
        damaged("it has more queries than a window can have");
    }
    for (uint32_t i = 0; i < n_queries; i++) {
        const auto pos = in.get<llama_pos>();
        if (pos < 0 || pos > max_position) {
            damaged("a query has no position");
        }
        const uint32_t slot = free_slots(strm, 1).front();
        st.window_pos[slot] = pos;
        for (ggml_tensor * ring : windows) {
            in.rows(ring, (size_t) strm*n_slots + slot, 1);
        }
    }
    const auto n_summed = in.get<int64_t>();
    if (n_summed < 0 || n_summed > (int64_t) 1 << 40) {
        damaged("its number of queries summed up is none");
    }
    for (size_t ikv = 0; n_summed > 0 && ikv < layers.size(); ikv++) {
        const size_t n = (size_t) (layers[ikv].d_k + 1)*layers[ikv].n_head;
        if (queries_seen) {
            in.rows(queries_seen->sums[ikv], strm*n, n);
        } else { // another policy has no use for them
            std::vector<float> unused(n*layers[ikv].d_k);
            in.read(unused.data(), unused.size()*sizeof(float));
        }
    }
    st.n_summed = queries_seen ? n_summed : 0;

    std::vector<std::unique_ptr<layer_store>> fresh;
    const uint32_t n_tail = std::min<uint32_t>(kv_size, GGML_PAD(n_cells + 1, tail_block));
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        fresh.push_back(std::make_unique<layer_store>(layers[ikv], lengths[ikv], n_tail));
        const layer_store & store = *fresh.back();
        for (ggml_tensor * pool : store.pools) {
            for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
                in.rows(pool, store.held_row(head), (size_t) store.n_kept[head] + n_cells);
            }
        }
    }
    replace_storage(strm, std::move(fresh));
    st.kept       = std::move(kept);
    st.tail_begin = tail_begin;
    st.n_absorbed = n_absorbed;
    st.compressed_for = compressed_for;
    st.gen_begin  = gen_begin;
    st.n_compressions = n_absorbed > 0;

    cells[strm].set(0, tail);
    cell_heads[strm] = n_cells;
    st.gen_end = next_position(strm);
}

}
