#include "engine/sequence.h"
#include "engine/projection.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

namespace laprox {

size_t common::bytes_for(const std::vector<std::vector<uint32_t>> & n_kept, uint32_t n_tail) const {
    size_t bytes = 0;
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        bytes += layer_store::bytes_for(layers[ikv], n_kept[ikv], n_tail);
    }
    return bytes;
}

static std::vector<std::unique_ptr<layer_store>> empty_stores(const common & shared, uint32_t n_tail) {
    std::vector<std::unique_ptr<layer_store>> stores;
    for (const layer_info & layer : shared.layers) {
        stores.push_back(std::make_unique<layer_store>(layer, layer_store::positions(layer.n_head_kv), n_tail));
    }
    return stores;
}

sequence::sequence(const llama_model & model, const common & shared, uint32_t id, llama_kv_cells & cells, uint32_t & cell_head) :
        shared(shared), id(id),
        // drafts that are taken back don't cost queries of the window: there is room for as many beside it
        window(shared.layers, shared.config.window, shared.config.window + std::min(shared.config.window, max_drafts)),
        cells(cells), cell_head(cell_head),
        stores(empty_stores(shared, shared.grows() ? tail_block : std::max(shared.kv_size/tail_block*tail_block, tail_block))) {
    archive::layout row_bytes;
    std::vector<uint32_t> n_heads;
    for (size_t ikv = 0; ikv < stores.size(); ikv++) {
        row_bytes.emplace_back();
        for (const ggml_tensor * pool : stores[ikv]->pools) {
            row_bytes.back().push_back(pool->nb[1]);
        }
        n_heads.push_back(shared.layers[ikv].n_head_kv);
    }
    archived.set_layout(std::move(row_bytes), std::move(n_heads));
    if (shared.config.evicts() && shared.config.policy.score->needs == need::all_queries) {
        sums = std::make_unique<query_stats>(model, shared.layers);
    }
}

//
// tokens
//

int64_t sequence::n_kept() const {
    int64_t n = 0;
    for (const auto & store : stores) {
        for (const auto & pos : store->kept) {
            n += (int64_t) pos.size();
        }
    }
    return n;
}

llama_pos sequence::last_position() const {
    const llama_pos tail = cells.seq_pos_max(id);
    return tail < 0 && n_gone > 0 ? tail_start - 1 : tail;
}

llama_pos sequence::next_before(llama_pos p0) const {
    llama_pos next = 0;
    for (uint32_t cell = 0; cell < used_cells(); cell++) {
        if (!cells.is_empty(cell) && cells.pos_get(cell) < p0) {
            next = std::max(next, cells.pos_get(cell) + 1);
        }
    }
    if (next > 0 || n_gone == 0) {
        return next;
    }
    const auto & gone = archived.pos();
    const auto after  = std::lower_bound(gone.begin(), gone.end(), p0);
    return after != gone.begin() ? *(after - 1) + 1 : std::min(p0, tail_start);
}

// Positions before the tail can't be removed one by one, so they don't count as held: llama.cpp's callers then
// evaluate again instead of cutting there.
llama_pos sequence::first_position() const {
    const llama_pos tail = cells.seq_pos_min(id);
    if (remembers()) {
        return archived.pos().front();
    }
    return tail < 0 && n_gone > 0 ? tail_start - 1 : tail;
}

bool sequence::remembers() const {
    const bool stored = n_gone > 0 && !archived.pos().empty() && (int64_t) archived.n_seen() == n_gone;
    return stored && config().recall > 0 && config().policy.recalls();
}

tail_view sequence::tail() const {
    tail_view result;
    for (uint32_t cell = 0; cell < used_cells(); cell++) {
        if (!cells.is_empty(cell)) {
            result.cell.push_back(cell);
        }
    }
    const auto earlier = [&](uint32_t a, uint32_t b) { return cells.pos_get(a) < cells.pos_get(b); };
    if (!std::is_sorted(result.cell.begin(), result.cell.end(), earlier)) {
        std::stable_sort(result.cell.begin(), result.cell.end(), earlier);
    }
    for (uint32_t cell : result.cell) {
        result.pos.push_back(cells.pos_get(cell));
    }
    return result;
}

