#include "engine/companion.h"
#include "engine/document_file.h"
#include "engine/settings.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <filesystem>
#include <stdexcept>

namespace laprox {

static const uint32_t version = 1;

static std::string key_of(const std::string & kind, const std::string & name) {
    return "laprox." + kind + "." + name;
}

// CRC-32 as in zlib.
static uint32_t crc32(uint32_t crc, const ggml_tensor * tensor) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> t {};
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++) {
                c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
            }
            t[i] = c;
        }
        return t;
    }();
    const uint8_t * data = (const uint8_t *) tensor->data;
    crc = ~crc;
    for (size_t i = 0; i < ggml_nbytes(tensor); i++) {
        crc = table[(crc ^ data[i]) & 0xff] ^ (crc >> 8);
    }
    return ~crc;
}

template <typename T, typename F> static std::string listed(const std::vector<T> & items, F f) {
    std::string text;
    for (const T & item : items) {
        text += (text.empty() ? "" : ", ") + std::string(f(item));
    }
    return text;
}

static std::string shape_text(const std::vector<int64_t> & ne) {
    return "[" + listed(ne, [](int64_t n) { return std::to_string(n); }) + "]";
}

// ggml takes memory for whatever sizes a file promises, and ends the process where there is none.
static bool has_its_tensors(const gguf_context * gguf, uint64_t size) {
    const int64_t  last  = gguf_get_n_tensors(gguf) - 1;
    const uint64_t begin = gguf_get_data_offset(gguf);
    return last < 0 || (begin <= size && gguf_get_tensor_offset(gguf, last) + gguf_get_tensor_size(gguf, last) <= size - begin);
}

companion::companion(const llama_model & model, const std::string & path, const std::string & kind) : path(path), kind(kind) {
    std::error_code absent;
    const uint64_t size = std::filesystem::file_size(std::filesystem::u8path(path), absent);
    if (!absent) {
        gguf.reset(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ nullptr }));
    }
    if (!gguf) {
        refuse("is absent, truncated or not a GGUF file");
    }
    const std::string architecture = text_at("general.architecture");
    if (architecture != "laprox-" + kind) {
        refuse("has architecture \"" + architecture + "\"; accepted: \"laprox-" + kind + "\"");
    }
    if (number("version") != version) {
        refuse("has format version " + std::to_string(number("version")) + "; accepted: " + std::to_string(version));
    }
    if (has_its_tensors(gguf.get(), size)) {
        ggml_context * data = nullptr;
        gguf.reset(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ false, /*.ctx =*/ &data }));
        ctx.reset(data);
    }
    if (!ctx) {
        refuse("is truncated");
    }
    uint32_t crc = 0;
    for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); i++) {
        crc = crc32(crc, ggml_get_tensor(ctx.get(), gguf_get_tensor_name(gguf.get(), i)));
    }
    if (crc != number("crc32")) {
        refuse("is damaged: the CRC-32 of its tensors' data is not " + key_of(kind, "crc32"));
    }
    const std::string made_for = text("model_fingerprint");
    if (!made_for.empty() && made_for != fingerprint(model)) {
        refuse("was made for " + text("model") + " (" + made_for + "), this model is another one (" + fingerprint(model) + ")");
    }
}

void companion::refuse(const std::string & why) const {
    throw std::runtime_error(kind + " " + path + " " + why);
}

std::string companion::text(const std::string & name) const {
    return text_at(key_of(kind, name));
}

std::string companion::text_at(const std::string & key) const {
    const int64_t id = gguf_find_key(gguf.get(), key.c_str());
    const std::string text = id >= 0 && gguf_get_kv_type(gguf.get(), id) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf.get(), id) : "";
    if (!is_utf8(text)) { // it would be in messages
        refuse("is damaged: its " + key + " is not UTF-8");
    }
    return text;
}

uint32_t companion::number(const std::string & name) const {
    const int64_t id = gguf_find_key(gguf.get(), key_of(kind, name).c_str());
    if (id < 0 || gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_UINT32) {
        refuse("has no " + key_of(kind, name));
    }
    return gguf_get_val_u32(gguf.get(), id);
}

const ggml_tensor * companion::tensor(const std::vector<std::string> & names, const std::vector<int64_t> & ne,
                                      const std::vector<ggml_type> & types) const {
    for (const std::string & name : names) {
        const ggml_tensor * t = ggml_get_tensor(ctx.get(), name.c_str());
        if (!t) {
            continue;
        }
        std::vector<int64_t> has(t->ne, t->ne + ggml_n_dims(t));
        has.resize(std::max(has.size(), ne.size()), 1);
        if (has != ne) {
            refuse("has " + name + " of " + shape_text(has) + "; accepted: " + shape_text(ne));
        }
        if (std::find(types.begin(), types.end(), t->type) == types.end()) {
            refuse("has " + name + " of type " + ggml_type_name(t->type) + "; accepted: " + listed(types, ggml_type_name));
        }
        const auto values = values_of(t);
        if (!std::all_of(values.begin(), values.end(), [](double x) { return std::isfinite(x); })) {
            refuse("has a value in " + name + " that isn't a number");
        }
        return t;
    }
    refuse("has no " + names.front());
}

std::vector<double> values_of(const ggml_tensor * t) {
    const int64_t n = ggml_nelements(t);
    if (t->type == GGML_TYPE_F64) {
        return { (const double *) t->data, (const double *) t->data + n };
    }
    if (t->type == GGML_TYPE_F32) {
        return { (const float *) t->data, (const float *) t->data + n };
    }
    std::vector<float> values(n);
    ggml_get_type_traits(t->type)->to_float(t->data, values.data(), n);
    return { values.begin(), values.end() };
}

void write_companion(const llama_model & model, const std::string & path, const std::string & kind,
                     const std::map<std::string, std::string> & texts, const ggml_tensor * tensor) {
    const gguf_context_ptr gguf { gguf_init_empty() };
    gguf_set_val_str(gguf.get(), "general.architecture", ("laprox-" + kind).c_str());
    gguf_set_val_u32(gguf.get(), key_of(kind, "version").c_str(), version);
    gguf_set_val_u32(gguf.get(), key_of(kind, "crc32").c_str(), crc32(0, tensor));
    gguf_set_val_str(gguf.get(), key_of(kind, "model_fingerprint").c_str(), fingerprint(model).c_str());
    for (const auto & [name, text] : texts) {
        gguf_set_val_str(gguf.get(), key_of(kind, name).c_str(), text.c_str());
    }
    gguf_add_tensor(gguf.get(), tensor);
    if (!gguf_write_to_file(gguf.get(), path.c_str(), /*only_meta =*/ false)) {
        throw std::runtime_error(kind + " " + path + " can't be written");
    }
}

}
