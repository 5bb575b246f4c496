#include "engine/compress.h"
#include "engine/compact.h"
#include "engine/recall.h"
#include "engine/sequence.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace laprox {

// Nothing is evicted from so few tokens; where a longer text was cut, what it held of them isn't all.
static bool is_short(const sequence & seq) {
    return seq.n_seen() <= std::max(seq.config().min_tokens, seq.config().sink + seq.config().recent);
}

// What a selection may come to: the budget, as far as the context has room.
static quota quota_of(const sequence & seq, int64_t n_budget_seen, int64_t n_least) {
    const settings & own      = seq.config();
    const common   & shared   = seq.shared;
    const bool       by_bytes = own.budget.unit == budget_unit::bytes;
    // a share of all tokens seen, or many bytes, may come to more than the context has room for
    const int64_t n_room   = std::max<int64_t>((int64_t) shared.kv_size - seq.n_wanted, 0)*shared.n_pairs;
    const int64_t n_others = std::max<int64_t>(n_budget_seen - count_within(own.protect, seq.next_position()), 0);
    const int64_t n_asked  = by_bytes ? n_room : std::max(budget_entries(own.budget, n_others, shared.n_pairs), n_least*shared.n_pairs);
    quota most { std::min(n_asked, n_room), n_room, {}, 0, std::min<uint32_t>(own.recent, seq.n_tail()) };
    if (is_short(seq)) {
        most.n_entries = seq.n_seen()*shared.n_pairs;
    } else if (by_bytes) {
        most.n_bytes = seq.byte_limit();
    }
    return most;
}

// Entries that are held now and weren't, of tokens that had left the tail before.
static int64_t count_back(const sequence & seq, const std::vector<layer_store::positions> & before, llama_pos tail_begin) {
    int64_t n = 0;
    for (size_t ikv = 0; ikv < before.size(); ikv++) {
        for (size_t head = 0; head < before[ikv].size(); head++) {
            const auto & held = before[ikv][head];
            for (llama_pos pos : seq.store(ikv).kept[head]) {
                n += pos < tail_begin && !std::binary_search(held.begin(), held.end(), pos);
            }
        }
    }
    return n;
}

static void select_and_compact(llama_context & lctx, sequence & seq, quota most, const entry_source & from) {
    const settings & own = seq.config();
    most.n_tail = GGML_PAD(most.n_recent + std::max(seq.n_wanted, 1u), tail_block);
    const int64_t t0 = ggml_time_us();
    std::vector<layer_scores> scores = seq.probed ? scores_by_probe(seq) : score_entries(lctx, from, *own.policy.score);
    const int64_t t1 = ggml_time_us();
    const selection keep = choose(from, std::move(scores), most, lctx.n_threads_batch());
    const int64_t t2 = ggml_time_us();
    std::vector<layer_store::positions> before;
    for (size_t ikv = 0; from.sees_all() && ikv < seq.shared.layers.size(); ikv++) {
        before.push_back(seq.store(ikv).kept);
    }
    const llama_pos tail_begin = seq.tail_begin();
    compact(lctx, seq, from, keep, most.n_tail);
    if (from.sees_all()) {
        seq.add_recall(count_back(seq, before, tail_begin));
    }
    const int64_t t3 = ggml_time_us();

    seq.add_times(t1 - t0, t2 - t1, t3 - t2);
    LLAMA_LOG_DEBUG("%s: sequence %u: kept %lld entries of %lld, %.2f MiB; score %.1f ms, select %.1f ms, compact %.1f ms\n",
            __func__, seq.id, (long long) seq.n_held(), (long long) (seq.n_seen()*seq.shared.n_pairs),
            seq.bytes()/1048576.0, (t1 - t0)/1e3, (t2 - t1)/1e3, (t3 - t2)/1e3);
}

void compress(llama_context & lctx, sequence & seq, int64_t n_budget_seen, int64_t n_least, entry_source::scope from) {
    const settings & own = seq.config();
    // nothing may be evicted, or there is nothing to evict
    if (!own.evicts() || (is_short(seq) && !seq.remembers())) {
        return;
    }
    const quota most = quota_of(seq, n_budget_seen, n_least);
    // under pressure a byte budget has to make room for a longer tail even where it holds now
    const int64_t n_protected = count_within(own.protect, seq.next_position())*seq.shared.n_pairs;
    const bool within = most.n_bytes ? seq.n_wanted == 0 && seq.bytes() <= *most.n_bytes : seq.n_held() <= most.with(n_protected);
    const bool recall = from == entry_source::scope::seen && seq.remembers();
    if (!within || recall) {
        select_and_compact(lctx, seq, most, { seq, recall ? entry_source::scope::seen : entry_source::scope::held });
    }
}

void compress_turn(llama_context & lctx, sequence & seq, llama_pos from) {
    quota most = quota_of(seq, seq.n_seen(), 0);
    const tail_view tail = seq.tail();
    const uint32_t n_turn = tail.pos.end() - std::lower_bound(tail.pos.begin(), tail.pos.end(), from);
    if (n_turn > most.n_recent) {
        // a turn's tokens stay exact until the next one is in, as those of a generation do
        most.n_entries += most.n_bytes ? 0 : (int64_t) (n_turn - most.n_recent)*seq.shared.n_pairs;
        most.n_recent   = n_turn;
    }
    select_and_compact(lctx, seq, most, { seq, entry_source::scope::seen });
}

void score(llama_context & lctx, sequence & seq) {
    const settings & own = seq.config();
    if (!own.evicts()) {
        throw std::runtime_error("policy " + own.policy.name + " scores nothing");
    }
    seq.scores = score_entries(lctx, { seq, entry_source::scope::held }, *own.policy.score);
    for (layer_scores & layer : seq.scores) {
        finish(seq, std::min<uint32_t>(own.recent, seq.n_tail()), layer);
        for (auto & head : layer.heads) {
            for (size_t i = 0; i < head.score.size(); i++) {
                head.score[i] = holds(own.protect, head.pos[head.first + i]) ? NAN : head.score[i]; // never ranked
            }
            head.numbers.resize(1);
            head.second = {};
            head.pos    = {};
        }
    }
}

}
