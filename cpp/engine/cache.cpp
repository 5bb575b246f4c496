#include "engine/cache.h"
#include "engine/compress.h"
#include "engine/error.h"
#include "engine/gates.h"
#include "engine/pressure.h"
#include "engine/probe.h"
#include "engine/recall.h"

#include "llama-context.h"
#include "llama-impl.h"
#include "llama-model.h"

#include <algorithm>
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
        refuse(reason);
    }
    return true;
}

cache::cache(const llama_model & model, const llama_hparams & hparams, const std::vector<uint32_t> & layer_ids,
        const std::unordered_map<int32_t, int32_t> & map_layer_ids, const entry_format & format, bool offload, uint32_t kv_size, uint32_t n_stream,
        llama_kv_cells_vec & cells, std::vector<uint32_t> & cell_heads) :
        all { hparams, model.laprox->config, kv_size, n_stream, format.rotated_k, format.rotated_v }, gates(all.config.gate) {
    for (uint32_t il : layer_ids) {
        if (hparams.n_head_kv(il) == 0) {
            continue; // a layer without attention (Deci) has a place in llama.cpp's cache, but nothing in it
        }
        layer_info layer {
            il, hparams.n_head(il), hparams.n_head_kv(il), hparams.n_embd_head_k(il), hparams.n_embd_head_v(il), format.type_k, format.type_v, gates != nullptr,
            offload ? ggml_backend_dev_buffer_type(model.dev_layer(il)) : ggml_backend_cpu_buffer_type(),
        };
        const auto check = [&](const char * which, ggml_type type, uint32_t d) {
            if (d % ggml_blck_size(type) != 0 || ggml_row_size(type, d) % sizeof(int32_t) != 0) {
                refuse(std::string(which) + " cache of type " + ggml_type_name(type) + " doesn't divide the head size " + std::to_string(d) +
                        " of layer " + std::to_string(il) + " into whole words; accepted: f16, bf16, f32");
            }
        };
        check("K", format.type_k, layer.d_k);
        check("V", format.type_v, layer.d_v);
        all.layers.push_back(layer);
        all.n_pairs += layer.n_head_kv;
    }
    for (const auto & [il, place] : map_layer_ids) {
        const auto is_owner = [&](const layer_info & layer) { return layer.il == layer_ids[place]; };
        const auto owner = std::find_if(all.layers.begin(), all.layers.end(), is_owner);
        if (owner != all.layers.end()) {
            layer_of[il] = owner - all.layers.begin();
        }
    }
    all.kq_scales.resize(all.layers.size());
    all.rotations.resize(all.layers.size());
    const bool in_host_memory = std::all_of(all.layers.begin(), all.layers.end(), [](const layer_info & layer) { return ggml_backend_buft_is_host(layer.buft); });
    try {
        all.space = make_archive_space(all.config.archive, all.config.archive_limit, in_host_memory);
    } catch (const std::exception & e) {
        refuse(e.what());
    }
    try {
        fingerprint(model).copy(print.data(), print.size() - 1);
    } catch (const std::exception &) {
        // a model without attention norms; its states are told by their layout alone
    }
    try {
        for (uint32_t strm = 0; strm < n_stream; strm++) {
            sequences.emplace_back(model, all, strm, cells[strm], cell_heads[strm]);
        }
    } catch (const std::exception & e) {
        refuse(e.what());
    }

    LLAMA_LOG_INFO("%s: policy %s, %zu layers, %lld KV heads in all, %u sequences, K (%s), V (%s), %.2f MiB\n", __func__,
            all.config.policy.name.c_str(), all.layers.size(), (long long) all.n_pairs, n_stream, ggml_type_name(format.type_k), ggml_type_name(format.type_v),
            sequences.front().bytes()*n_stream/1048576.0);
}

void cache::synchronize() const {
    if (all.lctx) {
        all.lctx->synchronize();
    }
}

whole_memory & cache::whole(llama_memory_i & parts) {
    if (!seen_whole) {
        seen_whole = std::make_unique<whole_memory>(parts, *this);
    }
    return *seen_whole;
}

//
// sequences
//

const sequence & cache::at(llama_seq_id seq_id) const {
    if (!has_sequence(seq_id)) {
        throw std::out_of_range("sequence " + std::to_string(seq_id) + " doesn't exist; accepted: 0 to " + std::to_string(sequences.size() - 1));
    }
    return sequences[seq_id];
}

std::vector<sequence *> cache::sequences_of(llama_seq_id seq_id) {
    std::vector<sequence *> result;
    for (sequence & seq : sequences) {
        if (seq_id < 0 || seq_id == (llama_seq_id) seq.id) {
            result.push_back(&seq);
        }
    }
    return result;
}

std::vector<sequence *> cache::sequences_of(const llama_ubatch & ubatch) {
    if (sequences.size() == 1) {
        return { &sequences.front() };
    }
    std::vector<sequence *> result;
    for (uint32_t s = 0; s < ubatch.n_seqs_unq; s++) {
        result.push_back(&sequences[ubatch.seq_id[s*(ubatch.n_tokens/ubatch.n_seqs_unq)][0]]);
    }
    return result;
}