bool sequence::can_remove(llama_pos p0, llama_pos p1) const {
    const bool to_the_end = p1 < 0 || p1 > last_position();
    return !reaches_in(p0, p1) || covers(p0, p1) || (remembers() && to_the_end && shared.lctx && !archived.shares_positions(p0));
}

// Tokens from there on are gone.
void sequence::forget_probe(llama_pos p0) {
    if (probed && p0 < probed->n_text) {
        probed.reset();
    } else if (probed) {
        probed->next = std::min(probed->next, p0);
    }
}

// Those of drafts stay in the sums, in place of the few that come: taking back a share would cost more than a token.
void sequence::forget_queries(llama_pos p0, llama_pos p1) {
    window.remove(p0, p1);
    const bool to_the_end = p1 < 0 || p1 > last_position();
    const bool comes      = computing || p0 == comes_again;
    computing = false;
    if (sums && to_the_end && !comes && next_position() - p0 > max_drafts) {
        if (shared.lctx) {
            shared.lctx->synchronize();
        }
        sums->cut(std::max(n_summable(p0), 0));
    }
}

void sequence::remove(llama_pos p0, llama_pos p1) {
    if (covers(p0, p1)) {
        clear();
        return;
    }
    scores.clear();
    forget_probe(p0);
    if (unplaced) {
        window.set_positions(unplaced->window);
        gen_begin    = unplaced->gen_begin;
        gen_end      = unplaced->gen_end;
        chosen_early = unplaced->chosen_early;
        unplaced.reset();
    }
    forget_queries(p0, p1);
    uint32_t first = cells.size();
    for (uint32_t cell = 0; cell < cells.size(); cell++) {
        if (cells.pos_in(cell, std::max(p0, 0), p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1)) {
            cells.rm(cell);
            first = std::min(first, cell);
        }
    }
    cell_head = std::min(cell_head, first);
    gen_begin = std::min(gen_begin, next_position());
    gen_end   = std::min(gen_end, next_position());
    turn_start = std::min(turn_start, next_position());
}

void sequence::cut(llama_pos p0, std::vector<std::unique_ptr<layer_store>> fresh) {
    archived.cut(p0);
    n_gone     = archived.n_seen();
    archived.trim(shared.space);
    tail_start = n_gone > 0 ? p0 : 0;
    chosen_for = std::min(chosen_for, p0); // what comes now is new, however long the text was before
    forget_queries(p0, -1);
    cells.reset();
    cell_head = 0;
    replace_all(std::move(fresh));
    remove(p0, -1); // counts
}

void sequence::clear() {
    const bool compressed = n_gone > 0 || compressions > 0;
    // what llama.cpp would have allocated at the start stays, as it does there, until a compression has given it back
    const bool grown = shared.grows() && tail_rows() > tail_block;
    const bool on_device = std::any_of(shared.layers.begin(), shared.layers.end(), [](const layer_info & layer) {
        return !ggml_backend_buft_is_host(layer.buft);
    });
    if (shared.lctx && (compressed || grown || sums || on_device)) {
        shared.lctx->synchronize();
    }
    cells.reset();
    cell_head    = 0;
    tail_start   = 0;
    n_gone       = 0;
    archived.clear();
    probed.reset();
    chosen_for   = 0;
    turn_start   = 0;
    gen_begin    = -1;
    chosen_early = false;
    n_wanted     = 0;
    compressions = recalls = n_recalled = 0;
    passes       = 0;
    by_queries   = false;
    times_us     = {};
    if (sums) {
        sums->clear();
    }
    window.clear();
    unplaced.reset();
    computing   = false;
    comes_again = -1;
    scores.clear();
    for (auto & store : stores) {
        store->drop_kept();
    }
    if (!compressed && !grown) {
        for (auto & store : stores) {
            if (on_device) { // a state can be forged so that what follows it isn't numbers
                store->zero();
            }
        }
        return;
    }
    n_storages++;
    try {
        replace_all(empty_stores(shared, tail_block));
    } catch (const std::exception & e) {
        LLAMA_LOG_WARN("laprox: an empty sequence keeps its %.2f MiB: %s\n", bytes()/1048576.0, e.what());
    }
}

