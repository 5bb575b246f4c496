#include "engine/cache.h"
#include "engine/gates.h"
#include "engine/projection.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace laprox {

bool cache::wanted(const llama_model & model, const llama_hparams & hparams, bool v_trans, llama_swa_type swa_type,
        bool shares_cells, uint32_t kv_size) {
    // sliding-window layers are small already, and a draft model's view of another cache follows that one
    if (!enabled(model) || hparams.no_alloc || swa_type != LLAMA_SWA_TYPE_NONE || shares_cells) {
        return false;
    }
    const settings & s = model.laprox->config;
    std::string reason = reason_not_compressible(model);
    if (v_trans) {
        reason = "flash attention is off; the compressing cache needs it (accepted: flash_attn on, or policy off)";
    } else if (s.budget.unit == budget_unit::tokens && s.evicts() && s.budget.value > kv_size) {
        reason = "budget of " + std::to_string((int64_t) s.budget.value) + " tokens is larger than the context; accepted: at most " +
            std::to_string(kv_size);
    }
    if (!reason.empty()) {
        set_last_error(reason);
        throw std::runtime_error("laprox: " + reason);
    }
    return true;
}

cache::cache(const llama_model & model, const llama_hparams & hparams, const std::vector<uint32_t> & layer_ids,
        const std::unordered_map<int32_t, int32_t> & map_layer_ids, ggml_type type_k, ggml_type type_v, bool rotated_k, bool rotated_v, bool offload, uint32_t kv_size,
        uint32_t n_stream, llama_kv_cells_vec & cells, std::vector<uint32_t> & cell_heads) :
        model(model), hparams(hparams), config(model.laprox->config), gates(config.gate), rotated_k(rotated_k), rotated_v(rotated_v),
        kv_size(kv_size), cells(cells), cell_heads(cell_heads), streams(n_stream),
        // drafts that are taken back don't cost queries of the window: there is room for as many beside it
        n_slots(config.window + std::min(config.window, max_drafts)) {
    const auto refuse = [](const std::string & reason) {
        set_last_error(reason);
        throw std::runtime_error("laprox: " + reason);
    };

    for (uint32_t il : layer_ids) {
        if (hparams.n_head_kv(il) == 0) {
            continue; // a layer without attention (Deci) has a place in llama.cpp's cache, but nothing in it
        }
        layer_info layer {
            il, hparams.n_head(il), hparams.n_head_kv(il), hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), type_k, type_v, config.gate != nullptr,
            offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type(),
        };
        const auto check = [&](const char * which, ggml_type type, uint32_t d) {
            if (d % ggml_blck_size(type) != 0 || ggml_row_size(type, d) % sizeof(int32_t) != 0) {
                refuse(std::string(which) + " cache of type " + ggml_type_name(type) + " doesn't divide the head size " + std::to_string(d) +
                        " of layer " + std::to_string(il) + " into whole words; accepted: f16, bf16, f32");
            }
        };
        check("K", type_k, layer.d_k);
        check("V", type_v, layer.d_v);
        layers.push_back(layer);
        n_pairs += layer.n_head_kv;
    }
    for (const auto & [il, place] : map_layer_ids) {
        const auto is_owner = [&](const layer_info & layer) { return layer.il == layer_ids[place]; };
        const auto owner = std::find_if(layers.begin(), layers.end(), is_owner);
        if (owner != layers.end()) {
            layer_of[il] = owner - layers.begin();
        }
    }
    kq_scales.resize(layers.size());
    try {
        fingerprint(model).copy(print.data(), print.size() - 1);
    } catch (const std::exception &) {
        // a model without attention norms; its states are told by their layout alone
    }

    for (const layer_info & layer : layers) {
        ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true }) };
        windows.push_back(ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, (int64_t) layer.d_k*layer.n_head, n_slots, n_stream));
        ggml_format_name(windows.back(), "laprox_window_l%u", layer.il);
        ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), layer.buft) };
        if (!buffer) {
            refuse("no room on " + std::string(ggml_backend_buft_name(layer.buft)) + " for the observation window of " + std::to_string(config.window) + " queries");
        }
        ggml_backend_buffer_clear(buffer.get(), 0);
        window_buffers.emplace_back(std::move(ctx), std::move(buffer));
    }

    try {
        if (config.evicts() && config.policy.score->needs_all_queries) {
            queries_seen = std::make_unique<query_stats>(model, layers, n_stream);
        }
        for (uint32_t strm = 0; strm < n_stream; strm++) {
            reset_stream(strm);
        }
    } catch (const std::exception & e) {
        refuse(e.what());
    }

    LLAMA_LOG_INFO("%s: policy %s, %zu layers, %lld KV heads in all, %u streams, K (%s), V (%s), %.2f MiB\n", __func__,
            config.policy.name.c_str(), layers.size(), (long long) n_pairs, n_stream, ggml_type_name(type_k), ggml_type_name(type_v),
            stream_bytes(0)*n_stream/1048576.0);
}

