// Saving and restoring what streams hold: a compressed sequence is as small in a file as in memory.

#include "engine/cache.h"

#include "llama-context.h"
#include "llama-io.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <stdexcept>

namespace laprox {

static const uint32_t state_magic   = 0x5358504c; // "LPXS"
static const uint32_t state_version = 3;

// Everything goes through the host and a checksum: a bit flipped in a file must not become a changed memory.
class checksum {
public:
    // In whatever pieces the data come.
    void add(const void * data, size_t size) {
        const uint8_t * bytes = (const uint8_t *) data;
        for (; size > 0 && n_pending > 0; size--) {
            pend(*bytes++);
        }
        for (; size >= sizeof(uint64_t); bytes += sizeof(uint64_t), size -= sizeof(uint64_t)) {
            uint64_t word;
            memcpy(&word, bytes, sizeof(word));
            mix(word);
        }
        for (; size > 0; size--) {
            pend(*bytes++);
        }
    }

    uint64_t result() const {
        checksum last = *this;
        last.mix(pending);
        return last.value;
    }

private:
    void pend(uint8_t byte) {
        pending |= (uint64_t) byte << 8*n_pending;
        if (++n_pending == sizeof(pending)) {
            mix(pending);
            pending   = 0;
            n_pending = 0;
        }
    }

    void mix(uint64_t word) {
        value = (value ^ word)*0x9e3779b97f4a7c15;
        value ^= value >> 29;
    }

    uint64_t value     = 0xcbf29ce484222325;
    uint64_t pending   = 0; // bytes that don't fill a word yet
    uint32_t n_pending = 0;
};

class state_writer {
public:
    explicit state_writer(llama_io_write_i & io) : io(io) {}

    void write(const void * data, size_t size) {
        io.write(data, size);
        sum.add(data, size);
    }
    template <typename T> void put(const T & value) {
        write(&value, sizeof(value));
    }
    void rows(const ggml_tensor * t, size_t first, size_t n) {
        std::vector<uint8_t> bytes(n*t->nb[1]);
        if (!bytes.empty()) {
            ggml_backend_tensor_get(t, bytes.data(), first*t->nb[1], bytes.size());
            write(bytes.data(), bytes.size());
        }
    }
    void finish() {
        const uint64_t value = sum.result();
        io.write(&value, sizeof(value));
    }

private:
    llama_io_write_i & io;
    checksum sum;
};

class state_reader {
public:
    explicit state_reader(llama_io_read_i & io) : io(io) {}

    void read(void * data, size_t size) {
        io.read(data, size);
        sum.add(data, size);
    }
    template <typename T> T get() {
        T value;
        read(&value, sizeof(value));
        return value;
    }
    void rows(ggml_tensor * t, size_t first, size_t n) {
        std::vector<uint8_t> bytes(n*t->nb[1]);
        if (!bytes.empty()) {
            read(bytes.data(), bytes.size());
            ggml_backend_tensor_set(t, bytes.data(), first*t->nb[1], bytes.size());
        }
    }
    void finish() {
        uint64_t saved;
        io.read(&saved, sizeof(saved));
        if (saved != sum.result()) {
            throw std::runtime_error("the saved state is damaged: its checksum is wrong");
        }
    }

private:
    llama_io_read_i & io;
    checksum sum;
};

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
        field("the number of heads",    layer.n_head);
        field("the number of KV heads", layer.n_head_kv);
        field("the key head size",      layer.d_k);
        field("a mark by gates",        layer.gated);
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
    state_writer out(io);
    out.put(state_magic);
    out.put(state_version);
    out.put(print);
    visit_layout(layers, [&](const char *, int64_t value) { out.put(value); });
    out.put((uint32_t) (seq_id < 0 ? streams.size() : 1));

    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (seq_id >= 0 && seq_to_stream[seq_id] != strm) {
            continue;
        }
        const stream & st = streams[strm];
        const std::vector<uint32_t> tail = cells_by_position(strm);

        out.put(st.tail_begin);
        out.put(st.n_absorbed);
        out.put(st.compressed_for);
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
}

