#include "engine/pressure.h"
#include "engine/compact.h"
#include "engine/compress.h"
#include "engine/sequence.h"

#include "llama-impl.h"

#include <algorithm>
#include <stdexcept>

namespace laprox {

// How many tail cells a sequence may have: no more rows than llama.cpp would have allocated, and less where the prompt
// is compressed while it comes in.
static uint32_t tail_limit(const sequence & seq) {
    const settings & own    = seq.config();
    const common   & shared = seq.shared;

    const int64_t kept = (seq.n_kept() + shared.n_pairs - 1)/shared.n_pairs;
    int64_t limit = (int64_t) shared.kv_size - kept;

    if (own.chunked) {
        // what the budget may come to, and half as much again or a few batches on top of it, so that not every one is compressed
        int64_t held = std::max(own.min_tokens, own.sink + own.recent);
        if (own.budget.unit != budget_unit::bytes) {
            held = std::max(held, budget_entries(own.budget, shared.kv_size, shared.n_pairs)/shared.n_pairs);
            held += count_within(own.protect, seq.n_seen() + seq.n_wanted);
        }
        const int64_t more = std::max({ held/2, (int64_t) seq.n_wanted, std::min<int64_t>(4*(int64_t) seq.n_wanted, 1024) });
        limit = std::min<int64_t>(limit, GGML_PAD(std::max<int64_t>(held - kept, own.recent) + more, tail_block));
    }
    return GGML_PAD((uint32_t) std::max<int64_t>(limit, 0), tail_block);
}

// The same within a byte budget.
static uint32_t tail_limit_in_bytes(const sequence & seq) {
    const settings & own = seq.config();
    uint32_t limit = tail_limit(seq);
    if (own.budget.unit == budget_unit::bytes && (own.chunked || seq.n_compressions() > 0)) {
        const auto lengths = seq.kept_lengths();
        while (limit > 0 && seq.shared.bytes_for(lengths, limit) > seq.byte_limit()) {
            limit -= tail_block;
        }
    }
    return limit;
}

bool overgrown(const sequence & seq) {
    const settings & own = seq.config();
    return own.evicts() && seq.n_generated() > std::max<int64_t>(own.min_tokens, tail_block);
}

// While a prompt is coming in, a dense cache may exceed its byte budget, as it does for the first one; the compression at
// the prompt's end restores it.
void make_room(llama_context & lctx, sequence & seq) {
    const settings & own = seq.config();
    std::string reason;
    const auto missing = [&] { return seq.n_tail() + seq.n_wanted > seq.tail_rows(); };
    const auto grow    = [&](uint32_t limit) {
        const uint32_t needed = GGML_PAD(seq.n_tail() + seq.n_wanted, tail_block);
        if (!missing() || needed > limit) {
            return;
        }
        const uint32_t wish = std::min(std::max<uint32_t>(needed, GGML_PAD(seq.tail_rows()/4*5, tail_block)), limit);
        for (uint32_t n_tail : { wish, needed }) {
            try {
                grow_tail(lctx, seq, n_tail);
                reason.clear();
                return;
            } catch (const std::exception & e) {
                reason = std::string("; ") + e.what();
            }
        }
    };

    const auto shrink = [&](int64_t n_budget_seen, int64_t n_least, entry_source::scope from) {
        const int64_t n_before = seq.n_compressions();
        try {
            compress(lctx, seq, n_budget_seen, n_least, from);
            seq.chosen_early = seq.chosen_early || seq.n_compressions() > n_before; // until what comes in turns out to be generated
        } catch (const std::exception & e) {
            reason = std::string("; ") + e.what();
        }
    };

    // The latest queries decide about what was generated. A share of a short text is little, so min_tokens stay.
    if (overgrown(seq)) {
        shrink(seq.n_seen(), own.budget.unit == budget_unit::fraction ? own.min_tokens : 0, entry_source::scope::seen);
        if (!reason.empty() && seq.remembers()) { // no room for a layer of it: choose from what is held
            reason.clear();
            shrink(seq.n_seen(), own.budget.unit == budget_unit::fraction ? own.min_tokens : 0, entry_source::scope::held);
        }
        seq.begin_generation(); // also where nothing could be evicted: not again at the next token
        if (!reason.empty()) {
            LLAMA_LOG_WARN("laprox: the text generated so far wasn't compressed%s\n", reason.c_str());
        }
    }
    grow(tail_limit_in_bytes(seq));

    const bool prompt = !own.chunked && seq.n_wanted >= tail_block;
    if (prompt) {
        grow(tail_limit(seq));
    }
    if (missing()) {
        shrink(own.chunked ? std::max<int64_t>(seq.shared.kv_size, seq.n_seen()) : seq.n_seen(), 0, entry_source::scope::held); // what the prompt needs, its end will say
        grow(tail_limit_in_bytes(seq));
    }
    if (!own.chunked) {
        grow(tail_limit(seq));
    }
    if (missing()) {
        throw std::runtime_error("no room for " + std::to_string(seq.n_wanted) + " more tokens: " + std::to_string(seq.n_seen()) + " seen, " +
                std::to_string(seq.n_held()/seq.shared.n_pairs) + " held per KV head, " + std::to_string(tail_limit_in_bytes(seq)) +
                " tail cells allowed" + reason);
    }
    seq.rewind_cells();
}

}
