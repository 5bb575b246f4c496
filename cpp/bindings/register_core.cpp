#include "bindings.h"

#include "core/allocate.h"
#include "core/budget.h"
#include "core/classes.h"
#include "core/scores.h"

#include <string>
#include <vector>

namespace laprox_python {

namespace {

// Dense arrays of the right type; anything else is converted on the way in.
template <typename T>
using array = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T>
std::vector<T> to_vector(const array<T> & a) {
    if (a.ndim() != 1) {
        throw py::value_error("expected a 1-d array, got " + std::to_string(a.ndim()) + "-d");
    }
    return std::vector<T>(a.data(), a.data() + a.size());
}

template <typename T>
array<T> to_array(const std::vector<T> & v) {
    return array<T>(static_cast<py::ssize_t>(v.size()), v.data());
}

template <typename T>
std::vector<array<T>> to_arrays(const std::vector<std::vector<T>> & vectors) {
    std::vector<array<T>> arrays;
    for (const auto & v : vectors) {
        arrays.push_back(to_array(v));
    }
    return arrays;
}

std::vector<laprox::head_candidates> candidates(const array<int32_t> & layer, const array<int32_t> & head,
                                                const std::vector<array<int32_t>> & pos,
                                                const std::vector<array<float>> & score) {
    const size_t n = pos.size();
    if (size_t(layer.size()) != n || size_t(head.size()) != n || score.size() != n) {
        throw py::value_error("layer, head, pos and score must have one element per (layer, KV head)");
    }
    std::vector<laprox::head_candidates> heads;
    for (size_t i = 0; i < n; i++) {
        if (pos[i].size() != score[i].size()) {
            throw py::value_error("pos and score of a head must have the same length");
        }
        heads.push_back({ layer.data()[i], head.data()[i], to_vector(pos[i]), to_vector(score[i]) });
    }
    return heads;
}

}

void register_core(py::module_ & m) {
    m.def("budget_entries", [](const std::string & budget, int64_t n_seen, int64_t n_pairs) {
        return laprox::budget_entries(laprox::parse_budget(budget), n_seen, n_pairs);
    }, py::arg("budget"), py::arg("n_seen"), py::arg("n_pairs"));

    m.def("average_pool", [](const array<float> & score, int kernel) {
        if (kernel < 1 || kernel % 2 == 0) {
            throw py::value_error("kernel is " + std::to_string(kernel) + "; it must be odd and at least 1");
        }
        const std::vector<float> in = to_vector(score);
        return to_array(laprox::average_pool(in.data(), in.size(), kernel));
    }, py::arg("score"), py::arg("kernel"));

    m.def("normalise_layer", [](const std::vector<array<float>> & heads) {
        std::vector<std::vector<float>> scores;
        for (const auto & head : heads) {
            scores.push_back(to_vector(head));
        }
        laprox::normalise_layer(scores);
        return to_arrays(scores);
    }, py::arg("heads"));

    m.def("allocate_global", [](const array<int32_t> & layer, const array<int32_t> & head,
                                const std::vector<array<int32_t>> & pos, const std::vector<array<float>> & score,
                                int64_t n_keep) {
        return to_arrays(laprox::allocate_global(candidates(layer, head, pos, score), n_keep));
    }, py::arg("layer"), py::arg("head"), py::arg("pos"), py::arg("score"), py::arg("n_keep"));

    m.def("plan_classes", [](const array<uint32_t> & n_kept, uint32_t max_classes, uint32_t block, double slack) {
        if (max_classes < 1 || block < 1) {
            throw py::value_error("max_classes and block must be at least 1");
        }
        std::vector<std::pair<array<uint32_t>, uint32_t>> classes;
        for (const auto & c : laprox::plan_classes(to_vector(n_kept), max_classes, block, slack)) {
            classes.emplace_back(to_array(c.heads), c.n_rows);
        }
        return classes;
    }, py::arg("n_kept"), py::arg("max_classes"), py::arg("block"), py::arg("slack") = 0.05);
}

}
