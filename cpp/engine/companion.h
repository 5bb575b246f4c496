// Files that go with one model, a GGUF each: retention gates, a profile. What all of them are checked for is here;
// docs/retention-gates.md and docs/terminal.md have their formats.

#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

struct llama_model;

namespace laprox {

// Architecture "laprox-KIND", keys "laprox.KIND.*": "gates", "profile".
class companion {
public:
    // The whole file, in memory. Throws std::runtime_error naming the file where it is absent, truncated, damaged, of another
    // kind or version, or made for another model.
    companion(const llama_model & model, const std::string & path, const std::string & kind);

    // Throws std::runtime_error naming the file.
    [[noreturn]] void refuse(const std::string & why) const;

    std::string text  (const std::string & name) const; // empty if there is none
    uint32_t    number(const std::string & name) const; // refused if there is none

    // The first of these tensors that there is. Refused if there is none, or it has another shape (GGUF's order) or type, or a value
    // that isn't a number.
    const ggml_tensor * tensor(const std::vector<std::string> & names, const std::vector<int64_t> & ne, const std::vector<ggml_type> & types) const;

private:
    std::string text_at(const std::string & key) const;

    const std::string path, kind;
    gguf_context_ptr gguf;
    ggml_context_ptr ctx;
};

// Of a tensor in host memory.
std::vector<double> values_of(const ggml_tensor * t);

// Write one that has a single tensor. Throws std::runtime_error if it can't be written.
void write_companion(const llama_model & model, const std::string & path, const std::string & kind,
                     const std::map<std::string, std::string> & texts, const ggml_tensor * tensor);

}
