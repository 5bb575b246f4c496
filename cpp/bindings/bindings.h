// The parts of laprox._core. llama_cpp is ctypes, so models and contexts arrive as the integers of their addresses.

#pragma once

#include "laprox.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace laprox_python {

namespace py = pybind11;

// laprox.LaproxError in Python.
struct refusal : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The engine refused; it knows why.
inline void require(bool accepted) {
    if (!accepted) {
        throw refusal(laprox_last_error());
    }
}

// The C API would not see what follows a NUL.
inline const char * whole(const std::string & name, const std::string & text) {
    if (text.find('\0') != std::string::npos) {
        throw py::value_error(name + " has a NUL character in it");
    }
    return text.c_str();
}

// Texts by their keys, as the C API takes them: pointers into the map.
struct c_texts {
    std::vector<const char *> keys, values;

    explicit c_texts(const std::map<std::string, std::string> & texts) {
        for (const auto & [key, text] : texts) {
            keys.push_back(whole("the key of a text", key));
            values.push_back(whole("the text " + key, text));
        }
    }
};

inline llama_model * model_at(uintptr_t address) {
    if (!address) {
        throw refusal("the model is closed");
    }
    return reinterpret_cast<llama_model *>(address);
}

inline llama_context * context_at(uintptr_t address) {
    if (!address) {
        throw refusal("the context is closed");
    }
    return reinterpret_cast<llama_context *>(address);
}

void register_settings(py::module_ & m); // policies, budgets, and the parameters of models and contexts
void register_context (py::module_ & m); // compression and statistics
void register_inspect (py::module_ & m); // positions, scores, entries and queries as arrays
void register_document(py::module_ & m); // what a sequence holds, in a file
void register_core    (py::module_ & m); // the selection functions of cpp/core on arrays
void register_build   (py::module_ & m); // what was built in

}
