#include "bindings.h"

#include <utility>
#include <vector>

namespace laprox_python {

namespace {

// The engine's way to return arrays: a first call with no room tells the size.
py::ssize_t counted(int64_t n) {
    require(n >= 0);
    return static_cast<py::ssize_t>(n);
}

struct head_shape {
    int32_t n_head;
    int32_t d_k;
    int32_t d_v;
};

head_shape shape_of(llama_context * ctx, int32_t il) {
    head_shape shape;
    require(laprox_head_shape(ctx, il, &shape.n_head, &shape.d_k, &shape.d_v));
    return shape;
}

// K rows or V rows alone: those of a long document are large.
py::array_t<float> rows_of(uintptr_t address, int32_t layer, int32_t head, llama_seq_id seq_id, bool keys) {
    llama_context * ctx = context_at(address);
    const head_shape  shape = shape_of(ctx, layer);
    const py::ssize_t n = counted(laprox_entries(ctx, seq_id, layer, head, nullptr, nullptr, 0));
    py::array_t<float> rows({ n, py::ssize_t(keys ? shape.d_k : shape.d_v) });
    float * out = rows.mutable_data();
    counted(laprox_entries(ctx, seq_id, layer, head, keys ? out : nullptr, keys ? nullptr : out, n));
    return rows;
}

}

void register_inspect(py::module_ & m) {
    m.def("model_fingerprint", [](uintptr_t model) {
        char text[17];
        require(laprox_model_fingerprint(model_at(model), text));
        return py::str(text);
    }, py::arg("model"));

    m.def("layers", [](uintptr_t address) {
        llama_context * ctx = context_at(address);
        const int32_t n = laprox_layers(ctx, nullptr, nullptr, 0);
        require(n >= 0);
        std::vector<int32_t> il(n), n_head_kv(n);
        laprox_layers(ctx, il.data(), n_head_kv.data(), n);
        std::vector<std::pair<int32_t, int32_t>> result;
        for (int32_t i = 0; i < n; i++) {
            result.emplace_back(il[i], n_head_kv[i]);
        }
        return result;
    }, py::arg("ctx"));

    m.def("head_shape", [](uintptr_t ctx, int32_t layer) {
        const head_shape shape = shape_of(context_at(ctx), layer);
        return py::make_tuple(shape.n_head, shape.d_k, shape.d_v);
    }, py::arg("ctx"), py::arg("layer"));

    m.def("kq_scale", [](uintptr_t ctx, int32_t layer) {
        const float scale = laprox_kq_scale(context_at(ctx), layer);
        require(scale != 0.0f);
        return scale;
    }, py::arg("ctx"), py::arg("layer"));

    m.def("positions", [](uintptr_t address, int32_t layer, int32_t head, llama_seq_id seq_id) {
        llama_context * ctx = context_at(address);
        py::array_t<llama_pos> pos(counted(laprox_positions(ctx, seq_id, layer, head, nullptr, 0)));
        counted(laprox_positions(ctx, seq_id, layer, head, pos.mutable_data(), pos.size()));
        return pos;
    }, py::arg("ctx"), py::arg("layer"), py::arg("head"), py::arg("seq_id") = 0);

    for (const auto & [name, read] : { std::make_pair("scores", laprox_scores), std::make_pair("finished_scores", laprox_finished_scores) }) {
        m.def(name, [read = read](uintptr_t address, int32_t layer, int32_t head, llama_seq_id seq_id) {
            llama_context * ctx = context_at(address);
            py::array_t<float> score(counted(read(ctx, seq_id, layer, head, nullptr, 0)));
            counted(read(ctx, seq_id, layer, head, score.mutable_data(), score.size()));
            return score;
        }, py::arg("ctx"), py::arg("layer"), py::arg("head"), py::arg("seq_id") = 0);
    }

    m.def("entries", [](uintptr_t address, int32_t layer, int32_t head, llama_seq_id seq_id) {
        llama_context * ctx = context_at(address);
        const head_shape shape = shape_of(ctx, layer);
        const py::ssize_t n = counted(laprox_entries(ctx, seq_id, layer, head, nullptr, nullptr, 0));
        py::array_t<float> k({ n, py::ssize_t(shape.d_k) });
        py::array_t<float> v({ n, py::ssize_t(shape.d_v) });
        counted(laprox_entries(ctx, seq_id, layer, head, k.mutable_data(), v.mutable_data(), n));
        return py::make_tuple(k, v);
    }, py::arg("ctx"), py::arg("layer"), py::arg("head"), py::arg("seq_id") = 0);

    m.def("keys", [](uintptr_t ctx, int32_t layer, int32_t head, llama_seq_id seq_id) {
        return rows_of(ctx, layer, head, seq_id, true);
    }, py::arg("ctx"), py::arg("layer"), py::arg("head"), py::arg("seq_id") = 0);

    m.def("values", [](uintptr_t ctx, int32_t layer, int32_t head, llama_seq_id seq_id) {
        return rows_of(ctx, layer, head, seq_id, false);
    }, py::arg("ctx"), py::arg("layer"), py::arg("head"), py::arg("seq_id") = 0);

    m.def("queries", [](uintptr_t address, int32_t layer, llama_seq_id seq_id) {
        llama_context * ctx = context_at(address);
        const head_shape shape = shape_of(ctx, layer);
        const py::ssize_t n = counted(laprox_queries(ctx, seq_id, layer, nullptr, nullptr, 0));
        py::array_t<float> q({ n, py::ssize_t(shape.n_head), py::ssize_t(shape.d_k) });
        py::array_t<llama_pos> pos(n);
        counted(laprox_queries(ctx, seq_id, layer, q.mutable_data(), pos.mutable_data(), n));
        return py::make_tuple(q, pos);
    }, py::arg("ctx"), py::arg("layer"), py::arg("seq_id") = 0);
}

}