void sequence::copy(const sequence & from) {
    clear();
    if (shared.lctx) {
        shared.lctx->synchronize();
    }
    std::vector<std::unique_ptr<layer_store>> copies;
    for (size_t ikv = 0; ikv < stores.size(); ikv++) {
        const layer_store & store = from.store(ikv);
        copies.push_back(std::make_unique<layer_store>(shared.layers[ikv], store.kept, store.n_tail, store.bias));
        copies.back()->copy_rows(store);
    }
    window.copy(from.window);
    if (sums) {
        sums->copy(*from.sums);
    }
    replace_all(std::move(copies));
    tail_start   = from.tail_start;
    n_gone       = from.n_gone;
    archived         = from.archived;
    chosen_for   = from.chosen_for;
    turn_start   = from.turn_start;
    by_queries   = from.by_queries;
    gen_begin    = from.gen_begin;
    gen_end      = from.gen_end;
    chosen_early = from.chosen_early;
    scores       = from.scores;
    compressions = from.compressions;

    for (uint32_t cell = 0; cell < from.used_cells(); cell++) {
        if (!from.cells.is_empty(cell)) {
            cells.pos_set(cell, from.cells.pos_get(cell));
            cells.ext_set(cell, from.cells.ext_get(cell));
            cells.seq_add(cell, (llama_seq_id) id);
        }
    }
    cell_head = from.cell_head;
}

//
// a batch
//

void sequence::place(const llama_pos * pos, size_t n_tokens, bool generated) {
    scores.clear();
    unplaced = placement { window.get_positions(), gen_begin, gen_end, chosen_early };
    computing   = true;
    comes_again = -1;
    if (generated) {
        gen_end = pos[n_tokens - 1] + 1;
        chosen_early = chosen_early && gen_begin < 0; // a prompt's last token looks generated, too
    } else {
        gen_begin = -1; // laprox_prompt_done() will say when it is in
    }
    const size_t n_observed = std::min<size_t>(n_tokens, window.n_slots);
    placed_slots = window.take(pos + n_tokens - n_observed, n_observed);
}

void sequence::rewind_cells() {
    for (cell_head = 0; cell_head < used_cells() && !cells.is_empty(cell_head);) {
        cell_head++;
    }
}

//
// storage
//

uint32_t sequence::tail_rows() const {
    uint32_t n = shared.kv_size;
    for (const auto & store : stores) {
        n = std::min(n, store->n_tail);
    }
    return n;
}

std::vector<std::vector<uint32_t>> sequence::kept_lengths() const {
    std::vector<std::vector<uint32_t>> result;
    for (const auto & store : stores) {
        result.push_back(store->n_kept());
    }
    return result;
}

size_t sequence::bytes() const {
    size_t bytes = 0;
    for (const auto & store : stores) {
        bytes += store->bytes();
    }
    return bytes;
}

void sequence::add_bytes(std::map<ggml_backend_buffer_type_t, size_t> & total) const {
    for (size_t ikv = 0; ikv < stores.size(); ikv++) {
        total[shared.layers[ikv].buft] += stores[ikv]->bytes() + window.rows.bytes(ikv) + (sums ? sums->sums.bytes(ikv) : 0);
    }
}

absorbed sequence::leaving(const std::vector<uint32_t> & cells_kept) const {
    absorbed gone;
    const tail_view all = tail();
    // the latest tokens stay
    gone.cell.assign(all.cell.begin(), all.cell.end() - cells_kept.size());
    gone.pos.assign(all.pos.begin(), all.pos.end() - cells_kept.size());
    return gone;
}

void sequence::absorb(const absorbed & gone, const std::vector<uint32_t> & cells_kept, std::vector<std::unique_ptr<layer_store>> fresh) {
    if (!gone.cell.empty()) {
        store_away(gone, fresh);
        tail_start  = cells.pos_get(cells_kept.front());
        n_gone += gone.cell.size();
    }
    const llama_kv_cells stay = cells.cp(cells_kept);
    cells.reset();
    cells.set(0, stay);
    cell_head = cells_kept.size();
    replace_all(std::move(fresh));
    scores.clear();
    chosen_for = turn_start = next_position();
    by_queries = !probed && config().policy.score && config().policy.score->by_queries();
    probed.reset();
    compressions++;
}

