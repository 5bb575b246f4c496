#include "engine/gram.h"
#include "engine/graph.h"
#include "engine/settings.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace laprox {

// Columns of W_O by multiplying it with one-hot vectors: what every backend can do.
static ggml_tensor * select_columns(graph_runner & graph, const ggml_tensor * wo, const std::vector<float> & one_hot) {
    ggml_tensor * select  = graph.input(GGML_TYPE_F32, wo->ne[0], one_hot.size()/wo->ne[0], one_hot.data());
    ggml_tensor * columns = ggml_mul_mat(graph.ctx, const_cast<ggml_tensor *>(wo), select);
    ggml_prec_set_acc(columns, GGML_PREC_F32);
    return columns;
}

static std::vector<float> one_hot_vectors(int64_t n, const std::vector<int64_t> & ones) {
    std::vector<float> result(n*ones.size());
    for (size_t i = 0; i < ones.size(); i++) {
        result[i*n + ones[i]] = 1.0f;
    }
    return result;
}

// Whether a few columns are those that the backend multiplies with, up to the rounding of its operands.
static bool agrees(workbench & bench, const ggml_tensor * wo, const std::vector<float> & transposed) {
    const int64_t n_in  = wo->ne[0];
    const int64_t n_out = wo->ne[1];
    const std::vector<int64_t> probes = { 0, n_in/3, n_in/2, n_in - 1 };
    const std::vector<float> one_hot = one_hot_vectors(n_in, probes);

    graph_runner graph(bench);
    ggml_tensor * columns = select_columns(graph, wo, one_hot);
    graph.output(columns);
    graph.run();
    std::vector<float> values(n_out*probes.size());
    ggml_backend_tensor_get(columns, values.data(), 0, ggml_nbytes(columns));

    double difference = 0.0;
    double size       = 0.0;
    for (size_t i = 0; i < values.size(); i++) {
        const double expected = transposed[probes[i/n_out]*n_out + i % n_out];
        difference += (values[i] - expected)*(values[i] - expected);
        size       += expected*expected;
    }
    return difference <= 1e-4*size;
}

static std::vector<float> compute_grams(workbench & bench, weight_reader & reader, const ggml_tensor * wo, int64_t n_head, int64_t d) {
    std::vector<float> grams(n_head*d*d);
    std::vector<float> weights = reader.transposed(wo);
    if (!weights.empty() && !agrees(bench, wo, weights)) {
        weights.clear();
    }

    // a few heads per graph, to bound its scratch memory
    const int64_t n_part = std::max<int64_t>(1, std::min<int64_t>(n_head, (int64_t) (16 << 20)/(4*d*wo->ne[0])));
    for (int64_t first = 0; first < n_head; first += n_part) {
        const int64_t n = std::min(n_part, n_head - first);
        graph_runner graph(bench);

        ggml_tensor * columns; // [n_embd, d*n]: the rows of W_h for n heads
        std::vector<float> one_hot;
        if (!weights.empty()) {
            columns = graph.input(GGML_TYPE_F32, wo->ne[1], d*n, weights.data() + first*d*wo->ne[1]);
        } else {
            std::vector<int64_t> rows(d*n);
            std::iota(rows.begin(), rows.end(), first*d);
            one_hot = one_hot_vectors(wo->ne[0], rows);
            columns = select_columns(graph, wo, one_hot);
        }
        std::vector<ggml_tensor *> results;
        for (int64_t h = 0; h < n; h++) {
            ggml_tensor * head = ggml_view_2d(graph.ctx, columns, columns->ne[0], d, columns->nb[1], h*d*columns->nb[1]);
            results.push_back(ggml_mul_mat(graph.ctx, head, head));
            ggml_prec_set_acc(results.back(), GGML_PREC_F32);
            graph.output(results.back());
        }
        graph.run();
        for (int64_t h = 0; h < n; h++) {
            ggml_backend_tensor_get(results[h], grams.data() + (first + h)*d*d, 0, d*d*sizeof(float));
        }
    }
    return grams;
}

const std::vector<float> & output_grams(workbench & bench, uint32_t il) {
    const llama_model & model = bench.lctx.get_model();
    model_state & state = *model.laprox;
    std::lock_guard<std::mutex> lock(state.mutex);
    auto it = state.grams.find(il);
    if (it == state.grams.end()) {
        it = state.grams.emplace(il, compute_grams(bench, state.weights, model.layers[il].wo, model.hparams.n_head(il), model.hparams.n_embd_head_v(il))).first;
    }
    return it->second;
}

void hadamard_rotate(float * row, int64_t n, int64_t block) {
    const float scale = 1.0f/std::sqrt((float) block);
    for (int64_t begin = 0; begin < n; begin += block) {
        float * x = row + begin;
        for (int64_t half = 1; half < block; half *= 2) {
            for (int64_t i = 0; i < block; i += 2*half) {
                for (int64_t j = i; j < i + half; j++) {
                    const float a = x[j];
                    const float b = x[j + half];
                    x[j]        = a + b;
                    x[j + half] = a - b;
                }
            }
        }
        for (int64_t j = 0; j < block; j++) {
            x[j] *= scale;
        }
    }
}

int64_t rotation_block_v(int64_t) {
    return 64;
}

int64_t rotation_block_k(int64_t d_k) {
    return d_k & -d_k;
}

std::vector<float> rotated_gram(const float * gram, int64_t d_v) {
    std::vector<float> result(gram, gram + d_v*d_v);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = 0; i < d_v; i++) {
            hadamard_rotate(result.data() + i*d_v, d_v, rotation_block_v(d_v));
        }
        for (int64_t i = 0; i < d_v; i++) {
            for (int64_t j = i + 1; j < d_v; j++) {
                std::swap(result[i*d_v + j], result[j*d_v + i]);
            }
        }
    }
    return result;
}

}
