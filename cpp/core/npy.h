// NumPy's .npy files, as far as tables of numbers go.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace laprox {

struct npy_file {
    std::vector<int64_t> shape;
    std::vector<double>  data;    // row-major
    std::string          trailer; // what follows the array: NumPy itself stops reading before it
};

// float64 or float32, little-endian, C order; format versions 1 and 2.
// Throws std::runtime_error naming the file and what is wrong with it.
npy_file read_npy(const std::string & path);

// As Python writes a tuple: "(99, 32, 8)".
std::string shape_text(const std::vector<int64_t> & shape);

}
