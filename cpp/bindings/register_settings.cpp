#include "bindings.h"

#include <memory>
#include <string>
#include <vector>

namespace laprox_python {

namespace {

struct params {
    std::unique_ptr<laprox_params, decltype(&laprox_params_free)> c;

    explicit params(laprox_params * owned) : c(owned, laprox_params_free) {}
};

// A setting that is wrong is an argument that is wrong, before there is a model.
void require_value(bool accepted) {
    if (!accepted) {
        throw py::value_error(laprox_last_error());
    }
}

// The C API's lists: a count, and a name for each index.
std::vector<std::string> listed(int32_t n, const char * (*at)(int32_t)) {
    std::vector<std::string> names;
    for (int32_t i = 0; i < n; i++) {
        names.push_back(at(i));
    }
    return names;
}

}

void register_settings(py::module_ & m) {
    m.def("api_version", &laprox_api_version);
    m.def("last_error", &laprox_last_error);

    m.def("policies",   [] { return listed(laprox_policy_count(),    laprox_policy_name);    });
    m.def("meanings",   [] { return listed(laprox_policy_count(),    laprox_policy_meaning); });
    m.def("policy_probes", [](const std::string & policy) { return laprox_policy_probes(policy.c_str()); }, py::arg("policy"));
    m.def("scorers",    [] { return listed(laprox_scorer_count(),    laprox_scorer_name);    });
    m.def("allocators", [] { return listed(laprox_allocator_count(), laprox_allocator_name); });

    py::class_<laprox_option>(m, "Option")
        .def_readonly("name", &laprox_option::name)
        .def_readonly("kind", &laprox_option::kind)
        .def_readonly("initial", &laprox_option::initial)
        .def_readonly("accepted", &laprox_option::accepted)
        .def_readonly("value", &laprox_option::value)
        .def_readonly("help", &laprox_option::help);

    m.def("options", [] {
        std::vector<laprox_option> rows;
        for (int32_t i = 0; i < laprox_option_count(); i++) {
            rows.push_back(laprox_option_at(i));
        }
        return rows;
    });

    py::class_<params>(m, "Params")
        .def(py::init([](const std::string & before_names) { return params(laprox_params_new(before_names.c_str())); }),
             py::arg("before_names") = "")
        .def("set", [](params & p, const std::string & name, const std::string & text) {
            require_value(laprox_params_set(p.c.get(), whole(name, name), whole(name, text)));
        }, py::arg("name"), py::arg("text"))
        .def("set_custom", [](params & p, const std::string & allocator) {
            require_value(laprox_params_set_custom(p.c.get(), whole("allocator", allocator)));
        }, py::arg("allocator"))
        .def("get", [](const params & p, const std::string & name) {
            const char * text = laprox_params_get(p.c.get(), name.c_str());
            require_value(text);
            return std::string(text);
        }, py::arg("name"))
        .def("check", [](const params & p) { require_value(laprox_params_check(p.c.get())); });

    m.def("model_check", [](uintptr_t model) { require(laprox_model_check(model_at(model))); }, py::arg("model"));

    m.def("model_set_params", [](uintptr_t model, const params * p) {
        require(laprox_model_set_params(model_at(model), p ? p->c.get() : nullptr));
    }, py::arg("model"), py::arg("params").none(true));

    m.def("set_params", [](uintptr_t ctx, const params & p) {
        require(laprox_set_params(context_at(ctx), p.c.get()));
    }, py::arg("ctx"), py::arg("params"));

    m.def("get_params", [](uintptr_t ctx) {
        params p(laprox_get_params(context_at(ctx)));
        require(p.c != nullptr);
        return p;
    }, py::arg("ctx"));
}

}
