#include "engine/scoring.h"
#include "engine/recall.h"
#include "engine/score_graph.h"

#include <algorithm>
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

static std::vector<std::vector<float>> numbers_of(workbench & bench, const score_source & from, const scorer & how, uint32_t head, const std::vector<llama_pos> & pos) {
    const int32_t il = (int32_t) from.layer().il;
    std::vector<std::vector<float>> numbers(how.n_numbers, std::vector<float>(pos.size()));
    if (pos.empty()) {
        return numbers;
    }
    if (how.graph) {
        head_graph graph(bench, from, head, pos);
        if (graph.n_window > 0 || how.needs != need::window) {
            numbers = graph.run(how.graph(graph));
        }
        const llama_pos now = from.seq.next_position() + 1;
        for (size_t i = 0; how.at_age && i < pos.size(); i++) {
            numbers[0][i] = how.at_age(numbers[0][i], now - pos[i]);
        }
    } else if (how.of_place) {
        for (size_t i = 0; i < pos.size(); i++) {
            numbers[0][i] = how.of_place(il, (int32_t) head, pos[i]);
        }
    } else {
        from.seq.shared.custom.call(bench.lctx, from.seq, il, (int32_t) head, pos, numbers[0].data());
    }
    return numbers;
}

layer_scores score_layer(workbench & bench, const score_source & from, const scorer & how) {
    layer_scores result;
    result.n_gqa = from.layer().n_gqa();
    for (uint32_t head = 0; head < from.layer().n_head_kv; head++) {
        layer_scores::head scored;
        scored.pos     = from.store.positions_of(head, from.tail);
        scored.numbers = numbers_of(bench, from, how, head, scored.pos);
        result.heads.push_back(std::move(scored));
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
    return result;
}

void finish(const settings & own, uint32_t n_recent, layer_scores & layer) {
    for (auto & h : layer.heads) {
        h.last  = h.pos.size() - n_recent;
        h.first = std::lower_bound(h.pos.begin(), h.pos.begin() + h.last, own.sink) - h.pos.begin();
    }
    finish(*own.policy.score, layer);
}

}
