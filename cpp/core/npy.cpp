#include "core/npy.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>

namespace laprox {

[[noreturn]] static void refuse(const std::string & path, const std::string & why) {
    throw std::runtime_error(path + ": " + why);
}

static std::string read_bytes(const std::string & path) {
    std::ifstream file(std::filesystem::u8path(path), std::ios::binary);
    if (!file) {
        refuse(path, "can't be opened");
    }
    std::string bytes;
    std::vector<char> block(1 << 16);
    do {
        file.read(block.data(), (std::streamsize) block.size());
        bytes.append(block.data(), (size_t) file.gcount());
    } while (file);
    if (file.bad()) {
        refuse(path, "can't be read");
    }
    return bytes;
}

static uint64_t little_endian(const char * bytes, size_t n) {
    uint64_t value = 0;
    for (size_t i = n; i-- > 0; ) {
        value = value << 8 | (unsigned char) bytes[i];
    }
    return value;
}

// The text after `key` in the header, a Python dict: {'descr': '<f8', 'fortran_order': False, 'shape': (99, 2, 4), }
static std::string header_value(const std::string & path, const std::string & header, const std::string & key,
                                const std::string & end) {
    const size_t at = header.find("'" + key + "'");
    const size_t colon = at == std::string::npos ? at : header.find(':', at);
    const size_t begin = colon == std::string::npos ? colon : header.find_first_not_of(" ", colon + 1);
    const size_t stop  = begin == std::string::npos ? begin : header.find_first_of(end, begin + 1);
    if (stop == std::string::npos) {
        refuse(path, "has a .npy header without " + key);
    }
    return header.substr(begin, stop - begin);
}

static std::vector<int64_t> parse_shape(const std::string & path, const std::string & text) {
    std::vector<int64_t> shape;
    size_t i = 1; // after the parenthesis
    while ((i = text.find_first_not_of(" ,", i)) != std::string::npos) {
        const size_t end = std::min(text.find_first_not_of("0123456789", i), text.size());
        if (end == i || end - i > 12) {
            refuse(path, "has the shape " + text + "), which can't be read");
        }
        shape.push_back(std::stoll(text.substr(i, end - i)));
        i = end;
    }
    return shape;
}

static double number_at(const char * bytes, size_t size) {
    const uint64_t bits = little_endian(bytes, size);
    if (size == sizeof(double)) {
        double value;
        std::memcpy(&value, &bits, sizeof(value));
        return value;
    }
    const uint32_t low = (uint32_t) bits;
    float value;
    std::memcpy(&value, &low, sizeof(value));
    return value;
}

std::string shape_text(const std::vector<int64_t> & shape) {
    std::string text;
    for (int64_t n : shape) {
        text += (text.empty() ? "" : ", ") + std::to_string(n);
    }
    return "(" + text + (shape.size() == 1 ? ",)" : ")");
}

npy_file read_npy(const std::string & path) {
    const std::string bytes = read_bytes(path);
    if (bytes.size() < 12 || bytes.compare(0, 6, "\x93NUMPY") != 0) {
        refuse(path, "isn't a .npy file");
    }
    const int version = bytes[6];
    if (version != 1 && version != 2) {
        refuse(path, "has .npy format version " + std::to_string(version) + "; accepted: 1, 2");
    }
    const size_t length = version == 1 ? 2 : 4;
    const size_t begin  = 8 + length;
    const size_t n_header = (size_t) little_endian(bytes.data() + 8, length);
    if (bytes.size() - begin < n_header) {
        refuse(path, "is truncated within its header");
    }
    const std::string header = bytes.substr(begin, n_header);

    const std::string dtype = header_value(path, header, "descr", ",}");
    const size_t size = dtype == "'<f8'" ? 8 : dtype == "'<f4'" ? 4 : 0;
    if (size == 0) {
        refuse(path, "has elements of type " + dtype + "; accepted: '<f8' (float64), '<f4' (float32)");
    }
    if (header_value(path, header, "fortran_order", ",}") != "False") {
        refuse(path, "is in Fortran order; accepted: C order (save numpy.ascontiguousarray(a))");
    }

    npy_file file;
    file.shape = parse_shape(path, header_value(path, header, "shape", ")"));
    const size_t data = begin + n_header;
    const size_t n_there = (bytes.size() - data)/size;
    size_t n = 1;
    for (int64_t extent : file.shape) {
        // compared before it is multiplied: a shape may promise more than can be counted
        if (extent != 0 && n > n_there/(size_t) extent) {
            refuse(path, "is truncated: " + std::to_string(bytes.size() - data) + " bytes of data are too few for shape " +
                    shape_text(file.shape));
        }
        n *= (size_t) extent;
    }
    file.data.reserve(n);
    for (size_t i = 0; i < n; i++) {
        file.data.push_back(number_at(bytes.data() + data + i*size, size));
    }
    file.trailer = bytes.substr(data + n*size);
    return file;
}

}
