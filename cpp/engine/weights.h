// A weight matrix as float32 on the host. Backends that repack weights for speed can multiply with them but not
// give them back, so those are read from the model's files again.

#pragma once

#include "ggml.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace laprox {

class weight_reader {
public:
    weight_reader() = default;
    explicit weight_reader(const std::vector<std::string> & paths);

    // [n_in, n_out] transposed: n_in rows of n_out values. Empty if neither the tensor's memory nor the files can be
    // read. What comes from a file is to be checked against the tensor: the file may have been replaced.
    std::vector<float> transposed(const ggml_tensor * weight);

private:
    struct location { std::string path; size_t offset; ggml_type type; int64_t ne[2]; };

    void find_tensors();

    std::vector<std::string> paths;
    std::map<std::string, location> tensors; // of two dimensions; filled when first needed
};

}