// Empty storage. One sequence gets all the room its context allows, as llama.cpp does; several share what there
// is and grow as they are used.
void cache::reset_stream(uint32_t strm) {
    stream & st = streams[strm];
    const uint64_t generation = st.generation + 1;
    st = stream();
    st.generation = generation;
    st.window_pos.assign(n_slots, -1);

    const uint32_t n_tail = config.chunked || streams.size() > 1 ? 256 : std::max(tail_limit(strm), 256u);
    for (const layer_info & layer : layers) {
        const std::vector<uint32_t> nothing(layer.n_head_kv, 0);
        st.kept.emplace_back(layer.n_head_kv);
        st.layers.push_back(std::make_unique<layer_store>(layer, nothing, n_tail));
    }
}

void cache::clear() {
    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        forget(strm);
    }
}

// The sequence is gone, whatever becomes of its storage: that is given back where the device has room for less.
void cache::forget(uint32_t strm) {
    stream & st = streams[strm];
    const bool compressed = st.n_absorbed > 0 || st.n_compressions > 0;
    // what llama.cpp would have allocated at the start stays, as it does there, until a compression has given it back
    const bool grown = (config.chunked || streams.size() > 1) && tail_rows(strm) > tail_block;
    if (lctx && (compressed || grown || queries_seen)) {
        lctx->synchronize();
    }
    cells[strm].reset();
    cell_heads[strm] = 0;
    for (auto & layer_kept : st.kept) {
        layer_kept.assign(layer_kept.size(), {});
    }
    st.tail_begin = 0;
    st.n_absorbed = 0;
    st.compressed_for = 0;
    st.gen_begin  = -1;
    st.chosen_early = false;
    st.n_summed   = 0;
    st.n_wanted   = 0;
    st.n_compressions = 0;
    st.t_score_us = st.t_select_us = st.t_compact_us = 0;
    if (queries_seen) {
        queries_seen->clear(strm);
    }
    st.window_pos.assign(n_slots, -1);
    st.scores.clear();
    if (!compressed && !grown) {
        return;
    }
    for (auto & store : st.layers) {
        store->drop_kept();
    }
    st.generation++;
    try {
        std::vector<std::unique_ptr<layer_store>> fresh;
        for (const layer_info & layer : layers) {
            fresh.push_back(std::make_unique<layer_store>(layer, std::vector<uint32_t>(layer.n_head_kv, 0), tail_block));
        }
        replace_storage(strm, std::move(fresh));
    } catch (const std::exception & e) {
        LLAMA_LOG_WARN("laprox: an empty sequence keeps its %.2f MiB: %s\n", stream_bytes(strm)/1048576.0, e.what());
    }
}

void cache::replace_storage(uint32_t strm, std::vector<std::unique_ptr<layer_store>> fresh) {
    streams[strm].layers = std::move(fresh);
    streams[strm].generation++;
}

