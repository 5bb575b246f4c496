#include "engine/graph_input.h"
#include "engine/projection.h"

#include <algorithm>

namespace laprox {

graph_input::graph_input(cache & kv, const llm_graph_context & g) :
        sequences(kv.sequences_of(g.ubatch)),
        n_tokens(g.n_tokens/(int64_t) sequences.size()),
        n_observed(std::min<int64_t>(n_tokens, sequences.front()->window.n_slots)),
        kv(kv) {
    slots = ggml_new_tensor_2d(g.ctx0, GGML_TYPE_I64, n_observed, sequences.size());
    ggml_set_input(slots);
    ggml_set_name(slots, "laprox_window_slots");
    if (sequences.front()->sums) {
        back   = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_I32, g.n_tokens);
        weight = ggml_new_tensor_1d(g.ctx0, GGML_TYPE_F32, g.n_tokens);
        ggml_set_input(back);
        ggml_set_input(weight);
    }
    built_for = generations();
}

ggml_tensor * graph_input::key_rotation(ggml_context * ctx, int64_t d_k) {
    if (!kv.shared().rotated_k) {
        return nullptr;
    }
    ggml_tensor *& rotation = rotations[rotation_block_k(d_k)];
    if (!rotation) {
        rotation = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, rotation_block_k(d_k), rotation_block_k(d_k));
        ggml_set_input(rotation);
    }
    return rotation;
}

ggml_tensor * graph_input::tail_mask(ggml_context * ctx, size_t s, ggml_backend_buffer_type_t buft, ggml_tensor * tail, int64_t n_heads) {
    ggml_tensor *& one = single[s];
    if (!one || one->ne[0] != tail->ne[0]) {
        one = ggml_is_contiguous(tail) && is_aligned(tail) ? tail : ggml_cont(ctx, tail);
    }
    if (n_heads == 1) {
        return one;
    }
    ggml_tensor *& all = repeated[{ s, buft }];
    if (!all || all->ne[0] != tail->ne[0]) {
        int64_t n_most = 1;
        for (size_t ikv = 0; ikv < kv.get_layers().size(); ikv++) {
            for (const store_class & cls : sequences[s]->store(ikv).classes) {
                n_most = std::max(n_most, kv.get_layers()[ikv].buft == buft && cls.kept_mask ? cls.kept_mask->ne[3] : 1);
            }
        }
        all = ggml_repeat_4d(ctx, one, one->ne[0], one->ne[1], 1, n_most);
    }
    return ggml_view_4d(ctx, all, all->ne[0], all->ne[1], 1, n_heads, all->nb[1], all->nb[2], all->nb[3], 0);
}

graph_input & graph_input::of(const llm_graph_context & g, cache & kv) {
    for (auto & input : g.res->inputs) {
        auto * window = dynamic_cast<graph_input *>(input.get());
        if (window && &window->kv == &kv) {
            return *window;
        }
    }
    return *static_cast<graph_input *>(g.res->add_input(llm_graph_input_ptr(new graph_input(kv, g))));
}

std::vector<uint64_t> graph_input::generations() const {
    std::vector<uint64_t> result;
    for (const sequence * seq : sequences) {
        result.push_back(seq->generation());
    }
    return result;
}

// The books were moved when the ubatch was applied; here they are only read.
void graph_input::set_input(const llama_ubatch * ubatch) {
    for (sequence * seq : sequences) {
        seq->begin_compute();
    }
    if (!slots->buffer) {
        return;
    }
    std::vector<int64_t> data;
    for (const sequence * seq : sequences) {
        data.insert(data.end(), seq->placed().begin(), seq->placed().end());
    }
    GGML_ASSERT((int64_t) data.size() == ggml_nelements(slots));
    ggml_backend_tensor_set(slots, data.data(), 0, ggml_nbytes(slots));
    if (!back || !back->buffer) {
        return;
    }
    std::vector<int32_t> positions;
    std::vector<float>   weights;
    for (size_t s = 0; s < sequences.size(); s++) {
        for (int64_t i = 0; i < n_tokens; i++) {
            const llama_pos pos = ubatch->pos[s*n_tokens + i];
            positions.push_back(-pos);
            weights.push_back(sequences[s]->is_sink(pos) ? 0.0f : 1.0f);
        }
    }
    ggml_backend_tensor_set(back,   positions.data(), 0, ggml_nbytes(back));
    ggml_backend_tensor_set(weight, weights.data(),   0, ggml_nbytes(weight));
    for (auto & [block, rotation] : rotations) {
        const std::vector<float> matrix = hadamard_matrix(block);
        ggml_backend_tensor_set(rotation, matrix.data(), 0, ggml_nbytes(rotation));
    }
}

bool graph_input::can_reuse(const llm_graph_params & params) {
    return kv.sequences_of(params.ubatch) == sequences
        && params.ubatch.n_tokens == n_tokens*sequences.size()
        && generations() == built_for;
}

}
