// Scoring, selecting and compacting: from what a stream holds to what it keeps.

#include "engine/cache.h"
#include "engine/graph.h"
#include "engine/scorer.h"
#include "core/parallel.h"

#include "llama-context.h"
#include "llama-impl.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#ifdef __GLIBC__
#include <malloc.h>
#endif

namespace laprox {

// Small models' buffers come from the heap, which glibc would hold on to.
static void trim_heap() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

// The numbers, while nothing else may happen to the cache.
score_table cache::read_scores(llama_context & lctx, uint32_t strm) {
    struct guard {
        bool & flag;
        explicit guard(bool & flag) : flag(flag) { flag = true; }
        ~guard() { flag = false; }
    } running(scoring);
    return score_stream(lctx, *this, strm, *config_of(strm).policy.score);
}

void cache::score(llama_context & lctx, llama_seq_id seq_id) {
    const uint32_t   strm   = stream_index(seq_id);
    const settings & own = config_of(strm);
    if (!own.evicts()) {
        throw std::runtime_error("policy " + own.policy.name + " scores nothing");
    }
    auto & scores = streams[strm].scores;
    scores.clear();
    for (auto & layer_numbers : read_scores(lctx, strm)) {
        scores.emplace_back();
        for (auto & numbers : layer_numbers) {
            scores.back().push_back(std::move(numbers.front()));
        }
    }
}

void cache::call_scorer(llama_context & ctx, uint32_t strm, int32_t il, int32_t head, const std::vector<llama_pos> & pos, float * score) const {
    if (!custom) {
        throw std::runtime_error("policy " + config_of(strm).policy.name + " needs a scorer of yours: laprox_set_scorer()");
    }
    if (!custom(&ctx, (llama_seq_id) strm, il, head, pos.data(), (int64_t) pos.size(), score, custom_data)) {
        throw std::runtime_error("the scorer of policy " + config_of(strm).policy.name + " refused");
    }
}

void cache::compress(llama_context & lctx, llama_seq_id seq_id) {
    const uint32_t strm = stream_index(seq_id);
    streams[strm].n_wanted = 0; // of a batch that is gone
    streams[strm].gen_begin = streams[strm].gen_end = next_position(strm); // the prompt is in: what comes now is generated
    streams[strm].chosen_early = false;
    compress_stream(lctx, strm, n_seen(strm), 0);
}

// What came since the last compression stays exact until it is more than min_tokens; but where entries were chosen while
// this prompt came in, its end, the question, has its say, too.
bool cache::prompt_done(llama_seq_id seq_id) {
    const uint32_t strm = stream_index(seq_id);
    stream & st = streams[strm];
    st.gen_begin = st.gen_end = next_position(strm);
    return st.chosen_early || next_position(strm) - st.compressed_for > config_of(strm).min_tokens;
}

// n_budget_seen: what a percentage refers to; more than was seen while a prompt is still coming in.
// n_least: tokens per KV head that stay in any case.
void cache::compress_stream(llama_context & lctx, uint32_t strm, int64_t n_budget_seen, int64_t n_least) {
    const settings & own = config_of(strm);
    stream & st = streams[strm];
    // nothing may be evicted, or there is nothing to evict
    if (!own.evicts() || n_seen(strm) <= std::max(own.min_tokens, own.sink + own.recent)) {
        return;
    }
    const bool    by_bytes  = own.budget.unit == budget_unit::bytes;
    const size_t  limit     = by_bytes ? byte_limit(strm) : 0;
    // a share of all tokens seen, or many bytes, may come to more than the context has room for
    const int64_t n_room    = std::max<int64_t>((int64_t) kv_size - st.n_wanted, 0)*n_pairs;
    const int64_t n_asked   = by_bytes ? n_room : std::max(budget_entries(own.budget, n_budget_seen, n_pairs), n_least*n_pairs);
    const int64_t n_entries = std::min(n_asked, n_room);
    // under pressure a byte budget has to make room for a longer tail even where it holds now
    const bool within = by_bytes ? st.n_wanted == 0 && stream_bytes(strm) <= limit : stats(strm).entries_held <= n_entries;
    if (within) {
        return;
    }

    const int64_t t0 = ggml_time_us();
    score_table scores = read_scores(lctx, strm);
    const int64_t t1 = ggml_time_us();

    const uint32_t n_recent = std::min<uint32_t>(own.recent, cells[strm].get_used());
    const uint32_t n_tail   = GGML_PAD(n_recent + std::max(st.n_wanted, 1u), tail_block);
    const candidates from   = find_candidates(strm, std::move(scores), lctx.n_threads_batch());
    const selection  keep   = choose(strm, from, by_bytes ? count_bytes(from, n_entries, n_tail, limit)
                                                          : from.share->count(from.request, n_entries - from.n_kept));
    const int64_t t2 = ggml_time_us();

    relayout(lctx, strm, keep, n_tail);
    const int64_t t3 = ggml_time_us();

    st.compressed_for = next_position(strm);
    st.n_compressions++;
    st.t_score_us   += t1 - t0;
    st.t_select_us  += t2 - t1;
    st.t_compact_us += t3 - t2;
    LLAMA_LOG_DEBUG("%s: stream %u: kept %lld entries of %lld, %.2f MiB; score %.1f ms, select %.1f ms, compact %.1f ms\n",
            __func__, strm, (long long) stats(strm).entries_held, (long long) stats(strm).entries_full,
            stream_bytes(strm)/1048576.0, (t1 - t0)/1e3, (t2 - t1)/1e3, (t3 - t2)/1e3);
}

// Takes candidates away that are never to be kept, of score -inf; returns which are left, none: all.
static std::vector<uint32_t> drop_lost(head_candidates & c) {
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

cache::candidates cache::find_candidates(uint32_t strm, score_table scores, int n_threads) const {
    const settings & own = config_of(strm);
    candidates result;
    result.share = own.policy.share;
    const std::vector<uint32_t> tail = cells_by_position(strm);
    result.kept.cells = tail;
    const uint32_t n_recent = std::min<uint32_t>(own.recent, result.kept.cells.size());
    result.kept.cells.erase(result.kept.cells.begin(), result.kept.cells.end() - n_recent);
    result.n_kept = n_recent*n_pairs;

    allocation & asked = result.request;
    asked.profile = own.table.get();
    asked.n_seen  = n_seen(strm);
    asked.floor   = own.floor;
    asked.n_threads = n_threads;

    // layers one by one, each freed of what it was made from: at 128k tokens a number per entry is half a gigabyte
    std::vector<std::vector<head_candidates>> found(layers.size());
    result.first.resize(layers.size());
    result.kept.rows.resize(layers.size());
    asked.layer_preference.resize(own.policy.score->has_preference ? layers.size() : 0);
    result.index.resize(layers.size());
    parallel_for(layers.size(), n_threads, [&](size_t ikv) {
        layer_scores layer;
        layer.n_gqa = layers[ikv].n_gqa();
        for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
            std::vector<llama_pos> pos = held_by(strm, ikv, head, tail).pos;
            layer_scores::head h { {}, std::move(scores[ikv][head]), 0, pos.size() - n_recent, {}, {} };
            h.first = std::lower_bound(pos.begin(), pos.begin() + h.last, own.sink) - pos.begin();
            h.pos   = std::move(pos);
            layer.heads.push_back(std::move(h));
        }
        finish(*own.policy.score, layer);

        if (own.policy.score->has_preference) {
            asked.layer_preference[ikv] = layer.preference;
        }
        for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
            layer_scores::head & h = layer.heads[head];
            h.numbers.clear();
            result.first[ikv].push_back(h.first);
            result.kept.rows[ikv].emplace_back();
            for (size_t entry = 0; entry < h.first; entry++) {
                result.kept.rows[ikv].back().push_back(row_of(strm, ikv, head, entry, tail));
            }

            h.pos.erase(h.pos.begin() + h.last, h.pos.end());
            h.pos.erase(h.pos.begin(), h.pos.begin() + h.first);
            head_candidates c { (int32_t) layers[ikv].il, (int32_t) head, std::move(h.pos), std::move(h.score), std::move(h.second), (int64_t) h.first + n_recent };
            result.index[ikv].push_back(drop_lost(c));
            found[ikv].push_back(std::move(c));
        }
    });
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        for (head_candidates & c : found[ikv]) {
            result.n_kept += result.first[ikv][c.head];
            asked.heads.push_back(std::move(c));
        }
    }
    return result;
}