void cache::state_read(llama_io_read_i & io, llama_seq_id seq_id) {
    std::vector<uint32_t> targets;
    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (seq_id < 0 || seq_to_stream[seq_id] == strm) {
            targets.push_back(strm);
        }
    }
    const auto empty = [&] {
        for (uint32_t strm : targets) {
            cells[strm].reset();
            cell_heads[strm] = 0;
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
            throw std::runtime_error("the saved state is of another model (" + std::string(saved_print.begin(), saved_print.end() - 1) +
                    " there, " + print.data() + " here)");
        }
        visit_layout(layers, [&](const char * what, int64_t here) { expect(what, in.get<int64_t>(), here); });
        expect("the number of sequences", in.get<uint32_t>(), targets.size());
        for (uint32_t strm : targets) {
            read_stream(in, strm, seq_id);
        }
        in.finish();
    } catch (const std::exception & e) {
        empty();
        set_last_error(e.what());
        throw;
    }
}

void cache::read_stream(state_reader & in, uint32_t strm, llama_seq_id seq_id) {
    const auto damaged = [](const char * what) { throw std::runtime_error(std::string("the saved state is damaged: ") + what); };

    const auto tail_begin = in.get<llama_pos>();
    const auto n_absorbed = in.get<int64_t>();
    const auto compressed_for = in.get<llama_pos>();
    const auto n_cells    = in.get<uint32_t>();
    if (tail_begin < 0 || n_absorbed < 0 || (n_absorbed > 0) != (tail_begin > 0) || compressed_for < tail_begin) {
        damaged("its token counts disagree");
    }
    if (n_cells > kv_size) {
        throw std::runtime_error("the saved state has " + std::to_string(n_cells) + " recent tokens, the context has room for " + std::to_string(kv_size));
    }

    // a whole-context state has one sequence per stream
    llama_seq_id owner = seq_id;
    for (uint32_t seq = 0; owner < 0 && seq < seq_to_stream.size(); seq++) {
        owner = seq_to_stream[seq] == strm ? (llama_seq_id) seq : -1;
    }
    llama_kv_cells tail;
    tail.resize(n_cells);
    for (uint32_t cell = 0; cell < n_cells; cell++) {
        const auto pos = in.get<llama_pos>();
        const auto ext = in.get<llama_kv_cell_ext>();
        if (pos < tail_begin) {
            damaged("a recent token lies before the compressed ones");
        }
        tail.pos_set(cell, pos);
        tail.ext_set(cell, ext);
        tail.seq_add(cell, owner);
    }

    std::vector<std::vector<std::vector<llama_pos>>> kept(layers.size());
    std::vector<std::vector<uint32_t>> lengths(layers.size());
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
            const auto n = in.get<uint32_t>();
            if (n > n_absorbed || n > kv_size) {
                damaged("a head holds more entries than tokens were seen");
            }
            std::vector<llama_pos> pos(n);
            in.read(pos.data(), n*sizeof(llama_pos));
            if (!std::is_sorted(pos.begin(), pos.end()) || (n > 0 && (pos.front() < 0 || pos.back() >= tail_begin))) {
                damaged("kept positions are out of order");
            }
            lengths[ikv].push_back(n);
            kept[ikv].push_back(std::move(pos));
        }
    }

    stream & st = streams[strm];
    const auto n_queries = in.get<uint32_t>();
    for (uint32_t i = 0; i < n_queries; i++) {
        const int64_t slot = st.n_observed++ % n_slots;
        st.window_pos[slot] = in.get<llama_pos>();
        for (ggml_tensor * ring : windows) {
            in.rows(ring, (size_t) strm*n_slots + slot, 1);
        }
    }
    const auto n_summed = in.get<int64_t>();
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
    const uint32_t n_tail = std::min<uint32_t>(kv_size, GGML_PAD(n_cells + 1, 256));
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        fresh.push_back(std::make_unique<layer_store>(layers[ikv], lengths[ikv], n_tail));
        const layer_store & store = *fresh.back();
        for (ggml_tensor * pool : store.pools) {
            for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
                in.rows(pool, store.held_row(head), (size_t) store.n_kept[head] + n_cells);
            }
        }
    }
    st.layers     = std::move(fresh);
    st.kept       = std::move(kept);
    st.tail_begin = tail_begin;
    st.n_absorbed = n_absorbed;
    st.compressed_for = compressed_for;
    st.n_compressions = n_absorbed > 0;
    st.generation++;

    cells[strm].set(0, tail);
    cell_heads[strm] = n_cells;
}

}
