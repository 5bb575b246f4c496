#include "engine/select.h"
#include "engine/recall.h"
#include "engine/sequence.h"
#include "core/parallel.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

namespace laprox {

// What may be evicted, scored; and what may not.
struct candidates {
    const allocator * share;
    allocation request;
    // [layer][head]: how many entries are before the candidates; which of the entries behind are candidates, none: all; and the
    // entries that stay, of attention sinks and protected tokens, ascending
    std::vector<std::vector<size_t>> first;
    std::vector<std::vector<std::vector<uint32_t>>> index, stay;
    std::vector<uint32_t> cells; // of the tail that stay there
    int64_t n_kept = 0; // entries that stay, those of the tail included
};

// Takes away what is no candidate, of score -inf; returns which are left, none: all.
static std::vector<uint32_t> drop_others(head_candidates & c) {
    if (std::find(c.score.begin(), c.score.end(), -INFINITY) == c.score.end()) {
        return {};
    }
    head_candidates left { c.layer, c.head, {}, {}, {}, c.n_protected };
    std::vector<uint32_t> index;
    for (uint32_t i = 0; i < c.score.size(); i++) {
        if (c.score[i] == -INFINITY) {
            continue;
        }
        index.push_back(i);
        left.pos.push_back(c.pos[i]);
        left.score.push_back(c.score[i]);
        if (!c.second.empty()) {
            left.second.push_back(c.second[i]);
        }
    }
    c = std::move(left);
    return index;
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
    result.index.resize(layers.size());
    parallel_for(layers.size(), n_threads, [&](size_t ikv) {
        layer_scores layer = std::move(scores[ikv]);
        finish(own, n_recent, layer);

        if (how.has_preference) {
            asked.layer_preference[ikv] = layer.preference;
        }
        for (uint32_t head = 0; head < layer.heads.size(); head++) {
            layer_scores::head & h = layer.heads[head];
            h.numbers.clear();
            result.first[ikv].push_back(h.first);
            std::vector<uint32_t> stay(h.first);
            std::iota(stay.begin(), stay.end(), 0);
            for (size_t i = 0; i < h.score.size(); i++) {
                if (own.protect.holds(h.pos[h.first + i]) && h.score[i] != -INFINITY) {
                    stay.push_back(h.first + i);
                    h.score[i] = -INFINITY; // no candidate
                }
            }

            h.pos.erase(h.pos.begin() + h.last, h.pos.end());
            h.pos.erase(h.pos.begin(), h.pos.begin() + h.first);
            head_candidates c { (int32_t) layers[ikv].il, (int32_t) head, std::move(h.pos), std::move(h.score), std::move(h.second), (int64_t) stay.size() + n_recent };
            result.stay[ikv].push_back(std::move(stay));
            result.index[ikv].push_back(drop_others(c));
            found[ikv].push_back(std::move(c));
        }
    });
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
    const head_counts counts = most.n_bytes ? count_bytes(source.seq, from, most) : from.share->count(from.request, most.n_entries - from.n_kept);
    const choice      chosen = select(from.request.heads, counts, n_threads);

    selection keep { {}, from.cells };
    size_t i = 0;
    for (size_t ikv = 0; ikv < from.stay.size(); ikv++) {
        keep.rows.emplace_back();
        for (uint32_t head = 0; head < from.stay[ikv].size(); head++, i++) {
            const auto & index = from.index[ikv][head];
            std::vector<uint32_t> entries = from.stay[ikv][head];
            for (uint32_t place : chosen[i]) {
                entries.push_back(from.first[ikv][head] + (index.empty() ? place : index[place]));
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
