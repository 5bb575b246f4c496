#include "engine/window.h"

#include <algorithm>

namespace laprox {

window_input::window_input(cache & kv, const llm_graph_context & g) :
        streams(kv.streams_of(g.ubatch)),
        n_tokens(g.n_tokens/(int64_t) streams.size()),
        n_observed(std::min<int64_t>(n_tokens, kv.n_slots)),
        kv(kv) {
    slots = ggml_new_tensor_2d(g.ctx0, GGML_TYPE_I64, n_observed, streams.size());
    ggml_set_input(slots);
    ggml_set_name(slots, "laprox_window_slots");
    built_for = generations();
}

window_input & window_input::of(const llm_graph_context & g, cache & kv) {
    for (auto & input : g.res->inputs) {
        auto * window = dynamic_cast<window_input *>(input.get());
        if (window && &window->kv == &kv) {
            return *window;
        }
    }
    return *static_cast<window_input *>(g.res->add_input(llm_graph_input_ptr(new window_input(kv, g))));
}

std::vector<uint64_t> window_input::generations() const {
    std::vector<uint64_t> result;
    for (uint32_t strm : streams) {
        result.push_back(kv.streams[strm].generation);
    }
    return result;
}

void window_input::set_input(const llama_ubatch * ubatch) {
    if (!slots->buffer) {
        return;
    }
    std::vector<int64_t> data;
    for (size_t s = 0; s < streams.size(); s++) {
        stream & st = kv.streams[streams[s]];
        st.scores.clear();
        for (int64_t i = n_tokens - n_observed; i < n_tokens; i++) {
            const int64_t slot = st.n_observed++ % kv.n_slots;
            st.window_pos[slot] = ubatch->pos[s*n_tokens + i];
            data.push_back(slot);
        }
    }
    ggml_backend_tensor_set(slots, data.data(), 0, ggml_nbytes(slots));
}

bool window_input::can_reuse(const llm_graph_params & params) {
    return kv.streams_of(params.ubatch) == streams
        && params.ubatch.n_tokens == n_tokens*streams.size()
        && generations() == built_for;
}

}