cache::selection cache::choose(uint32_t strm, const candidates & from, const head_counts & counts) const {
    const choice chosen = laprox::select(from.request.heads, counts, from.request.n_threads);
    const std::vector<uint32_t> tail = cells_by_position(strm);

    selection keep = from.kept;
    size_t i = 0;
    for (size_t ikv = 0; ikv < keep.rows.size(); ikv++) {
        for (size_t head = 0; head < keep.rows[ikv].size(); head++, i++) {
            const auto & index = from.index[ikv][head];
            for (uint32_t place : chosen[i]) {
                const size_t entry = from.first[ikv][head] + (index.empty() ? place : index[place]);
                keep.rows[ikv][head].push_back(row_of(strm, ikv, head, entry, tail));
            }
        }
    }
    return keep;
}

// The most entries, up to n_most, whose allocation, padding and tail included, stays within `limit` bytes.
head_counts cache::count_bytes(const candidates & from, int64_t n_most, uint32_t n_tail, size_t limit) const {
    const auto cost = [&](const head_counts & counts) {
        std::vector<std::vector<uint32_t>> lengths = kept_lengths(from.kept);
        size_t i = 0;
        for (auto & layer_lengths : lengths) {
            for (uint32_t & length : layer_lengths) {
                length += counts[i++];
            }
        }
        return bytes_for(lengths, n_tail);
    };

    int64_t low  = 0; // fits
    int64_t high = from.n_kept + 1;
    for (const head_candidates & c : from.request.heads) {
        high += (int64_t) c.score.size();
    }
    high = std::min(high, n_most + 1);
    // protected entries are never ranked, but count against the budget
    const counter count = from.share->prepare(from.request);
    head_counts best = count(low - from.n_kept);
    if (cost(best) > limit) {
        throw std::runtime_error("budget of " + std::to_string(limit) + " bytes can't hold the tokens that are never evicted, " +
                std::to_string(from.n_kept) + " entries of sink and recent, and the tail; accepted: at least " +
                std::to_string(cost(best)) + " bytes per sequence");
    }
    while (high - low > 1) {
        const int64_t middle = low + (high - low)/2;
        head_counts counts = count(middle - from.n_kept);
        if (cost(counts) <= limit) {
            best = std::move(counts);
            low  = middle;
        } else {
            high = middle;
        }
    }
    return best;
}

