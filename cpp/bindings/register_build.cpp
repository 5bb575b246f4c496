#include "bindings.h"

#include "ggml-backend.h"
#include "ggml.h"
#include "llama.h"

#include <string>
#include <utility>
#include <vector>

namespace laprox_python {

void register_build(py::module_ & m) {
    m.def("llama_version", []() { return std::string(llama_version()); });
    m.def("ggml_version",  []() { return std::string(ggml_version()); });

    // Without a folder ggml would look beside the program, which is Python, and in the current folder. It tells of every module that
    // it loads, and an import prints nothing.
    m.def("load_backends", [](const std::string & folder) {
        if (ggml_backend_reg_count() == 0) {
            ggml_log_callback log  = nullptr;
            void *            data = nullptr;
            ggml_log_get(&log, &data);
            ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
            ggml_backend_load_all_from_path(folder.c_str());
            ggml_log_set(log, data);
        }
        return ggml_backend_reg_count();
    }, py::arg("folder"));

    m.def("backends", []() {
        std::vector<std::pair<std::string, std::vector<std::string>>> result;
        for (size_t i = 0; i < ggml_backend_reg_count(); i++) {
            ggml_backend_reg_t reg = ggml_backend_reg_get(i);
            std::vector<std::string> devices;
            for (size_t j = 0; j < ggml_backend_reg_dev_count(reg); j++) {
                devices.push_back(ggml_backend_dev_description(ggml_backend_reg_dev_get(reg, j)));
            }
            result.emplace_back(ggml_backend_reg_name(reg), devices);
        }
        return result;
    });
}

}
