#include "engine/hooks.h"
#include "engine/cache.h"
#include "engine/error.h"
#include "engine/state_io.h"
#include "core/placement.h"

#include "llama-context.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

namespace laprox {

cache * cache_in(const llama_memory_i * memory) {
    const llama_kv_cache * kv = nullptr;
    if (auto * plain = dynamic_cast<const llama_kv_cache *>(memory)) {
        kv = plain;
    } else if (auto * iswa = dynamic_cast<const llama_kv_cache_iswa *>(memory)) {
        kv = iswa->get_base();
    } else if (auto * hybrid = dynamic_cast<const llama_memory_hybrid *>(memory)) {
        kv = hybrid->get_mem_attn();
    } else if (auto * hybrid_iswa = dynamic_cast<const llama_memory_hybrid_iswa *>(memory)) {
        kv = hybrid_iswa->get_mem_attn()->get_base();
    }
    return kv ? kv->get_laprox() : nullptr;
}

// Whether text that continued after a cut would miss tokens in the layers with a sliding window, which have let go of
// them since.
static bool loses_window(const llama_memory_i & memory, const cache & kv, llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(&memory);
    auto * iswa   = hybrid ? hybrid->get_mem_attn() : dynamic_cast<const llama_kv_cache_iswa *>(&memory);
    const llama_pos last = kv.seq_pos_max(seq_id);
    if (!iswa || kv.at(seq_id).covers(p0, p1) || p0 > last || (p1 >= 0 && p1 <= last)) {
        return false;
    }
    const llama_pos first = iswa->get_swa()->seq_pos_min(seq_id);
    return kv.misses(seq_id, first < 0 || first >= p0 ? p0 - 1 : first - 1, p0);
}

bool seq_rm(llama_memory_i * memory, llama_seq_id seq_id, llama_pos p0, llama_pos p1, bool & removed) {
    const cache * kv = cache_in(memory);
    if (!kv) {
        return false;
    }
    if (seq_id >= 0 && !kv->has_sequence(seq_id)) {
        removed = true;
        return true;
    }
    seq_id = std::max(seq_id, -1); // any negative number means all sequences
    // the parts of a memory are asked one by one: those that may refuse, first
    removed = kv->can_remove(seq_id, p0, p1);
    for (llama_seq_id seq = 0; removed && kv->has_sequence(seq); seq++) {
        if (seq_id < 0 || seq == seq_id) {
            removed = !loses_window(*memory, *kv, seq, p0, p1);
        }
    }
    if (removed) {
        removed = memory->seq_rm(seq_id, p0, p1);
        // a part that was asked before the one that had no room has let go: better none of it than parts that don't fit
        for (llama_seq_id seq = 0; !removed && kv->has_sequence(seq); seq++) {
            if ((seq_id < 0 || seq == seq_id) && memory->seq_pos_max(seq) != kv->seq_pos_max(seq)) {
                memory->seq_rm(seq, -1, -1);
            }
        }
    }
    return true;
}

bool seq_cp(llama_memory_i * memory, llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    cache * kv = cache_in(memory);
    if (!kv) {
        return false;
    }
    std::string reason;
    if (!kv->has_sequence(src) || !kv->has_sequence(dst)) {
        reason = "sequence " + std::to_string(kv->has_sequence(src) ? dst : src) + " doesn't exist; accepted: 0 to " + std::to_string(kv->n_sequences() - 1);
    } else if (!kv->at(src).covers(p0, p1)) {
        reason = "the compressing cache can only copy whole sequences";
    }
    if (!reason.empty()) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, reason.c_str());
        set_last_error(reason);
    } else if (src != dst) {
        memory->seq_rm(dst, -1, -1); // a cache that sequences share would add to what it holds
        memory->seq_cp(src, dst, -1, -1);
        if (kv->seq_pos_max(dst) != kv->seq_pos_max(src)) { // there was no room: no part of it is left
            memory->seq_rm(dst, -1, -1);
        }
    }
    return true;
}

// The streams may stand for what the user asked for as one unified cache, in which everything else goes.
bool seq_keep(llama_memory_i * memory, llama_seq_id seq_id) {
    const cache * kv = cache_in(memory);
    for (llama_seq_id other = 0; kv && kv->has_sequence(other); other++) {
        if (other != seq_id) {
            memory->seq_rm(other, -1, -1);
        }
    }
    return kv != nullptr;
}

bool seq_shift(llama_memory_i * memory, const char * what) {
    if (!cache_in(memory)) {
        return false;
    }
    LLAMA_LOG_ERROR("%s: the compressing KV cache can't shift positions\n", what);
    return true;
}

bool seq_pos_min(llama_memory_i * memory, llama_seq_id seq_id, llama_pos & pos) {
    const cache * kv = cache_in(memory);
    if (kv) {
        // iSWA memories answer for their sliding window, which may reach back into the compressed part
        pos = kv->has_sequence(seq_id) ? std::max(memory->seq_pos_min(seq_id), kv->seq_pos_min(seq_id)) : -1;
    }
    return kv != nullptr;
}

