#include "engine/scoring.h"
#include "engine/recall.h"
#include "engine/score_graph.h"

#include "llama-impl.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

namespace laprox {

void user_scorer::call(llama_context & lctx, const sequence & seq, int32_t il, int32_t head, const std::vector<llama_pos> & pos, float * score) const {
    const std::string & name = seq.config().policy.name;
    if (!callback) {
        throw std::runtime_error("policy " + name + " needs a scorer of yours: laprox_set_scorer()");
    }
    struct guard {
        bool & flag;
        explicit guard(bool & flag) : flag(flag) { flag = true; }
        ~guard() { flag = false; }
    } guarded(running);
    if (!callback(&lctx, (llama_seq_id) seq.id, il, head, pos.data(), (int64_t) pos.size(), score, data)) {
        throw std::runtime_error("the scorer of policy " + name + " refused");
    }
}

// The graphs of as many heads as there is room for run as one: a device is asked once for all of them.
static void numbers_by_graph(workbench & bench, const score_source & from, const scorer & how, std::vector<layer_scores::head> & heads) {
    for (uint32_t head = 0; head < heads.size();) {
        graph_runner runner(bench);
        std::vector<std::unique_ptr<head_graph>> graphs;
        std::vector<ggml_tensor *> found;
        for (; head < heads.size() && runner.has_room(); head++) {
            if (heads[head].pos.empty()) {
                continue;
            }
            graphs.push_back(std::make_unique<head_graph>(runner, from, head, heads[head].pos));
            if (graphs.back()->n_window == 0 && how.needs == need::window) {
                graphs.pop_back();
                continue;
            }
            found.push_back(how.graph(*graphs.back()));
            runner.output(found.back());
        }
        if (found.empty()) {
            continue;
        }
        runner.run();
        const auto results = runner.read(found);
        for (size_t i = 0; i < graphs.size(); i++) {
            for (int32_t number = 0; number < how.n_numbers; number++) {
                const auto begin = results[i].begin() + number*graphs[i]->n;
                heads[graphs[i]->head].numbers[number].assign(begin, begin + graphs[i]->n);
            }
        }
    }
}

layer_scores score_layer(workbench & bench, const score_source & from, const scorer & how) {
    const int32_t il = (int32_t) from.layer().il;
    layer_scores result;
    result.n_gqa = from.layer().n_gqa();
    for (uint32_t head = 0; head < from.layer().n_head_kv; head++) {
        layer_scores::head scored;
        scored.pos = from.store.positions_of(head, from.tail);
        scored.numbers.assign(how.n_numbers, std::vector<float>(scored.pos.size()));
        result.heads.push_back(std::move(scored));
    }
    if (how.graph) {
        numbers_by_graph(bench, from, how, result.heads);
    }
    const llama_pos now = from.seq.next_position() + 1;
    for (uint32_t head = 0; head < result.heads.size(); head++) {
        const std::vector<llama_pos> & pos = result.heads[head].pos;
        std::vector<float> & number = result.heads[head].numbers[0];
        if (how.of_place) {
            std::transform(pos.begin(), pos.end(), number.begin(), [&](llama_pos p) { return how.of_place(il, (int32_t) head, p); });
        } else if (!how.graph && !pos.empty()) {
            from.seq.shared.custom.call(bench.lctx, from.seq, il, (int32_t) head, pos, number.data());
        } else if (how.at_age) {
            std::transform(pos.begin(), pos.end(), number.begin(), number.begin(), [&](llama_pos p, float n) { return how.at_age(n, now - p); });
        }
    }
    return result;
}

std::vector<layer_scores> score_entries(llama_context & lctx, const entry_source & from, const scorer & how) {
    const sequence & seq = from.seq;
    const observed window = seq.observed_queries();
    if (how.needs == need::window && window.slot.empty()) {
        throw std::runtime_error("no queries have been observed since the sequence was restored or cut; evaluate a token first");
    }
    const tail_view tail = seq.tail();
    workbench bench(lctx);
    score_source::mask unbroken;
    std::vector<layer_scores> result;
    for (size_t ikv = 0; ikv < seq.shared.layers.size(); ikv++) {
        result.push_back(score_layer(bench, { seq, ikv, from.store(ikv), tail, window, seq.window.rows[ikv], unbroken }, how));
    }
    LLAMA_LOG_DEBUG("%s: sequence %u: %lld graphs, %zu bytes of inputs, %zu of results\n", __func__, seq.id, (long long) bench.n_graphs,
            bench.bytes_in, bench.bytes_out);
    return result;
}

void finish(const sequence & seq, uint32_t n_recent, layer_scores & layer) {
    const settings & own = seq.config();
    const llama_pos recent = seq.next_position() - (n_recent < (uint32_t) own.recent ? own.recent : 0);
    for (auto & h : layer.heads) {
        h.last  = std::lower_bound(h.pos.begin(), h.pos.end() - n_recent, recent) - h.pos.begin();
        h.first = std::lower_bound(h.pos.begin(), h.pos.begin() + h.last, own.sink) - h.pos.begin();
    }
    finish(*own.policy.score, layer);
}

}
