#include "engine/hooks.h"
#include "engine/cache.h"
#include "engine/error.h"
#include "engine/settings.h"
#include "engine/whole_memory.h"
#include "core/placement.h"

#include "llama-context.h"
#include "llama-cparams.h"
#include "llama-graph.h"
#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"
#include "llama-model.h"

#include <algorithm>
#include <string>

namespace laprox {

cache * cache_in(const llama_memory_i * memory) {
    const llama_kv_cache * kv = nullptr;
    if (auto * whole = dynamic_cast<const whole_memory *>(memory)) {
        return &whole->get_cache();
    }
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

llama_memory_i * memory_of(llama_memory_i * parts) {
    cache * kv = cache_in(parts);
    return kv ? &kv->whole(*parts) : parts;
}

void adjust_cparams(const llama_model & model, llama_cparams & cparams) {
    if (model.arch == LLM_ARCH_GEMMA4_ASSISTANT && cparams.ctx_other && cache_in(cparams.ctx_other->get_memory())) {
        refuse("the draft model reads the cache of the model that it drafts for, which is compressed; accepted: a draft model with a "
                "cache of its own, or policy off");
    }
    if (enabled(model) && cparams.kv_unified && cparams.n_seq_max > 1) {
        cparams.kv_unified = false;
        cparams.n_ctx *= cparams.n_seq_max; // a sequence may still be as long as the whole context
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
