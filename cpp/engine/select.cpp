#include "engine/select.h"
#include "engine/recall.h"
#include "engine/sequence.h"
#include "core/parallel.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace laprox {

// Among the candidates of a head, from `place` on, so many entries behind the attention sinks are none.
struct gap {
    uint32_t place;
    uint32_t n; // with those of the gaps before
};

// What may be evicted, scored; and what may not.
struct candidates {
    const allocator * share;
    allocation request;
    // [layer][head]: how many entries are before the candidates, what is none among them, and the entries that stay: attention sinks,
    // protected tokens and what is kept of recent ones, ascending
    std::vector<std::vector<size_t>> first;
    std::vector<std::vector<std::vector<gap>>> gaps;
    std::vector<std::vector<std::vector<uint32_t>>> stay;
    std::vector<uint32_t> cells;     // of the tail that stay there
    int64_t n_kept = 0;              // entries that stay, those of the tail included
    int64_t n_protected = 0;         // of them, those that no budget counts
};

// Takes away what is no candidate: these ranges of them, and what is never to be kept, of score -inf.
static std::vector<gap> drop_others(head_candidates & c, const std::vector<std::pair<size_t, size_t>> & ranges) {
    if (ranges.empty() && std::find(c.score.begin(), c.score.end(), -INFINITY) == c.score.end()) {
        return {};
    }
    head_candidates left { c.layer, c.head, {}, {}, {}, c.n_protected };
    std::vector<gap> gaps;
    auto range = ranges.begin();
    for (uint32_t i = 0; i < c.score.size(); i++) {
        while (range != ranges.end() && i >= range->second) {
            range++;
        }
        if (c.score[i] == -INFINITY || (range != ranges.end() && i >= range->first)) {
            continue;
        }
        if (const uint32_t place = left.pos.size(), n = i - place; n > (gaps.empty() ? 0 : gaps.back().n)) {
            gaps.push_back({ place, n });
        }
        left.pos.push_back(c.pos[i]);
        left.score.push_back(c.score[i]);
        if (!c.second.empty()) {
            left.second.push_back(c.second[i]);
        }
    }
    c = std::move(left);
    return gaps;
}

static candidates find_candidates(const entry_source & source, std::vector<layer_scores> scores, const tail_view & tail, uint32_t n_recent, int n_threads) {
    const sequence   & seq = source.seq;
    const settings   & own = seq.config();
    const scorer     & how = *own.policy.score;
    const auto    & layers = seq.shared.layers;
    candidates result;
    result.share  = own.policy.share;
    result.cells  = { tail.cell.end() - n_recent, tail.cell.end() };
    result.n_kept = n_recent*seq.shared.n_pairs;

    allocation & asked = result.request;
    asked.profile   = own.table.get();
    asked.n_seen    = seq.n_seen();
    asked.floor     = own.floor;
    asked.n_threads = n_threads;

    // layers one by one, each freed of what it was made from: at 128k tokens a number per entry is half a gigabyte
    std::vector<std::vector<head_candidates>> found(layers.size());
    result.first.resize(layers.size());
    result.stay.resize(layers.size());
    asked.layer_preference.resize(how.has_preference ? layers.size() : 0);
    result.gaps.resize(layers.size());
    std::vector<int64_t> n_protected(layers.size());
    parallel_for(layers.size(), n_threads, [&](size_t ikv) {
        layer_scores layer = std::move(scores[ikv]);
        finish(seq, n_recent, layer);

        if (how.has_preference) {
            asked.layer_preference[ikv] = layer.preference;
        }
        for (uint32_t head = 0; head < layer.heads.size(); head++) {
            layer_scores::head & h = layer.heads[head];
            h.numbers.clear();
            result.first[ikv].push_back(h.first);
            std::vector<uint32_t> stay(h.first);
            std::iota(stay.begin(), stay.end(), 0);
            std::vector<std::pair<size_t, size_t>> ranges; // of candidates
            for (const position_range & r : own.protect) {
                const auto place = [&](llama_pos pos) { return std::lower_bound(h.pos.begin() + h.first, h.pos.begin() + h.last, pos) - h.pos.begin(); };
                const size_t from = place(r.first), to = place(r.end);
                const auto of_all = [&](llama_pos pos) { return std::lower_bound(h.pos.begin(), h.pos.end(), pos) - h.pos.begin(); };
                n_protected[ikv] += of_all(r.end) - of_all(r.first);
                ranges.emplace_back(from - h.first, to - h.first);
                for (size_t entry = from; entry < to; entry++) {
                    stay.push_back(entry);
                }
            }

            for (size_t entry = h.last; entry + n_recent < h.pos.size(); entry++) {
                stay.push_back(entry);
            }

            h.pos.erase(h.pos.begin() + h.last, h.pos.end());
            h.pos.erase(h.pos.begin(), h.pos.begin() + h.first);
            head_candidates c { (int32_t) layers[ikv].il, (int32_t) head, std::move(h.pos), std::move(h.score), std::move(h.second), (int64_t) stay.size() + n_recent };
            result.stay[ikv].push_back(std::move(stay));
            result.gaps[ikv].push_back(drop_others(c, ranges));
            found[ikv].push_back(std::move(c));
        }
    });
    result.n_protected = std::accumulate(n_protected.begin(), n_protected.end(), (int64_t) 0);
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        for (head_candidates & c : found[ikv]) {
            result.n_kept += result.stay[ikv][c.head].size();
            asked.heads.push_back(std::move(c));
        }
    }
    return result;
}

