#include "engine/compress.h"
#include "engine/compact.h"
#include "engine/sequence.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

namespace laprox {

void compress(llama_context & lctx, sequence & seq, int64_t n_budget_seen, int64_t n_least) {
    const settings & own    = seq.config();
    const common   & shared = seq.shared;
    // nothing may be evicted, or there is nothing to evict
    if (!own.evicts() || seq.n_seen() <= std::max(own.min_tokens, own.sink + own.recent)) {
        return;
    }
    const bool    by_bytes  = own.budget.unit == budget_unit::bytes;
    // a share of all tokens seen, or many bytes, may come to more than the context has room for
    const int64_t n_room    = std::max<int64_t>((int64_t) shared.kv_size - seq.n_wanted, 0)*shared.n_pairs;
    const int64_t n_asked   = by_bytes ? n_room : std::max(budget_entries(own.budget, n_budget_seen, shared.n_pairs), n_least*shared.n_pairs);
    const uint32_t n_recent = std::min<uint32_t>(own.recent, seq.n_tail());
    quota most { std::min(n_asked, n_room), {}, (uint32_t) GGML_PAD(n_recent + std::max(seq.n_wanted, 1u), tail_block) };
    if (by_bytes) {
        most.n_bytes = seq.byte_limit();
    }
    // under pressure a byte budget has to make room for a longer tail even where it holds now
    const bool within = by_bytes ? seq.n_wanted == 0 && seq.bytes() <= *most.n_bytes : seq.n_held() <= most.n_entries;
    if (within) {
        return;
    }

    const int64_t t0 = ggml_time_us();
    std::vector<layer_scores> scores = score_sequence(lctx, seq, *own.policy.score);
    const int64_t t1 = ggml_time_us();
    const selection keep = choose(seq, std::move(scores), most, lctx.n_threads_batch());
    const int64_t t2 = ggml_time_us();
    compact(lctx, seq, keep, most.n_tail);
    const int64_t t3 = ggml_time_us();

    seq.add_times(t1 - t0, t2 - t1, t3 - t2);
    LLAMA_LOG_DEBUG("%s: sequence %u: kept %lld entries of %lld, %.2f MiB; score %.1f ms, select %.1f ms, compact %.1f ms\n",
            __func__, seq.id, (long long) seq.n_held(), (long long) (seq.n_seen()*shared.n_pairs),
            seq.bytes()/1048576.0, (t1 - t0)/1e3, (t2 - t1)/1e3, (t3 - t2)/1e3);
}

void score(llama_context & lctx, sequence & seq) {
    const settings & own = seq.config();
    if (!own.evicts()) {
        throw std::runtime_error("policy " + own.policy.name + " scores nothing");
    }
    seq.scores.clear();
    for (layer_scores & layer : score_sequence(lctx, seq, *own.policy.score)) {
        seq.scores.emplace_back();
        for (auto & head : layer.heads) {
            seq.scores.back().push_back(std::move(head.numbers.front()));
        }
    }
}

}