bool cache::covers(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    return p0 <= 0 && (p1 < 0 || p1 > last_position(stream_index(seq_id)));
}

bool cache::misses(llama_seq_id seq_id, llama_pos pos, llama_pos next) const {
    const llama_pos first = streams[stream_index(seq_id)].n_absorbed > 0 ? 0 : seq_pos_min(seq_id);
    return pos >= first && !llama_hparams::is_masked_swa(hparams.n_swa, hparams.swa_type, pos, next);
}

bool cache::can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        const bool affected = seq_id < 0 || seq_id == (llama_seq_id) strm;
        const bool reaches_in = streams[strm].n_absorbed > 0 && p0 < streams[strm].tail_begin && (p1 < 0 || std::max(p0, 0) < p1);
        if (affected && reaches_in && !covers(strm, p0, p1)) {
            return false;
        }
    }
    return true;
}

bool cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!can_remove(seq_id, p0, p1)) {
        return false;
    }
    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (seq_id >= 0 && seq_id != (llama_seq_id) strm) {
            continue;
        }
        if (covers(strm, p0, p1)) {
            forget(strm);
            continue;
        }
        stream & st = streams[strm];
        st.scores.clear();
        for (llama_pos & pos : st.window_pos) {
            if (pos >= p0 && (p1 < 0 || pos < p1)) {
                pos = -1;
            }
        }
        uint32_t first = cells[strm].size();
        for (uint32_t cell = 0; cell < cells[strm].size(); cell++) {
            if (cells[strm].pos_in(cell, std::max(p0, 0), p1 < 0 ? std::numeric_limits<llama_pos>::max() : p1)) {
                cells[strm].rm(cell);
                first = std::min(first, cell);
            }
        }
        cell_heads[strm] = std::min(cell_heads[strm], first);
        st.gen_begin = std::min(st.gen_begin, next_position(strm));
        st.gen_end   = std::min(st.gen_end, next_position(strm));
    }
    return true;
}

bool cache::copy_stream(uint32_t src, uint32_t dst) {
    const stream & from = streams[src];
    stream       & to   = streams[dst];
    forget(dst);
    try {
        if (lctx) {
            lctx->synchronize();
        }
        std::vector<std::unique_ptr<layer_store>> copies;
        for (size_t ikv = 0; ikv < layers.size(); ikv++) {
            const layer_store & store = *from.layers[ikv];
            copies.push_back(std::make_unique<layer_store>(layers[ikv], store.n_kept, store.n_tail));
            for (size_t i = 0; i < store.pools.size(); i++) {
                ggml_backend_tensor_copy(store.pools[i], copies.back()->pools[i]);
            }
        }
        for (size_t ikv = 0; ikv < layers.size(); ikv++) {
            std::vector<uint8_t> ring(windows[ikv]->nb[2]);
            ggml_backend_tensor_get(windows[ikv], ring.data(), src*ring.size(), ring.size());
            ggml_backend_tensor_set(windows[ikv], ring.data(), dst*ring.size(), ring.size());
        }
        if (queries_seen) {
            queries_seen->copy(src, dst);
        }
        replace_storage(dst, std::move(copies));
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        set_last_error(e.what());
        return false;
    }
    to.kept       = from.kept;
    to.tail_begin = from.tail_begin;
    to.n_absorbed = from.n_absorbed;
    to.compressed_for = from.compressed_for;
    to.gen_begin  = from.gen_begin;
    to.gen_end    = from.gen_end;
    to.chosen_early = from.chosen_early;
    to.window_pos = from.window_pos;
    to.n_summed   = from.n_summed;
    to.scores     = from.scores;
    to.n_compressions = from.n_compressions;

    for (uint32_t cell = 0; cell < used_tail(src); cell++) {
        if (!cells[src].is_empty(cell)) {
            cells[dst].pos_set(cell, cells[src].pos_get(cell));
            cells[dst].ext_set(cell, cells[src].ext_get(cell));
            cells[dst].seq_add(cell, (llama_seq_id) dst);
        }
    }
    cell_heads[dst] = cell_heads[src];
    return true;
}