void cache::clear() {
    for (sequence & seq : sequences) {
        seq.clear();
    }
}

bool cache::can_remove(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    return std::all_of(sequences.begin(), sequences.end(), [&](const sequence & seq) {
        return (seq_id >= 0 && seq_id != (llama_seq_id) seq.id) || seq.can_remove(p0, p1);
    });
}

bool cache::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (!can_remove(seq_id, p0, p1)) {
        return false;
    }
    try {
        for (sequence * seq : sequences_of(seq_id)) {
            if (seq->reaches_in(p0, p1) && !seq->covers(p0, p1)) {
                cut(*all.lctx, *seq, p0);
            } else {
                seq->remove(p0, p1);
            }
        }
        return true;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        set_last_error(e.what());
        return false;
    }
}

bool cache::misses(llama_seq_id seq_id, llama_pos pos, llama_pos next) const {
    const llama_pos first = at(seq_id).n_absorbed() > 0 ? 0 : seq_pos_min(seq_id);
    return pos >= first && !llama_hparams::is_masked_swa(all.hparams.n_swa, all.hparams.swa_type, pos, next);
}

bool cache::copy_stream(uint32_t src, uint32_t dst) {
    try {
        sequences[dst].copy(sequences[src]);
        return true;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        set_last_error(e.what());
        return false;
    }
}

llama_pos cache::seq_pos_max(llama_seq_id seq_id) const {
    return has_sequence(seq_id) ? at(seq_id).last_position() : -1;
}

llama_pos cache::seq_pos_min(llama_seq_id seq_id) const {
    return has_sequence(seq_id) ? at(seq_id).first_position() : -1;
}

std::map<ggml_backend_buffer_type_t, size_t> cache::memory_breakdown() const {
    std::map<ggml_backend_buffer_type_t, size_t> result;
    for (const sequence & seq : sequences) {
        seq.add_bytes(result);
    }
    return result;
}

//
// batches
//

bool cache::fits(const llama_kv_cache::slot_info & sinfo) const {
    for (size_t s = 0; s < sinfo.n_stream(); s++) {
        const sequence & seq = sequences[sinfo.strm[s]];
        const uint32_t n = seq.tail_rows();
        if (overgrown(seq) || std::any_of(sinfo.idxs[s].begin(), sinfo.idxs[s].end(), [&](uint32_t cell) { return cell >= n; })) {
            return false;
        }
    }
    return true;
}

void cache::note_pressure(const std::vector<llama_ubatch> & ubatches) {
    for (sequence & seq : sequences) {
        seq.n_wanted = 0;
    }
    for (const llama_ubatch & ubatch : ubatches) {
        const auto waiting = sequences_of(ubatch);
        for (sequence * seq : waiting) {
            seq->n_wanted += ubatch.n_tokens/waiting.size();
        }
    }
}

void cache::apply(const llama_ubatch & ubatch) {
    const auto   placed = sequences_of(ubatch);
    const size_t n      = ubatch.n_tokens/placed.size();
    for (size_t s = 0; s < placed.size(); s++) {
        // A token, or drafts of a few, all with logits, are generated. A prompt asks for those of its last token.
        const int8_t * output = ubatch.output + s*n;
        const bool generated  = n <= max_drafts && std::all_of(output, output + n, [](int8_t wanted) { return wanted != 0; });
        placed[s]->place(ubatch.pos + s*n, n, generated);
    }
}

void cache::computed(const llama_ubatch & ubatch) {
    for (sequence * seq : sequences_of(ubatch)) {
        seq->end_compute();
    }
}

//
// updates between batches
//

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
    all.lctx = ctx;
    const bool pressed = std::any_of(sequences.begin(), sequences.end(), [](const sequence & seq) { return seq.n_wanted > 0; });
    return std::make_unique<update_context>(*this, *ctx, request || (optimize && pressed));
}

bool cache::update(llama_context & lctx) {
    if (request) {
        try {
            request();
        } catch (const std::exception & e) {
            refusal = e.what();
        }
        return refusal.empty();
    }
    bool made_room = true;
    for (sequence & seq : sequences) {
        if (seq.n_wanted == 0) {
            continue;
        }
        try {
            make_room(lctx, seq);
        } catch (const std::exception & e) {
            LLAMA_LOG_ERROR("%s: sequence %u: %s\n", __func__, seq.id, e.what());
            set_last_error(e.what());
            made_room = false;
        }
        seq.n_wanted = 0;
    }
    return made_room;
}

