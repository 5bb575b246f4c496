// Saving and restoring what streams hold: a compressed sequence is as small in a file as in memory.

#include "engine/cache.h"

#include "llama-context.h"
#include "llama-io.h"

#include <algorithm>
#include <stdexcept>

namespace laprox {

static const uint32_t state_magic   = 0x5358504c; // "LPXS"
static const uint32_t state_version = 1;

template <typename T> static void put(llama_io_write_i & io, const T & value) {
    io.write(&value, sizeof(value));
}

template <typename T> static T get(llama_io_read_i & io) {
    T value;
    io.read(&value, sizeof(value));
    return value;
}

static void expect(const char * what, int64_t saved, int64_t here) {
    if (saved != here) {
        throw std::runtime_error("the saved state doesn't fit this context: " + std::string(what) + " is " + std::to_string(saved) +
                " there and " + std::to_string(here) + " here");
    }
}

// The layout that two contexts must share; visited alike by writing and reading.
template <typename F> static void visit_layout(const std::vector<layer_info> & layers, F field) {
    field("the number of compressed layers", layers.size());
    for (const layer_info & layer : layers) {
        field("a layer's index",        layer.il);
        field("the number of KV heads", layer.n_head_kv);
        field("the key head size",      layer.d_k);
        field("the value head size",    layer.d_v);
        field("the K cache type",       layer.type_k);
        field("the V cache type",       layer.type_v);
    }
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
    put(io, state_magic);
    put(io, state_version);
    visit_layout(layers, [&](const char *, int64_t value) { put(io, value); });
    put(io, (uint32_t) (seq_id < 0 ? streams.size() : 1));

    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (seq_id >= 0 && seq_to_stream[seq_id] != strm) {
            continue;
        }
        const stream & st = streams[strm];
        const std::vector<uint32_t> tail = cells_by_position(strm);

        put(io, st.tail_begin);
        put(io, st.n_absorbed);
        put(io, (uint32_t) tail.size());
        for (uint32_t cell : tail) {
            put(io, cells[strm].pos_get(cell));
            put(io, cells[strm].ext_get(cell));
        }
        for (const auto & layer_kept : st.kept) {
            for (const auto & head_kept : layer_kept) {
                put(io, (uint32_t) head_kept.size());
                io.write(head_kept.data(), head_kept.size()*sizeof(llama_pos));
            }
        }
        for (size_t ikv = 0; ikv < layers.size(); ikv++) {
            const layer_store & store = *st.layers[ikv];
            for (ggml_tensor * pool : { store.k, store.v }) {
                for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
                    io.write_tensor(pool, store.held_row(head)*pool->nb[1], store.n_kept[head]*pool->nb[1]);
                    for (const auto & [first, n] : runs_of(tail)) {
                        io.write_tensor(pool, (store.tail_row(head) + first)*pool->nb[1], n*pool->nb[1]);
                    }
                }
            }
        }
    }
}

void cache::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    std::vector<uint32_t> targets;
    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (seq_id < 0 || seq_to_stream[seq_id] == strm) {
            targets.push_back(strm);
            cells[strm].reset();
            cell_heads[strm] = 0;
            forget(strm);
        }
    }
    try {
        if (get<uint32_t>(io) != state_magic) {
            throw std::runtime_error("the saved state is not one of a compressing cache (it may be one of stock llama.cpp)");
        }
        expect("the format version", get<uint32_t>(io), state_version);
        visit_layout(layers, [&](const char * what, int64_t here) { expect(what, get<int64_t>(io), here); });
        expect("the number of sequences", get<uint32_t>(io), targets.size());
        for (uint32_t strm : targets) {
            read_stream(io, strm, seq_id);
        }
    } catch (const std::exception & e) {
        io.discard(); // reads into storage that is about to go
        for (uint32_t strm : targets) {
            cells[strm].reset();
            streams[strm].n_absorbed = std::max<int64_t>(streams[strm].n_absorbed, 1); // its storage is not to be kept
            forget(strm);
        }
        set_last_error(e.what());
        throw;
    }
}

void cache::read_stream(llama_io_read_i & io, uint32_t strm, llama_seq_id seq_id) {
    const auto damaged = [](const char * what) { throw std::runtime_error(std::string("the saved state is damaged: ") + what); };

    const auto tail_begin = get<llama_pos>(io);
    const auto n_absorbed = get<int64_t>(io);
    const auto n_cells    = get<uint32_t>(io);
    if (tail_begin < 0 || n_absorbed < 0 || (n_absorbed > 0) != (tail_begin > 0)) {
        damaged("its token counts disagree");
    }
    if (n_cells > kv_size) {
        throw std::runtime_error("the saved state has " + std::to_string(n_cells) + " recent tokens, the context has room for " + std::to_string(kv_size));
    }

    llama_kv_cells tail;
    tail.resize(n_cells);
    for (uint32_t cell = 0; cell < n_cells; cell++) {
        const auto pos = get<llama_pos>(io);
        const auto ext = get<llama_kv_cell_ext>(io);
        if (pos < tail_begin) {
            damaged("a recent token lies before the compressed ones");
        }
        tail.pos_set(cell, pos);
        tail.ext_set(cell, ext);
        // a whole-context state has one sequence per stream
        for (uint32_t seq = 0; seq < seq_to_stream.size(); seq++) {
            if (seq_id < 0 ? seq_to_stream[seq] == strm : seq_id == (llama_seq_id) seq) {
                tail.seq_add(cell, seq);
                break;
            }
        }
    }

    std::vector<std::vector<std::vector<llama_pos>>> kept(layers.size());
    std::vector<std::vector<uint32_t>> lengths(layers.size());
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
            const auto n = get<uint32_t>(io);
            if (n > n_absorbed) {
                damaged("a head holds more entries than tokens were seen");
            }
            std::vector<llama_pos> pos(n);
            io.read(pos.data(), n*sizeof(llama_pos));
            if (!std::is_sorted(pos.begin(), pos.end()) || (n > 0 && (pos.front() < 0 || pos.back() >= tail_begin))) {
                damaged("kept positions are out of order");
            }
            lengths[ikv].push_back(n);
            kept[ikv].push_back(std::move(pos));
        }
    }

    stream & st = streams[strm];
    const uint32_t n_tail = std::min<uint32_t>(kv_size, GGML_PAD(n_cells + 1, 256));
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        st.layers[ikv].reset();
        st.layers[ikv] = std::make_unique<layer_store>(layers[ikv], lengths[ikv], n_tail);
        const layer_store & store = *st.layers[ikv];
        for (ggml_tensor * pool : { store.k, store.v }) {
            for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
                io.read_tensor(pool, store.held_row(head)*pool->nb[1], ((size_t) store.n_kept[head] + n_cells)*pool->nb[1]);
            }
        }
    }
    st.kept       = std::move(kept);
    st.tail_begin = tail_begin;
    st.n_absorbed = n_absorbed;
    st.n_compressions = n_absorbed > 0;
    st.generation++;

    cells[strm].set(0, tail);
    cell_heads[strm] = n_cells;
}

}