uint32_t cache::stream_index(llama_seq_id seq_id) const {
    if (!has_sequence(seq_id)) {
        throw std::out_of_range("sequence " + std::to_string(seq_id) + " doesn't exist; accepted: 0 to " + std::to_string(streams.size() - 1));
    }
    return seq_id;
}

llama_pos cache::last_position(uint32_t strm) const {
    const llama_pos tail = cells[strm].seq_pos_max(strm);
    return tail < 0 && streams[strm].n_absorbed > 0 ? streams[strm].tail_begin - 1 : tail;
}

llama_pos cache::seq_pos_max(llama_seq_id seq_id) const {
    return has_sequence(seq_id) ? last_position(seq_id) : -1;
}

// Positions before the tail can't be removed one by one, so they don't count as held: llama.cpp's callers then
// evaluate again instead of cutting there.
llama_pos cache::seq_pos_min(llama_seq_id seq_id) const {
    if (!has_sequence(seq_id)) {
        return -1;
    }
    const llama_pos tail = cells[seq_id].seq_pos_min(seq_id);
    return tail < 0 && streams[seq_id].n_absorbed > 0 ? streams[seq_id].tail_begin - 1 : tail;
}

std::map<ggml_backend_buffer_type_t, size_t> cache::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> result;
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        for (const stream & st : streams) {
            result[layers[ikv].buft] += st.layers[ikv]->bytes();
        }
        result[layers[ikv].buft] += ggml_backend_buffer_get_size(window_buffers[ikv].second.get());
        result[layers[ikv].buft] += queries_seen ? ggml_nbytes(queries_seen->sums[ikv]) : 0;
    }
    return result;
}

// llama.cpp runs memory updates between batches, on the context's scheduler.
class update_context : public llama_memory_context_i {
public:
    update_context(cache & kv, llama_context & lctx, bool needed) : kv(kv), lctx(lctx), needed(needed) {}

    bool next()  override { return false; }
    bool apply() override { return kv.update(lctx); }

    const llama_ubatch & get_ubatch() const override { GGML_ABORT("a memory update has no ubatch"); }

    llama_memory_status get_status() const override {
        return needed ? LLAMA_MEMORY_STATUS_SUCCESS : LLAMA_MEMORY_STATUS_NO_UPDATE;
    }

private:
    cache & kv;
    llama_context & lctx;
    const bool needed;
};

llama_memory_context_ptr cache::init_update(llama_context * ctx, bool optimize) {
    lctx = ctx;
    const bool pressed = std::any_of(streams.begin(), streams.end(), [](const stream & st) { return st.n_wanted > 0; });
    return std::make_unique<update_context>(*this, *ctx, request || (optimize && pressed));
}

void cache::run(llama_context & ctx, std::function<void(llama_context &)> what) {
    refuse_while_scoring();
    request = std::move(what);
    refusal.clear();
    try {
        ctx.memory_update(/*optimize =*/ true);
    } catch (...) {
        request = nullptr;
        throw;
    }
    request = nullptr;
    if (!refusal.empty()) {
        throw std::runtime_error(refusal);
    }
}

void cache::refuse_while_scoring() const {
    if (scoring) {
        throw std::runtime_error("a scorer can't compress, score, or change settings");
    }
}

bool cache::fits(const llama_kv_cache::slot_info & sinfo) const {
    for (size_t s = 0; s < sinfo.n_stream(); s++) {
        if (overgrown(sinfo.strm[s])) {
            return false;
        }
        for (uint32_t cell : sinfo.idxs[s]) {
            if (cell >= tail_rows(sinfo.strm[s])) {
                return false;
            }
        }
    }
    return true;
}

