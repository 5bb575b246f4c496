#include "engine/scorer.h"
#include "engine/score_graph.h"

#include <stdexcept>

namespace laprox {

score_table score_stream(llama_context & lctx, const cache & kv, uint32_t strm, const scorer & how) {
    if (how.needs_queries && kv.window_slots(strm).empty()) {
        throw std::runtime_error("no queries have been observed since the sequence was restored or cut; evaluate a token first");
    }
    workbench bench(lctx);
    const std::vector<uint32_t> tail = kv.cells_by_position(strm);
    const llama_pos now = kv.next_position(strm) + 1;
    head_graph::mask dense_mask;
    score_table result(kv.get_layers().size());
    for (size_t ikv = 0; ikv < result.size(); ikv++) {
        const layer_info & layer = kv.get_layers()[ikv];
        for (uint32_t head = 0; head < layer.n_head_kv; head++) {
            const cache::held have = kv.held_by(strm, ikv, head, tail);
            const auto & pos = have.pos;
            auto & numbers = result[ikv].emplace_back(how.n_numbers, std::vector<float>(pos.size()));
            if (pos.empty()) {
                continue;
            }
            if (how.graph) {
                head_graph graph(bench, kv, strm, ikv, head, have, dense_mask);
                if (graph.n_window > 0 || !how.needs_queries) {
                    numbers = graph.run(how.graph(graph));
                }
                for (size_t i = 0; how.at_age && i < pos.size(); i++) {
                    numbers[0][i] = how.at_age(numbers[0][i], now - pos[i]);
                }
            } else if (how.of_place) {
                for (size_t i = 0; i < pos.size(); i++) {
                    numbers[0][i] = how.of_place((int32_t) layer.il, (int32_t) head, pos[i]);
                }
            } else {
                kv.call_scorer(lctx, strm, (int32_t) layer.il, (int32_t) head, pos, numbers[0].data());
            }
        }
    }
    return result;
}

}