std::vector<std::vector<uint32_t>> cache::kept_lengths(const selection & keep) {
    std::vector<std::vector<uint32_t>> result;
    for (const auto & layer_rows : keep.rows) {
        result.emplace_back();
        for (const auto & head_rows : layer_rows) {
            result.back().push_back(head_rows.size());
        }
    }
    return result;
}

size_t cache::bytes_for(const std::vector<std::vector<uint32_t>> & n_kept, uint32_t n_tail) const {
    size_t bytes = 0;
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        bytes += layer_store::bytes_for(layers[ikv], n_kept[ikv], n_tail);
    }
    return bytes;
}

// Cache rows as rows of int32, so that moving them is exact for every type.
static ggml_tensor * as_i32(ggml_context * ctx, ggml_tensor * t) {
    ggml_tensor * view = ggml_view_2d(ctx, t, t->ne[0], t->ne[1], t->nb[1], 0);
    view->type  = GGML_TYPE_I32;
    view->ne[0] = t->nb[1]/sizeof(int32_t);
    view->nb[0] = sizeof(int32_t);
    return view;
}

void cache::relayout(llama_context & lctx, uint32_t strm, const selection & keep, uint32_t n_tail) {
    stream & st = streams[strm];
    const auto lengths = kept_lengths(keep);
    const uint32_t n_cells = keep.cells.size();

    std::vector<std::unique_ptr<layer_store>> fresh;
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        fresh.push_back(std::make_unique<layer_store>(layers[ikv], lengths[ikv], n_tail));
    }

    workbench bench(lctx);
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        const layer_store & from = *st.layers[ikv];
        layer_store       & to   = *fresh[ikv];

        graph_runner graph(bench);
        std::vector<std::vector<int32_t>> indices(to.classes.size());
        for (size_t c = 0; c < to.classes.size(); c++) {
            const store_class & cls = to.classes[c];
            for (uint32_t head : cls.plan.heads) {
                const auto & rows = keep.rows[ikv][head];
                indices[c].insert(indices[c].end(), cls.plan.n_rows - rows.size(), 0); // padding: any row will do
                for (uint32_t row : rows) {
                    indices[c].push_back((int32_t) (from.held_row(head) + row));
                }
                for (uint32_t cell : keep.cells) {
                    indices[c].push_back((int32_t) (from.tail_row(head) + cell));
                }
            }
            if (indices[c].empty()) {
                continue;
            }
            ggml_tensor * index = graph.input(GGML_TYPE_I32, indices[c].size(), 1, indices[c].data());
            const auto move = [&](ggml_tensor * src, ggml_tensor * dst) {
                ggml_tensor * d    = as_i32(graph.ctx, dst);
                ggml_tensor * rows = ggml_get_rows(graph.ctx, as_i32(graph.ctx, src), index);
                const int64_t n    = cls.plan.n_rows + n_cells;
                ggml_tensor * runs = ggml_view_3d(graph.ctx, d, d->ne[0], n, cls.plan.heads.size(), d->nb[1], cls.stride*d->nb[1], cls.row0*d->nb[1]);
                ggml_build_forward_expand(graph.gf, ggml_cpy(graph.ctx, ggml_reshape_3d(graph.ctx, rows, d->ne[0], n, cls.plan.heads.size()), runs));
            };
            for (size_t i = 0; i < to.pools.size(); i++) {
                move(from.pools[i], to.pools[i]);
            }
        }
        if (ggml_graph_n_nodes(graph.gf) > 0) {
            graph.run();
        }
    }

    // From here on nothing can fail.
    std::vector<std::vector<std::vector<llama_pos>>> kept(layers.size());
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        for (uint32_t head = 0; head < layers[ikv].n_head_kv; head++) {
            const auto & before = st.kept[ikv][head];
            kept[ikv].emplace_back();
            for (uint32_t row : keep.rows[ikv][head]) {
                kept[ikv][head].push_back(row < before.size() ? before[row] : cells[strm].pos_get(row - before.size()));
            }
        }
    }
    if (n_cells > 0 && n_cells < cells[strm].get_used()) {
        st.tail_begin = cells[strm].pos_get(keep.cells.front());
        st.n_absorbed += cells[strm].get_used() - n_cells;
    }
    const llama_kv_cells tail = cells[strm].cp(keep.cells);
    cells[strm].reset();
    cells[strm].set(0, tail);
    cell_heads[strm] = n_cells;

    replace_storage(strm, std::move(fresh));
    st.kept = std::move(kept);
    st.scores.clear();

    trim_heap();
}

