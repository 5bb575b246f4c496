#include "bindings.h"

#include <array>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace laprox_python {

namespace {

constexpr std::array<std::pair<laprox_prefill, const char *>, 2> prefill_names = {{
    { LAPROX_PREFILL_DENSE,   "dense"   },
    { LAPROX_PREFILL_CHUNKED, "chunked" },
}};

constexpr std::array<std::pair<laprox_budget_unit, const char *>, 3> unit_names = {{
    { LAPROX_BUDGET_FRACTION, "fraction" },
    { LAPROX_BUDGET_TOKENS,   "tokens"   },
    { LAPROX_BUDGET_BYTES,    "bytes"    },
}};

template <typename E, size_t N>
std::string name_of(const std::array<std::pair<E, const char *>, N> & names, E value) {
    for (const auto & [v, name] : names) {
        if (v == value) {
            return name;
        }
    }
    return std::to_string(static_cast<int>(value)); // a newer libllama
}

template <typename E, size_t N>
E value_of(const std::array<std::pair<E, const char *>, N> & names, const std::string & text, const char * what) {
    std::string accepted;
    for (const auto & [v, name] : names) {
        if (text == name) {
            return v;
        }
        accepted += accepted.empty() ? name : std::string(", ") + name;
    }
    throw py::value_error(std::string(what) + " is '" + text + "'; accepted: " + accepted);
}

// laprox_params, owning the strings that they point to.
struct params {
    std::string policy;
    std::optional<std::string> profile;
    std::optional<std::string> gates;
    laprox_params values;

    laprox_params c() const {
        laprox_params result = values;
        result.policy  = policy.c_str();
        result.profile = profile ? profile->c_str() : nullptr;
        result.gates   = gates   ? gates->c_str()   : nullptr;
        return result;
    }
};

params params_from_c(const laprox_params & c) {
    const auto optional = [](const char * text) { return text ? std::optional<std::string>(text) : std::nullopt; };
    return { c.policy, optional(c.profile), optional(c.gates), c };
}

// The C API's lists: a count, and a name for each index.
std::vector<std::string> listed(int32_t n, const char * (*at)(int32_t)) {
    std::vector<std::string> names;
    for (int32_t i = 0; i < n; i++) {
        names.push_back(at(i));
    }
    return names;
}

laprox_budget parse_budget(const std::string & text) {
    if (text.find('\0') != std::string::npos) { // the C API would not see what follows
        throw refusal("budget has a NUL character in it");
    }
    laprox_budget budget;
    require(laprox_parse_budget(text.c_str(), &budget));
    return budget;
}

py::tuple as_tuple(const laprox_budget & budget) {
    return py::make_tuple(name_of(unit_names, budget.unit), budget.value);
}

}

void register_settings(py::module_ & m) {
    m.def("api_version", &laprox_api_version);
    m.def("last_error", &laprox_last_error);

    m.def("policies",   [] { return listed(laprox_policy_count(),    laprox_policy_name);    });
    m.def("meanings",   [] { return listed(laprox_policy_count(),    laprox_policy_meaning); });
    m.def("scorers",    [] { return listed(laprox_scorer_count(),    laprox_scorer_name);    });
    m.def("allocators", [] { return listed(laprox_allocator_count(), laprox_allocator_name); });

    m.attr("DEFAULT_BUDGET") = LAPROX_DEFAULT_BUDGET;
    m.attr("PREFILLS") = py::make_tuple(prefill_names[0].second, prefill_names[1].second);

    m.def("parse_budget", [](const std::string & text) { return as_tuple(parse_budget(text)); }, py::arg("text"));

    py::class_<params>(m, "Params")
        .def(py::init([](std::string policy, const std::string & budget, int32_t window, int32_t sink, int32_t recent,
                         int32_t min_tokens, const std::string & prefill, std::optional<std::string> profile,
                         std::optional<std::string> gates, float floor) {
                 return params{ std::move(policy), std::move(profile), std::move(gates),
                                { nullptr, parse_budget(budget), window, sink, recent, min_tokens,
                                  value_of(prefill_names, prefill, "prefill"), nullptr, nullptr, floor } };
             }),
             py::kw_only(), py::arg("policy"), py::arg("budget"), py::arg("window"), py::arg("sink"), py::arg("recent"),
             py::arg("min_tokens"), py::arg("prefill"), py::arg("profile") = py::none(),
             py::arg("gates") = py::none(), py::arg("floor") = 0.0f)
        .def_readonly("policy", &params::policy)
        .def_property_readonly("budget", [](const params & p) { return as_tuple(p.values.budget); })
        .def_property_readonly("window", [](const params & p) { return p.values.window; })
        .def_property_readonly("sink", [](const params & p) { return p.values.sink; })
        .def_property_readonly("recent", [](const params & p) { return p.values.recent; })
        .def_property_readonly("min_tokens", [](const params & p) { return p.values.min_tokens; })
        .def_property_readonly("prefill", [](const params & p) { return name_of(prefill_names, p.values.prefill); })
        .def_readonly("profile", &params::profile)
        .def_readonly("gates", &params::gates)
        .def_property_readonly("floor", [](const params & p) { return p.values.floor; });

    m.def("default_params", [] { return params_from_c(laprox_default_params()); });

    m.def("model_check", [](uintptr_t model) { require(laprox_model_check(model_at(model))); }, py::arg("model"));

    m.def("model_set_params", [](uintptr_t model, const params * p) {
        laprox_params c;
        if (p) {
            c = p->c();
        }
        require(laprox_model_set_params(model_at(model), p ? &c : nullptr));
    }, py::arg("model"), py::arg("params").none(true));

    m.def("set_params", [](uintptr_t ctx, const params & p) {
        const laprox_params c = p.c();
        require(laprox_set_params(context_at(ctx), &c));
    }, py::arg("ctx"), py::arg("params"));

    m.def("get_params", [](uintptr_t ctx) {
        laprox_params c;
        require(laprox_get_params(context_at(ctx), &c));
        return params_from_c(c);
    }, py::arg("ctx"));
}

}
