#include "engine/recall.h"
#include "engine/compact.h"
#include "engine/compress.h"
#include "engine/sequence.h"

#include <algorithm>

namespace laprox {

entry_source::entry_source(const sequence & seq, scope what) : seq(seq), stored(what == scope::seen ? &seq.stored() : nullptr) {
}

const std::vector<llama_pos> & entry_source::kept(size_t ikv, uint32_t head) const {
    return stored ? stored->pos() : seq.store(ikv).kept[head];
}

uint32_t entry_source::row_of(size_t ikv, uint32_t head, size_t entry, const tail_view & tail) const {
    const size_t n_kept = kept(ikv, head).size();
    return entry < n_kept ? entry : n_kept + tail.cell[entry - n_kept];
}

std::vector<llama_pos> entry_source::positions_at(size_t ikv, uint32_t head, const std::vector<uint32_t> & rows) const {
    const auto & before = kept(ikv, head);
    std::vector<llama_pos> result;
    for (uint32_t row : rows) {
        result.push_back(row < before.size() ? before[row] : seq.position_in(row - before.size()));
    }
    return result;
}

head_bias entry_source::bias(size_t ikv) const {
    return stored ? head_bias {} : seq.store(ikv).bias;
}

const layer_store & entry_source::store(size_t ikv) const {
    const layer_store & own = seq.store(ikv);
    if (!stored) {
        return own;
    }
    made.reset(); // one layer at a time has room
    const layer_info & layer  = seq.shared.layers[ikv];
    const size_t   n      = stored->pos().size();
    const uint32_t n_used = std::min(seq.used_cells(), own.n_tail);
    made = std::make_unique<layer_store>(layer, layer_store::positions(layer.n_head_kv, stored->pos()), GGML_PAD(n_used + 1, tail_block));
    std::vector<uint8_t> rows;
    for (size_t pool = 0; pool < own.pools.size(); pool++) {
        const size_t size = own.pools[pool]->nb[1];
        rows.resize((n + n_used)*size);
        for (uint32_t head = 0; head < layer.n_head_kv; head++) {
            stored->read(ikv, pool, head, rows.data());
            ggml_backend_tensor_get(own.pools[pool], rows.data() + n*size, own.tail_row(head)*size, n_used*size);
            ggml_backend_tensor_set(made->pools[pool], rows.data(), made->held_row(head)*size, rows.size());
        }
    }
    return *made;
}

llama_pos recall(llama_context & lctx, sequence & seq, llama_pos from) {
    const llama_pos next = seq.next_position();
    // a byte budget has to hold the turn, too: at most half of it
    std::vector<std::vector<uint32_t>> nothing;
    for (const layer_info & layer : seq.shared.layers) {
        nothing.emplace_back(layer.n_head_kv, 0);
    }
    const auto tail_bytes = [&] { return seq.shared.bytes_for(nothing, GGML_PAD(next - from + 1, tail_block)); };
    while (seq.config().budget.unit == budget_unit::bytes && from < next && tail_bytes() > seq.byte_limit()/2) {
        from = std::min<llama_pos>(next, from + tail_block);
    }
    compress_turn(lctx, seq, from);
    return from;
}

void cut(llama_context & lctx, sequence & seq, llama_pos p0) {
    archive before = seq.stored(); // which it shares
    before.cut(p0);
    const auto & pos      = before.pos();
    const auto   index_of = [&](llama_pos p) { return (uint32_t) (std::lower_bound(pos.begin(), pos.end(), p) - pos.begin()); };
    const uint32_t n      = pos.size();
    const uint32_t recent = n - std::min<uint32_t>(seq.config().recent, n);
    selection keep;
    for (size_t ikv = 0; ikv < seq.shared.layers.size(); ikv++) {
        keep.rows.emplace_back();
        for (const auto & held : seq.store(ikv).kept) {
            std::vector<uint32_t> rows;
            for (auto p = held.begin(); p != held.end() && index_of(*p) < recent; p++) {
                if (pos[index_of(*p)] == *p) { // or the archive has lost it
                    rows.push_back(index_of(*p));
                }
            }
            for (uint32_t row = recent; row < n; row++) {
                rows.push_back(row);
            }
            keep.rows.back().push_back(std::move(rows));
        }
    }
    auto fresh = gather(lctx, entry_source(seq, before), keep, tail_block);
    before.clear(); // what nobody shares is shortened in place
    seq.cut(p0, std::move(fresh));
}

}