void sequence::replace(size_t ikv, std::unique_ptr<layer_store> fresh) {
    stores[ikv] = std::move(fresh);
    n_storages++;
}

void sequence::replace_all(std::vector<std::unique_ptr<layer_store>> fresh) {
    stores = std::move(fresh);
    n_storages++;
}

//
// looking inside
//

// Rows of a pool as float32, without llama.cpp's rotation.
static void read_rows(const ggml_tensor * pool, size_t first, const std::vector<uint32_t> & rows, float * dst, int64_t rotation) {
    if (rows.empty()) {
        return;
    }
    const size_t n = *std::max_element(rows.begin(), rows.end()) + 1;
    std::vector<uint8_t> bytes(n*pool->nb[1]);
    ggml_backend_tensor_get(pool, bytes.data(), first*pool->nb[1], bytes.size());
    for (uint32_t row : rows) {
        const uint8_t * src = bytes.data() + row*pool->nb[1];
        if (pool->type == GGML_TYPE_F32) {
            std::copy_n((const float *) src, pool->ne[0], dst);
        } else {
            ggml_get_type_traits(pool->type)->to_float(src, dst, pool->ne[0]);
        }
        if (rotation) {
            hadamard_rotate(dst, pool->ne[0], rotation);
        }
        dst += pool->ne[0];
    }
}

void sequence::entries(size_t ikv, uint32_t head, float * k, float * v) const {
    const layer_info  & layer = shared.layers[ikv];
    const layer_store & held  = store(ikv);
    const std::vector<uint32_t> rows = held.rows_of(head, tail());
    if (k) {
        read_rows(held.k, held.held_row(head), rows, k, shared.rotated_k ? rotation_block_k(layer.d_k) : 0);
    }
    if (v) {
        read_rows(held.v, held.held_row(head), rows, v, shared.rotated_v ? rotation_block_v(layer.d_v) : 0);
    }
}

void sequence::queries(size_t ikv, const observed & which, float * q) const {
    const layer_info  & layer = shared.layers[ikv];
    const ggml_tensor * rows  = window.rows[ikv];
    for (uint32_t slot : which.slot) {
        ggml_backend_tensor_get(rows, q, slot*rows->nb[1], rows->nb[1]);
        for (uint32_t head = 0; head < layer.n_head; head++, q += layer.d_k) {
            if (shared.rotated_k) {
                hadamard_rotate(q, layer.d_k, rotation_block_k(layer.d_k));
            }
        }
    }
}

laprox_stats sequence::stats() const {
    laprox_stats result {};
    result.tokens_seen  = n_seen();
    result.entries_full = n_seen()*shared.n_pairs;
    result.entries_held = n_held();
    result.kv_bytes     = bytes();
    for (size_t ikv = 0; ikv < stores.size(); ikv++) {
        const layer_info & layer = shared.layers[ikv];
        result.kv_bytes_full += n_seen()*layer.n_head_kv*layer.kv_row_bytes();
        result.window_bytes  += ggml_nbytes(window.rows[ikv]) + (sums ? ggml_nbytes(sums->sums[ikv]) : 0);
    }
    result.compressions     = compressions;
    result.recalls          = recalls;
    result.entries_recalled = n_recalled;
    result.archived_entries = archived.pos().size()*shared.n_pairs;
    result.archived_bytes   = archived.bytes();
    result.tokens_lost      = n_gone - (int64_t) archived.pos().size();
    result.score_seconds   = times_us[0]/1e6;
    result.select_seconds  = times_us[1]/1e6;
    result.compact_seconds = times_us[2]/1e6;
    return result;
}

void sequence::add_times(int64_t score_us, int64_t select_us, int64_t compact_us) {
    times_us[0] += score_us;
    times_us[1] += select_us;
    times_us[2] += compact_us;
}

}