void cache::note_pressure(const std::vector<llama_ubatch> & ubatches) {
    for (stream & st : streams) {
        st.n_wanted = 0;
    }
    for (const llama_ubatch & ubatch : ubatches) {
        const auto strms = streams_of(ubatch);
        for (uint32_t strm : strms) {
            streams[strm].n_wanted += ubatch.n_tokens/strms.size();
        }
    }
}

void cache::check_settings(const settings & s) const {
    const int32_t observed = n_slots - std::min<int32_t>(n_slots/2, max_drafts); // the other slots are room for drafts
    if (s.window > observed) {
        throw std::invalid_argument("window = " + std::to_string(s.window) + " is more than the context observes; accepted: at most " +
                std::to_string(observed) + ", set when the context is made");
    }
    if (s.chunked != config.chunked) {
        throw std::invalid_argument(std::string("prefill can't change after the context was made; accepted: ") + (config.chunked ? "chunked" : "dense"));
    }
    if (s.budget.unit == budget_unit::tokens && s.evicts() && s.budget.value > kv_size) {
        throw std::invalid_argument("budget of " + std::to_string((int64_t) s.budget.value) +
                " tokens is larger than the context; accepted: at most " + std::to_string(kv_size));
    }
    if (s.evicts() && s.policy.score->needs_all_queries && !queries_seen) {
        throw std::invalid_argument("policy " + s.policy.name + " sums up queries from the first token on; accepted: a context made with it");
    }
    if (s.gate && (!gates || s.gate->path != gates->path)) {
        throw std::invalid_argument("gates mark entries from the first token on, so " + s.gate->path + " can't be set now; accepted: " +
                (gates ? gates->path : "a context made with them"));
    }
}

void cache::set_settings(const settings & s) {
    refuse_while_scoring();
    check_settings(s);
    config = s;
}

void cache::set_settings(llama_seq_id seq_id, std::shared_ptr<const settings> s) {
    refuse_while_scoring();
    if (s) {
        check_settings(*s);
    }
    streams[stream_index(seq_id)].own = std::move(s);
}

// A byte budget of the context is shared by its sequences.
size_t cache::byte_limit(uint32_t strm) const {
    return (size_t) config_of(strm).budget.value/(streams[strm].own ? 1 : streams.size());
}

std::vector<uint32_t> cache::cells_by_position(uint32_t strm) const {
    std::vector<uint32_t> result;
    for (uint32_t cell = 0; cell < used_tail(strm); cell++) {
        if (!cells[strm].is_empty(cell)) {
            result.push_back(cell);
        }
    }
    const auto earlier = [&](uint32_t a, uint32_t b) { return cells[strm].pos_get(a) < cells[strm].pos_get(b); };
    if (!std::is_sorted(result.begin(), result.end(), earlier)) {
        std::stable_sort(result.begin(), result.end(), earlier);
    }
    return result;
}

cache::held cache::held_by(uint32_t strm, size_t ikv, uint32_t head, const std::vector<uint32_t> & tail) const {
    held result;
    const auto & kept = streams[strm].kept[ikv][head];
    result.pos.reserve(kept.size() + tail.size());
    result.row.reserve(kept.size() + tail.size());
    for (uint32_t row = 0; row < kept.size(); row++) {
        result.pos.push_back(kept[row]);
        result.row.push_back(row);
    }
    for (uint32_t cell : tail) {
        result.pos.push_back(cells[strm].pos_get(cell));
        result.row.push_back(kept.size() + cell);
    }
    return result;
}

uint32_t cache::tail_rows(uint32_t strm) const {
    uint32_t n = kv_size;
    for (const auto & store : streams[strm].layers) {
        n = std::min(n, store->n_tail);
    }
    return n;
}

int64_t cache::n_kept(uint32_t strm) const {
    int64_t n = 0;
    for (const auto & layer_kept : streams[strm].kept) {
        for (const auto & head_kept : layer_kept) {
            n += (int64_t) head_kept.size();
        }
    }
    return n;
}