// Cells stay where they are. One layer after the other: beside what there is, only one layer needs room twice. If a
// layer finds none, those before it have grown, which does no harm.
void cache::grow_tail(llama_context & lctx, uint32_t strm, uint32_t n_tail) {
    stream & st = streams[strm];
    workbench bench(lctx);
    for (size_t ikv = 0; ikv < layers.size(); ikv++) {
        const layer_store & from = *st.layers[ikv];
        auto fresh = std::make_unique<layer_store>(layers[ikv], from.n_kept, n_tail);

        graph_runner graph(bench);
        for (size_t c = 0; c < from.classes.size(); c++) {
            const store_class & a = from.classes[c];
            const store_class & b = fresh->classes[c];
            const int64_t n = a.plan.n_rows + std::min(used_tail(strm), from.n_tail);
            for (size_t i = 0; n > 0 && i < from.pools.size(); i++) {
                const auto runs = [&](ggml_tensor * pool, const store_class & cls) {
                    ggml_tensor * words = as_i32(graph.ctx, pool);
                    return ggml_view_3d(graph.ctx, words, words->ne[0], n, cls.plan.heads.size(), words->nb[1], cls.stride*words->nb[1], cls.row0*words->nb[1]);
                };
                ggml_build_forward_expand(graph.gf, ggml_cpy(graph.ctx, runs(from.pools[i], a), runs(fresh->pools[i], b)));
            }
        }
        if (ggml_graph_n_nodes(graph.gf) > 0) {
            graph.run();
        }
        st.layers[ikv] = std::move(fresh);
        st.generation++;
    }
    trim_heap();
}

// How many tail cells a stream may have: no more rows than llama.cpp would have allocated, and less where the prompt
// is compressed while it comes in.
uint32_t cache::tail_limit(uint32_t strm) const {
    const settings & own = config_of(strm);
    const stream   & st     = streams[strm];

    const int64_t kept = (n_kept(strm) + n_pairs - 1)/n_pairs;
    int64_t limit = (int64_t) kv_size - kept;

    if (own.chunked) {
        // what the budget may come to, and half as much again or a few batches on top of it, so that not every one is compressed
        int64_t held = std::max(own.min_tokens, own.sink + own.recent);
        if (own.budget.unit != budget_unit::bytes) {
            held = std::max(held, budget_entries(own.budget, kv_size, n_pairs)/n_pairs);
        }
        const int64_t more = std::max({ held/2, (int64_t) st.n_wanted, std::min<int64_t>(4*(int64_t) st.n_wanted, 1024) });
        limit = std::min<int64_t>(limit, GGML_PAD(std::max<int64_t>(held - kept, own.recent) + more, tail_block));
    }
    return (uint32_t) std::max<int64_t>(limit/tail_block*tail_block, 0);
}

