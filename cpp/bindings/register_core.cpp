#include "bindings.h"

#include "core/allocate.h"
#include "core/classes.h"
#include "core/inserted.h"
#include "core/options.h"
#include "core/profile.h"
#include "core/scores.h"

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <utility>
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
                                                const std::vector<array<float>> & score,
                                                const std::optional<std::vector<array<float>>> & second,
                                                const std::optional<array<int64_t>> & n_protected) {
    const size_t n = pos.size();
    if (size_t(layer.size()) != n || size_t(head.size()) != n || score.size() != n ||
            (second && second->size() != n) || (n_protected && size_t(n_protected->size()) != n)) {
        throw py::value_error("layer, head, pos, score, second and n_protected must have one element per (layer, KV head)");
    }
    std::vector<laprox::head_candidates> heads;
    for (size_t i = 0; i < n; i++) {
        laprox::head_candidates h { layer.data()[i], head.data()[i], to_vector(pos[i]), to_vector(score[i]), {} };
        if (second) {
            h.second = to_vector((*second)[i]);
        }
        if (n_protected) {
            h.n_protected = n_protected->data()[i];
        }
        if (h.pos.size() != h.score.size() || (second && h.second.size() != h.score.size())) {
            throw py::value_error("pos, score and second of a head must have the same length");
        }
        const auto of_this_layer = [&](const laprox::head_candidates & other) { return other.layer == h.layer; };
        if (!heads.empty() && !of_this_layer(heads.back()) && std::any_of(heads.begin(), heads.end(), of_this_layer)) {
            throw py::value_error("heads of a layer must be neighbours; those of layer " + std::to_string(h.layer) + " are not");
        }
        heads.push_back(std::move(h));
    }
    return heads;
}

laprox::budget_profile to_profile(const array<double> & a) {
    if (a.ndim() != 3 || a.shape(0) != laprox::profile_rows) {
        throw py::value_error("expected a profile of shape (" + std::to_string(laprox::profile_rows) + ", layers, KV heads)");
    }
    return { int32_t(a.shape(1)), int32_t(a.shape(2)), { a.data(), a.data() + a.size() } };
}

array<double> to_matrix(const std::vector<double> & values, size_t n_rows) {
    const size_t n_columns = values.size()/n_rows;
    return array<double>({ n_rows, n_columns }, values.data());
}

std::vector<array<uint32_t>> allocate(const std::string & allocator, const array<int32_t> & layer,
                                      const array<int32_t> & head, const std::vector<array<int32_t>> & pos,
                                      const std::vector<array<float>> & score, int64_t n_keep,
                                      const std::optional<std::vector<array<float>>> & second,
                                      const std::optional<array<int64_t>> & n_protected,
                                      const std::optional<array<double>> & layer_preference,
                                      const std::optional<array<double>> & profile, int64_t n_seen, double floor) {
    laprox::allocation a;
    a.heads  = candidates(layer, head, pos, score, second, n_protected);
    a.n_seen = n_seen;
    a.floor  = floor;
    if (layer_preference) {
        a.layer_preference = to_vector(*layer_preference);
    }
    laprox::budget_profile table;
    if (profile) {
        table = to_profile(*profile);
        a.profile = &table;
    }
    return to_arrays(laprox::select(a.heads, laprox::find_allocator(allocator).count(a, n_keep)));
}

array<double> solve_profile(const std::vector<array<float>> & scores, const std::vector<array<float>> & utility,
                            int64_t n_tokens, int64_t min_keep) {
    if (scores.size() != utility.size()) {
        throw py::value_error("scores and utility must have one element per (layer, KV head)");
    }
    std::vector<laprox::head_utility> heads;
    for (size_t i = 0; i < scores.size(); i++) {
        heads.push_back({ to_vector(scores[i]), to_vector(utility[i]) });
    }
    std::vector<double> evicted;
    {
        py::gil_scoped_release release; // seconds for a long document
        evicted = laprox::solve_profile(heads, n_tokens, min_keep);
    }
    return to_matrix(evicted, laprox::profile_rows);
}

laprox::budget budget_of(const std::string & text) {
    laprox::option_texts texts;
    texts.set(laprox::find_option("budget"), text); // says what is wrong
    return texts.values().budget;
}

void profile_save(uintptr_t model, const std::string & path, const array<double> & table, const std::map<std::string, std::string> & texts) {
    const laprox::budget_profile profile = to_profile(table);
    const c_texts told(texts);
    require(laprox_profile_save(model_at(model), whole("the path", path), profile.evicted.data(), profile.n_layer, profile.n_head_kv,
            told.keys.data(), told.values.data(), (int32_t) texts.size()));
}

}

void register_core(py::module_ & m) {
    m.def("budget_entries", [](const std::string & budget, int64_t n_seen, int64_t n_pairs) {
        return laprox::budget_entries(budget_of(budget), n_seen, n_pairs);
    }, py::arg("budget"), py::arg("n_seen"), py::arg("n_pairs"));

    m.def("parse_budget", [](const std::string & text) {
        static const char * const units[] = { "fraction", "tokens", "bytes" };
        const laprox::budget budget = budget_of(text);
        return std::make_pair(units[(int) budget.unit], budget.value);
    }, py::arg("text"));

    m.def("find_inserted", [](const std::string & text, const std::string & without) {
        return laprox::find_inserted(text, without);
    }, py::arg("text"), py::arg("without"));

    m.def("normalise_layer", [](const std::vector<array<float>> & heads) {
        std::vector<std::vector<float>> scores;
        for (const auto & head : heads) {
            scores.push_back(to_vector(head));
        }
        laprox::normalise_layer(scores);
        return to_arrays(scores);
    }, py::arg("heads"));

    m.def("allocate", &allocate, py::arg("allocator"), py::arg("layer"), py::arg("head"), py::arg("pos"),
          py::arg("score"), py::arg("n_keep"), py::kw_only(), py::arg("second") = py::none(),
          py::arg("n_protected") = py::none(), py::arg("layer_preference") = py::none(),
          py::arg("profile") = py::none(), py::arg("n_seen") = 0, py::arg("floor") = 0.0);

    m.def("isotonic_increasing", [](const array<double> & y) {
        return to_array(laprox::isotonic_increasing(to_vector(y)));
    }, py::arg("y"));

    m.def("solve_profile", &solve_profile, py::arg("scores"), py::arg("utility"), py::arg("n_tokens"),
          py::arg("min_keep"));

    m.def("profile_save", &profile_save, py::arg("model"), py::arg("path"), py::arg("table"), py::arg("texts"));

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