// The most entries whose allocation, padding and tail included, stays within the bytes.
static head_counts count_bytes(const sequence & seq, const candidates & from, const quota & most) {
    const auto cost = [&](const head_counts & counts) {
        std::vector<std::vector<uint32_t>> lengths;
        size_t i = 0;
        for (const auto & layer : from.stay) {
            lengths.emplace_back();
            for (const auto & entries : layer) {
                lengths.back().push_back(entries.size() + counts[i++]);
            }
        }
        return seq.shared.bytes_for(lengths, most.n_tail);
    };

    int64_t low  = 0; // fits
    int64_t high = from.n_kept + 1;
    for (const head_candidates & c : from.request.heads) {
        high += (int64_t) c.score.size();
    }
    high = std::min(high, most.n_entries + 1);
    // protected entries are never ranked, but count against the budget
    const counter count = from.share->prepare(from.request);
    head_counts best = count(low - from.n_kept);
    if (cost(best) > most.n_bytes) {
        throw std::runtime_error("budget of " + std::to_string(*most.n_bytes) + " bytes can't hold the tokens that are never evicted, " +
                std::to_string(from.n_kept) + " entries of sink, recent and protect, and the tail; accepted: at least " +
                std::to_string(cost(best)) + " bytes per sequence");
    }
    while (high - low > 1) {
        const int64_t middle = low + (high - low)/2;
        head_counts counts = count(middle - from.n_kept);
        if (cost(counts) <= most.n_bytes) {
            best = std::move(counts);
            low  = middle;
        } else {
            high = middle;
        }
    }
    return best;
}

selection choose(const entry_source & source, std::vector<layer_scores> scores, const quota & most, int n_threads) {
    const tail_view   tail   = source.seq.tail();
    const candidates  from   = find_candidates(source, std::move(scores), tail, most.n_recent, n_threads);
    if (from.n_protected > 0 && from.n_kept > most.n_room) {
        const int64_t n_pairs = source.seq.shared.n_pairs;
        throw std::runtime_error("the context has room for " + std::to_string(most.n_room/n_pairs) + " tokens besides those that come, and protect, sink and "
                "recent keep " + std::to_string((from.n_kept + n_pairs - 1)/n_pairs) + "; accepted: a larger context, or fewer that are protected");
    }
    const head_counts counts = most.n_bytes ? count_bytes(source.seq, from, most) : from.share->count(from.request, most.with(from.n_protected) - from.n_kept);
    const choice      chosen = select(from.request.heads, counts, n_threads);

    selection keep { {}, from.cells };
    size_t i = 0;
    for (size_t ikv = 0; ikv < from.stay.size(); ikv++) {
        keep.rows.emplace_back();
        for (uint32_t head = 0; head < from.stay[ikv].size(); head++, i++) {
            const auto & gaps = from.gaps[ikv][head];
            std::vector<uint32_t> entries = from.stay[ikv][head];
            auto behind = gaps.begin(); // of the gaps before a place, the last
            uint32_t n_others = 0;
            for (uint32_t place : chosen[i]) {
                for (; behind != gaps.end() && behind->place <= place; behind++) {
                    n_others = behind->n;
                }
                entries.push_back(from.first[ikv][head] + place + n_others);
            }
            std::inplace_merge(entries.begin(), entries.begin() + from.stay[ikv][head].size(), entries.end());
            keep.rows.back().emplace_back();
            for (uint32_t entry : entries) {
                keep.rows.back().back().push_back(source.row_of(ikv, head, entry, tail));
            }
        }
    }
    return keep;
}

}