// The same within a byte budget.
uint32_t cache::tail_limit_in_bytes(uint32_t strm) const {
    const settings & own = config_of(strm);
    uint32_t limit = tail_limit(strm);
    if (own.budget.unit == budget_unit::bytes && (own.chunked || streams[strm].n_compressions > 0)) {
        std::vector<std::vector<uint32_t>> lengths;
        for (const auto & store : streams[strm].layers) {
            lengths.push_back(store->n_kept);
        }
        while (limit > 0 && bytes_for(lengths, limit) > byte_limit(strm)) {
            limit -= tail_block;
        }
    }
    return limit;
}

// Whether text has been generated long enough since the last compression to be compressed itself, so that a generation
// of any length stays within its budget and a tail.
bool cache::overgrown(uint32_t strm) const {
    const settings & own = config_of(strm);
    const stream   & st  = streams[strm];
    return own.evicts() && st.gen_begin >= 0 && st.gen_end - st.gen_begin > std::max<int64_t>(own.min_tokens, tail_block);
}

// Room for the batch that found none: a longer tail, or a compression. While a prompt is coming in, a dense cache
// may exceed its byte budget, as it does for the first one; the compression at the prompt's end restores it.
void cache::make_room(llama_context & lctx, uint32_t strm) {
    const settings & own = config_of(strm);
    stream & st = streams[strm];
    std::string reason;
    const auto missing = [&] { return cells[strm].get_used() + st.n_wanted > tail_rows(strm); };
    const auto grow    = [&](uint32_t limit) {
        const uint32_t needed = GGML_PAD(cells[strm].get_used() + st.n_wanted, tail_block);
        if (!missing() || needed > limit) {
            return;
        }
        const uint32_t wish = std::max<uint32_t>(needed, GGML_PAD(tail_rows(strm)/4*5, tail_block));
        try {
            grow_tail(lctx, strm, std::min(wish, limit));
        } catch (const std::exception & e) {
            reason = std::string("; ") + e.what();
        }
    };

    const auto shrink = [&](int64_t n_budget_seen, int64_t n_least) {
        const int64_t n_before = st.n_compressions;
        try {
            compress_stream(lctx, strm, n_budget_seen, n_least);
            st.chosen_early = st.chosen_early || st.n_compressions > n_before; // until what comes in turns out to be generated
        } catch (const std::exception & e) {
            reason = std::string("; ") + e.what();
        }
    };

    // The latest queries decide about what was generated. A share of a short text is little, so min_tokens stay.
    if (overgrown(strm)) {
        shrink(n_seen(strm), own.budget.unit == budget_unit::fraction ? own.min_tokens : 0);
        st.gen_begin = st.gen_end = next_position(strm); // also where nothing could be evicted: not again at the next token
        if (!reason.empty()) {
            LLAMA_LOG_WARN("laprox: the text generated so far wasn't compressed%s\n", reason.c_str());
        }
    }
    grow(tail_limit_in_bytes(strm));

    const bool prompt = !own.chunked && st.n_wanted >= tail_block;
    if (prompt) {
        grow(tail_limit(strm));
    }
    if (missing()) {
        shrink(own.chunked ? std::max<int64_t>(kv_size, n_seen(strm)) : n_seen(strm), 0);
        grow(tail_limit_in_bytes(strm));
    }
    if (!own.chunked) {
        grow(tail_limit(strm));
    }
    if (missing()) {
        throw std::runtime_error("no room for " + std::to_string(st.n_wanted) + " more tokens: " + std::to_string(n_seen(strm)) + " seen, " +
                std::to_string(stats(strm).entries_held/n_pairs) + " held per KV head, " + std::to_string(tail_limit_in_bytes(strm)) +
                " tail cells allowed" + reason);
    }
    // llama.cpp looks for cells from here on, and beyond the last one there is no storage
    uint32_t & head = cell_heads[strm];
    for (head = 0; head < used_tail(strm) && !cells[strm].is_empty(head);) {
        head++;
    }
}

bool cache::update(llama_context & lctx) {
    if (request) {
        try {
            request(lctx);
        } catch (const std::exception & e) {
            refusal = e.what();
        }
        return refusal.empty();
    }
    bool made_room = true;
    for (uint32_t strm = 0; strm < streams.size(); strm++) {
        if (streams[strm].n_wanted == 0) {
            continue;
        }
        try {
            make_room(lctx, strm);
        } catch (const std::exception & e) {
            LLAMA_LOG_ERROR("%s: stream %u: %s\n", __func__, strm, e.what());
            set_last_error(e.what());
            made_room = false;
        }
        streams[strm].n_wanted = 0;
    }
    return made_room;
}

}