int64_t cache::n_seen(uint32_t strm) const {
    return streams[strm].n_absorbed + cells[strm].get_used();
}

size_t cache::stream_bytes(uint32_t strm) const {
    size_t bytes = 0;
    for (const auto & store : streams[strm].layers) {
        bytes += store->bytes();
    }
    return bytes;
}

laprox_stats cache::stats(uint32_t strm) const {
    const stream & st = streams[strm];
    laprox_stats result {};
    result.tokens_seen  = n_seen(strm);
    result.entries_full = result.tokens_seen*n_pairs;
    result.entries_held = (int64_t) cells[strm].get_used()*n_pairs + n_kept(strm);
    result.kv_bytes     = stream_bytes(strm);
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        result.kv_bytes_full += result.tokens_seen*layers[ikv].n_head_kv*layers[ikv].kv_row_bytes();
        result.window_bytes  += windows[ikv]->nb[2] + (queries_seen ? queries_seen->sums[ikv]->nb[3] : 0);
    }
    result.compressions    = st.n_compressions;
    result.score_seconds   = st.t_score_us/1e6;
    result.select_seconds  = st.t_select_us/1e6;
    result.compact_seconds = st.t_compact_us/1e6;
    return result;
}

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

void cache::entries(llama_seq_id seq_id, size_t ikv, uint32_t head, float * k, float * v) const {
    const uint32_t      strm  = stream_index(seq_id);
    const layer_info  & layer = layers[ikv];
    const layer_store & store = *streams[strm].layers[ikv];
    const held          have  = held_by(strm, ikv, head);
    if (k) {
        read_rows(store.k, store.held_row(head), have.row, k, rotated_k ? rotation_block_k(layer.d_k) : 0);
    }
    if (v) {
        read_rows(store.v, store.held_row(head), have.row, v, rotated_v ? rotation_block_v(layer.d_v) : 0);
    }
}

std::vector<llama_pos> cache::queries(llama_seq_id seq_id, size_t ikv, float * q) const {
    const uint32_t     strm  = stream_index(seq_id);
    const stream     & st    = streams[strm];
    const layer_info & layer = layers[ikv];
    const int64_t      n     = (int64_t) layer.d_k*layer.n_head;

    const std::vector<uint32_t> slots = window_slots(strm);
    std::vector<llama_pos> pos;
    for (uint32_t slot : slots) {
        if (q) {
            float * dst = q + pos.size()*n;
            ggml_backend_tensor_get(windows[ikv], dst, strm*windows[ikv]->nb[2] + slot*windows[ikv]->nb[1], n*sizeof(float));
            if (rotated_k) {
                for (uint32_t head = 0; head < layer.n_head; head++) {
                    hadamard_rotate(dst + head*layer.d_k, layer.d_k, rotation_block_k(layer.d_k));
                }
            }
        }
        pos.push_back(st.window_pos[slot]);
    }
    return pos;
}

std::vector<uint32_t> cache::window_slots(uint32_t strm) const {
    const auto & pos = streams[strm].window_pos;
    std::vector<uint32_t> slots;
    for (uint32_t slot = 0; slot < pos.size(); slot++) {
        if (pos[slot] >= 0) {
            slots.push_back(slot);
        }
    }
    std::sort(slots.begin(), slots.end(), [&](uint32_t a, uint32_t b) { return pos[a] < pos[b]; });
    const size_t window = config_of(strm).window;
    if (slots.size() > window) {
        slots.erase(slots.begin(), slots.end() - window);
    }
    return slots;
}

std::vector<uint32_t> cache::free_slots(uint32_t strm, size_t n) const {
    const auto & pos = streams[strm].window_pos;
    std::vector<uint32_t> slots(pos.size());
    std::iota(slots.begin(), slots.end(), 0);
    std::stable_sort(slots.begin(), slots.end(), [&](uint32_t a, uint32_t b) { return pos[a] < pos[b]; });
    slots.resize(n);
    return slots;
}

}
