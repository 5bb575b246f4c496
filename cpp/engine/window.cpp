#include "engine/window.h"
#include "engine/projection.h"

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
    if (kv.get_query_stats()) {
        back   = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_tokens);
        weight = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_F32, g.n_tokens);
        ggml_set_input(back);
        ggml_set_input(weight);
    }
    built_for = generations();
}

ggml_tensor * window_input::key_rotation(ggml_context * ctx, const cache & owner, int64_t d_k) {
    if (!owner.rotated_k) {
        return nullptr;
    }
    ggml_tensor *& rotation = rotations[rotation_block_k(d_k)];
    if (!rotation) {
        rotation = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rotation_block_k(d_k), rotation_block_k(d_k));
        ggml_set_input(rotation);
    }
    return rotation;
}

ggml_tensor * window_input::tail_mask(ggml_context * ctx, size_t s, ggml_backend_buffer_type_t buft, ggml_tensor * tail, int64_t n_heads) {
    ggml_tensor *& one = single[s];
    if (!one || one->ne[0] != tail->ne[0]) {
        one = ggml_is_contiguous(tail) ? tail : ggml_cont(ctx, tail);
    }
    if (n_heads == 1) {
        return one;
    }
    ggml_tensor *& all = repeated[{ s, buft }];
    if (!all || all->ne[0] != tail->ne[0]) {
        int64_t n_most = 1;
        for (size_t ikv = 0; ikv < kv.layers.size(); ikv++) {
            for (const store_class & cls : kv.streams[streams[s]].layers[ikv]->classes) {
                n_most = std::max(n_most, kv.layers[ikv].buft == buft && cls.kept_mask ? cls.kept_mask->ne[3] : 1);
            }
        }
        all = ggml_repeat_4d(ctx, one, one->ne[0], one->ne[1], 1, n_most);
    }
    return ggml_view_4d(ctx, all, all->ne[0], all->ne[1], 1, n_heads, all->nb[1], all->nb[2], all->nb[3], 0);
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

// A token, or drafts of a few, all with logits. A prompt asks for those of its last token.
bool window_input::generated(const llama_ubatch & ubatch, size_t s) const {
    const int8_t * output = ubatch.output + s*n_tokens;
    return n_tokens <= max_drafts && std::all_of(output, output + n_tokens, [](int8_t wanted) { return wanted != 0; });
}

void window_input::set_input(const llama_ubatch * ubatch) {
    if (!slots->buffer) {
        return;
    }
    std::vector<int64_t> data;
    for (size_t s = 0; s < streams.size(); s++) {
        stream & st = kv.streams[streams[s]];
        st.scores.clear();
        if (generated(*ubatch, s)) {
            st.gen_end = ubatch->pos[(s + 1)*n_tokens - 1] + 1;
            st.chosen_early = st.chosen_early && st.gen_begin < 0; // a prompt's last token looks generated, too
        } else {
            st.gen_begin = -1; // laprox_prompt_done() will say when it is in
        }
        const std::vector<uint32_t> free = kv.free_slots(streams[s], n_observed);
        for (int64_t i = 0; i < n_observed; i++) {
            st.window_pos[free[i]] = ubatch->pos[s*n_tokens + n_tokens - n_observed + i];
            data.push_back(free[i]);
        }
    }
    ggml_backend_tensor_set(slots, data.data(), 0, ggml_nbytes(slots));
    if (!back || !back->buffer) {
        return;
    }
    std::vector<int32_t> positions;
    std::vector<float>   weights;
    for (size_t s = 0; s < streams.size(); s++) {
        for (int64_t i = 0; i < n_tokens; i++) {
            const llama_pos pos = ubatch->pos[s*n_tokens + i];
            positions.push_back(-pos);
            const bool sink = pos < kv.config_of(streams[s]).sink;
            weights.push_back(sink ? 0.0f : 1.0f);
            kv.streams[streams[s]].n_summed += !sink;
        }
    }
    ggml_backend_tensor_set(back,   positions.data(), 0, ggml_nbytes(back));
    ggml_backend_tensor_set(weight, weights.data(),   0, ggml_nbytes(weight));
    for (auto & [block, rotation] : rotations) {
        const std::vector<float> matrix = hadamard_matrix(block);
        ggml_backend_tensor_set(rotation, matrix.data(), 0, ggml_nbytes(rotation));
    }
}

bool window_input::can_reuse(const llm_graph_params & params) {
    return kv.streams_of(params.ubatch) == streams
        && params.ubatch.n_tokens == n_tokens*streams.size()
        && generations() == built_for;
}

}