bool seq_pos_max(llama_memory_i * memory, llama_seq_id seq_id, llama_pos & pos) {
    const cache * kv = cache_in(memory);
    pos = -1;
    return kv && !kv->has_sequence(seq_id);
}

void state_write(llama_memory_i & memory, llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const cache * kv = cache_in(&memory);
    if (kv && seq_id != -1) {
        kv->at(seq_id); // throws if there is no such sequence
    }
    if (!kv || flags != 0) { // parts that stay in this process
        memory.state_write(io, seq_id, flags);
        return;
    }
    framed_writer out(io);
    memory.state_write(out, seq_id, flags);
    out.finish();
}

void state_read(llama_memory_i & memory, llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    const cache * kv = cache_in(&memory);
    if (kv && seq_id != -1) {
        kv->at(seq_id);
    }
    if (!kv || flags != 0) {
        memory.state_read(io, seq_id, flags);
        return;
    }
    try {
        framed_reader in(io);
        if (seq_id < 0) { // llama.cpp's own caches leave what they hold where a state has nothing
            memory.clear(true);
        } else {
            memory.seq_rm(seq_id, -1, -1);
        }
        memory.state_read(in, seq_id, flags);
        in.finish();
        for (llama_seq_id seq = 0; kv->has_sequence(seq); seq++) {
            if ((seq_id < 0 || seq == seq_id) && memory.seq_pos_max(seq) != kv->seq_pos_max(seq)) {
                throw std::runtime_error("the saved state is damaged: its parts end at different positions, " +
                        std::to_string(memory.seq_pos_max(seq)) + " and " + std::to_string(kv->seq_pos_max(seq)));
            }
        }
    } catch (const std::exception & e) {
        // memories of several parts read one after the other, and some keep what they have got
        if (seq_id < 0) {
            memory.clear(true);
        } else {
            memory.seq_rm(seq_id, -1, -1);
        }
        set_last_error(e.what());
        throw;
    }
}

void state_refused(const llama_memory_i * memory, const char * reason) {
    if (cache_in(memory)) {
        set_last_error(reason);
    }
}

uint32_t extra_graph_nodes(const llama_context & ctx) {
    // by count: 77 of attention in three length classes, 23 of query sums, 8 of gates and 6 of casts per stream
    return cache_in(ctx.get_memory()) ? 128*ctx.n_seq_max()*ctx.get_model().hparams.n_layer_all : 0;
}

void check_attention(llama_context & ctx, const llama_memory_context_i * mctx) {
    cache * kv = cache_in(ctx.get_memory());
    if (kv) {
        kv->set_context(ctx);
    }
    const auto in_host_memory = [](const layer_info & layer) { return ggml_backend_buft_is_host(layer.buft); };
    if (!kv || ctx.get_model().hparams.no_alloc || std::all_of(kv->get_layers().begin(), kv->get_layers().end(), in_host_memory)) {
        return; // as in stock llama.cpp, a cache in host memory (--no-kv-offload) is read from wherever attention runs
    }
    // Split only: the scheduler forgets where an operation runs once it has reserved memory for a graph.
    const llama_cparams & cparams = ctx.get_cparams();
    const uint32_t n_seqs = cparams.n_seq_max;
    ctx.graph_reserve(std::max(n_seqs, std::min(cparams.n_ctx, cparams.n_ubatch)), n_seqs, n_seqs, mctx, true);

    std::vector<attention_place> places;
    for (const auto & node : ctx.get_gf_res_reserve()->get_fused_nodes()) {
        for (const layer_info & layer : kv->get_layers()) {
            if (node.op != LLM_FUSED_OP_FLASH_ATTN || node.il != (int) layer.il || in_host_memory(layer)) {
                continue; // a layer that reads another one's cache attends on its own device, there, too
            }
            ggml_backend_t backend = ggml_backend_sched_get_tensor_backend(ctx.get_sched(), node.tensor);
            const auto name = [](ggml_backend_dev_t device) { return device ? ggml_backend_dev_name(device) : "CPU"; };
            places.push_back({ layer.il, layer.d_k, name(ggml_backend_buft_get_device(layer.buft)), name(backend ? ggml_backend_get_device(backend) : nullptr) });
        }
    }
    const std::string reason = reason_misplaced(places);
    if (!reason.empty()) {
        refuse(reason);
    }
}

bool refuses_training(const llama_context & ctx) {
    if (!cache_in(ctx.get_memory())) {
        return false;
    }
    const char * reason = "a context with the compressing cache can't be trained; accepted: policy off";
    LLAMA_LOG_ERROR("laprox: %s\n", reason);
    set_last_error(reason);
    return true;
}

}
