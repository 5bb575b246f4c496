#include "engine/weights.h"

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "gguf.h"

#include <algorithm>
#include <filesystem>
#include <fstream>

namespace laprox {

weight_reader::weight_reader(const std::vector<std::string> & given) {
    for (const std::string & path : given) {
        if (path.empty()) {
            continue; // a model that came from memory
        }
        std::error_code error; // an unreadable path fails when it is opened
        paths.push_back(std::filesystem::absolute(std::filesystem::u8path(path), error).u8string());
    }
}

void weight_reader::find_tensors() {
    for (const std::string & path : paths) {
        ggml_context * meta = nullptr;
        gguf_context_ptr file { gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ true, /*.ctx =*/ &meta }) };
        ggml_context_ptr owner { meta };
        if (!file) {
            continue;
        }
        for (ggml_tensor * t = ggml_get_first_tensor(meta); t; t = ggml_get_next_tensor(meta, t)) {
            if (ggml_n_dims(t) == 2) {
                const size_t offset = gguf_get_data_offset(file.get()) + gguf_get_tensor_offset(file.get(), gguf_find_tensor(file.get(), t->name));
                tensors[t->name] = { path, offset, t->type, { t->ne[0], t->ne[1] } };
            }
        }
    }
    paths.clear();
}

std::vector<float> weight_reader::transposed(const ggml_tensor * weight) {
    const int64_t n_in  = weight->ne[0];
    const int64_t n_out = weight->ne[1];
    const size_t  n_row = ggml_row_size(weight->type, n_in);
    const auto    to_float = ggml_get_type_traits(weight->type)->to_float;
    if (weight->type != GGML_TYPE_F32 && !to_float) {
        return {};
    }

    std::vector<char> bytes;
    const char * data = nullptr;
    if (ggml_backend_buffer_is_host(weight->buffer)) {
        data = (const char *) weight->data;
    } else {
        find_tensors();
        const auto it = tensors.find(weight->name);
        if (it == tensors.end() || it->second.type != weight->type || it->second.ne[0] != n_in || it->second.ne[1] != n_out) {
            return {};
        }
        bytes.resize(n_row*n_out);
        std::ifstream file(std::filesystem::u8path(it->second.path), std::ios::binary);
        file.seekg((std::streamoff) it->second.offset);
        if (!file.read(bytes.data(), (std::streamsize) bytes.size())) {
            return {};
        }
        data = bytes.data();
    }

    // in blocks of rows, so that the scattered writes of the transposition stay in the processor's cache
    const int64_t block = 16;
    std::vector<float> rows(block*n_in);
    std::vector<float> result(n_in*n_out);
    for (int64_t first = 0; first < n_out; first += block) {
        const int64_t n = std::min(block, n_out - first);
        for (int64_t o = 0; o < n; o++) {
            const char * row = data + (first + o)*n_row;
            if (weight->type == GGML_TYPE_F32) {
                std::copy_n((const float *) row, n_in, rows.data() + o*n_in);
            } else {
                to_float(row, rows.data() + o*n_in, n_in);
            }
        }
        for (int64_t i = 0; i < n_in; i++) {
            for (int64_t o = 0; o < n; o++) {
                result[i*n_out + first + o] = rows[o*n_in + i];
            }
        }
    }
    return result;
}

}