void cache::run(llama_context & ctx, std::function<void()> what) {
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

void cache::compress(llama_context & lctx, llama_seq_id seq_id) {
    sequence & seq = mine(seq_id);
    run(lctx, [&] {
        seq.n_wanted = 0; // of a batch that is gone
        seq.begin_generation();
        seq.chosen_early = false;
        laprox::compress(lctx, seq, seq.n_seen(), 0);
        seq.probed.reset(); // of no use any more, where nothing had to go
    });
}

static void nothing_came_back(const std::exception & e) {
    const std::string why = std::string("nothing came back for this prompt, which is answered from what was kept for an earlier one: ") + e.what();
    LLAMA_LOG_WARN("laprox: %s\n", why.c_str());
    set_last_error(why);
}

llama_pos cache::prompt_done(llama_context & lctx, llama_seq_id seq_id, int32_t n_again, bool first) {
    sequence & seq = mine(seq_id);
    const settings & own = seq.config();
    const llama_pos  end = seq.next_position();
    seq.begin_generation();
    seq.probed.reset(); // somebody asks: nobody's questions need to stand for that
    if (first) {
        seq.passes = 0;
    }
    // else another prompt needs what the last one needed
    const bool asks    = own.policy.score && (own.policy.score->by_queries() || seq.chosen_by_queries());
    const bool evicted = seq.n_held() < seq.n_seen()*all.n_pairs;
    const bool goes_on = seq.passes > 0; // after a pass that may have brought back everything
    if (asks && seq.remembers() && (evicted || goes_on)) {
        llama_pos from = end;
        entry_source::scope choose_from = entry_source::scope::seen;
        if (evicted && seq.passes < own.recall) {
            try {
                const llama_pos earliest = std::max({ seq.tail_begin(), seq.turn_begin(), end - std::clamp(n_again, 0, own.recall_tokens) });
                run(lctx, [&] {
                    seq.n_wanted = 0;
                    from = laprox::recall(lctx, seq, whole().way_back(seq_id, earliest));
                });
                seq.passes++;
            } catch (const std::exception & e) {
                if (all.custom.running) {
                    throw;
                }
                nothing_came_back(e);
                from = end;
                choose_from = entry_source::scope::held;
            }
        }
        if (from < end) {
            seq.expect_again(from);
            return from;
        }
        seq.end_turn(); // a pass more would change nothing
        if (seq.n_tail() > (uint32_t) std::max(own.min_tokens, own.recent)) { // a long turn doesn't stay exact, as ever
            run(lctx, [&] { laprox::compress(lctx, seq, seq.n_seen(), 0, choose_from); });
        }
    } else if (seq.prompt_is_due()) {
        try {
            compress(lctx, seq_id);
        } catch (const std::exception & e) {
            if (all.custom.running || !seq.remembers()) {
                throw;
            }
            nothing_came_back(e);
            run(lctx, [&] { laprox::compress(lctx, seq, seq.n_seen(), 0, entry_source::scope::held); });
        }
    }
    return -1;
}

void cache::look(llama_context & lctx, llama_seq_id seq_id, const laprox_look & part) {
    sequence & seq = mine(seq_id);
    run(lctx, [&] { laprox::look(lctx, seq, part); });
}

void cache::look_again(llama_seq_id seq_id, const probe & found) {
    laprox::look_again(mine(seq_id), found);
}

void cache::score(llama_context & lctx, llama_seq_id seq_id) {
    sequence & seq = mine(seq_id);
    run(lctx, [&] { laprox::score(lctx, seq); });
}

void cache::set_scorer(laprox_scorer_callback callback, void * user_data) {
    all.custom.callback = callback;
    all.custom.data     = user_data;
}

void cache::refuse_while_scoring() const {
    if (all.custom.running) {
        throw std::runtime_error("a scorer can't compress, score, or change settings");
    }
}

//
// settings
//

void cache::check_settings(const settings & s) const {
    const sequence & seq = sequences.front();
    const int32_t n_slots  = seq.window.n_slots;
    const int32_t observed = n_slots - std::min<int32_t>(n_slots/2, max_drafts); // the other slots are room for drafts
    if (s.window > observed) {
        throw std::invalid_argument("window = " + std::to_string(s.window) + " is more than the context observes; accepted: at most " +
                std::to_string(observed) + ", set when the context is made");
    }
    if (s.chunked != all.config.chunked) {
        throw std::invalid_argument(std::string("prefill can't change after the context was made; accepted: ") + (all.config.chunked ? "chunked" : "dense"));
    }
    const option & where = find_option("archive");
    const option & limit = find_option("archive_limit");
    for (const option * row : { &where, &limit }) {
        if (s.given.get(*row) != all.config.given.get(*row)) {
            s.given.refuse(*row, s.given.get(*row), "it can't change after the context was made", all.config.given.get(*row));
        }
    }
    if (s.budget.unit == budget_unit::tokens && s.evicts() && s.budget.value > all.kv_size) {
        throw std::invalid_argument("budget of " + std::to_string((int64_t) s.budget.value) +
                " tokens is larger than the context; accepted: at most " + std::to_string(all.kv_size));
    }
    if (s.evicts() && s.policy.score->needs == need::all_queries && !seq.sums) {
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
    all.config = s;
}

void cache::set_settings(llama_seq_id seq_id, std::shared_ptr<const settings> s) {
    refuse_while_scoring();
    if (s) {
        check_settings(*s);
    }
    mine(seq_id).set_settings(std::move(s));
}

}
