#include "engine/projection.h"
#include "engine/graph.h"
#include "engine/settings.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace laprox {

static const int64_t scratch_bytes = 16ll << 20;

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
    const std::vector<float> values = graph.read({ columns }).front();

    double difference = 0.0;
    double size       = 0.0;
    for (size_t i = 0; i < values.size(); i++) {
        const double expected = transposed[probes[i/n_out]*n_out + i % n_out];
        difference += (values[i] - expected)*(values[i] - expected);
        size       += expected*expected;
    }
    return difference <= 1e-4*size;
}

// [n_in, n_out] from the backend that multiplies with it, a few rows at a time.
static std::vector<float> rows_by_product(workbench & bench, const ggml_tensor * wo) {
    const int64_t n_in  = wo->ne[0];
    const int64_t step  = std::max<int64_t>(1, scratch_bytes/(n_in*(int64_t) sizeof(float)));
    std::vector<float> result;
    for (int64_t first = 0; first < n_in; first += step) {
        std::vector<int64_t> ones(std::min(step, n_in - first));
        std::iota(ones.begin(), ones.end(), first);
        const std::vector<float> one_hot = one_hot_vectors(n_in, ones);
        graph_runner graph(bench);
        ggml_tensor * columns = select_columns(graph, wo, one_hot);
        graph.output(columns);
        graph.run();
        const std::vector<float> rows = graph.read({ columns }).front();
        result.insert(result.end(), rows.begin(), rows.end());
    }
    return result;
}

const std::vector<float> & output_rows(workbench & bench, uint32_t il) {
    if (bench.projection_layer != (int32_t) il) {
        const llama_model & model = bench.lctx.get_model();
        const ggml_tensor * wo = model.layers[il].wo;
        std::lock_guard<std::mutex> lock(model.laprox->mutex);
        std::vector<float> rows = model.laprox->weights.transposed(wo);
        if (rows.empty() || !agrees(bench, wo, rows)) {
            rows = rows_by_product(bench, wo);
        }
        bench.projection = std::move(rows);
        bench.projection_layer = (int32_t) il;
    }
    return bench.projection;
}

static std::vector<float> compute_grams(workbench & bench, const std::vector<float> & rows, int64_t n_head, int64_t d) {
    std::vector<float> grams;
    const int64_t n_embd = (int64_t) rows.size()/(n_head*d);
    const int64_t step   = std::clamp<int64_t>(scratch_bytes/(d*n_embd*(int64_t) sizeof(float)), 1, n_head);
    for (int64_t first = 0; first < n_head; first += step) {
        const int64_t n = std::min(step, n_head - first);
        graph_runner graph(bench);
        ggml_tensor * part = graph.input(GGML_TYPE_F32, n_embd, d*n, rows.data() + first*d*n_embd);
        std::vector<ggml_tensor *> results;
        for (int64_t h = 0; h < n; h++) {
            ggml_tensor * head = ggml_view_2d(graph.ctx, part, n_embd, d, part->nb[1], h*d*part->nb[1]);
            results.push_back(ggml_mul_mat(graph.ctx, head, head));
            ggml_prec_set_acc(results.back(), GGML_PREC_F32);
            graph.output(results.back());
        }
        graph.run();
        for (const std::vector<float> & gram : graph.read(results)) {
            grams.insert(grams.end(), gram.begin(), gram.end());
        }
    }
    return grams;
}

const std::vector<float> & output_grams(workbench & bench, uint32_t il) {
    const llama_model & model = bench.lctx.get_model();
    model_state & state = *model.laprox;
    {
        std::lock_guard<std::mutex> lock(state.mutex);
        const auto it = state.grams.find(il);
        if (it != state.grams.end()) {
            return it->second;
        }
    }
    auto grams = compute_grams(bench, output_rows(bench, il), model.hparams.n_head(il), model.hparams.n_embd_head_v(il));
    std::lock_guard<std::mutex> lock(state.mutex);
    return state.grams.emplace(il, std::move(grams)).first->second; // another context's, if it was faster
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

std::vector<float> hadamard_matrix(int64_t block) {
    std::vector<float> matrix(block*block, 0.0f);
    for (int64_t i = 0; i < block; i++) {
        matrix[i*block + i] = 1.0f;
        hadamard_rotate(matrix.data() + i*block, block, block);
    }
    return matrix;
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
