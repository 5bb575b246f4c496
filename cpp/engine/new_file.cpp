#include "engine/new_file.h"

#include "ggml.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <random>
#include <stdexcept>

namespace laprox {

[[noreturn]] static void refuse(const std::string & reason) {
    throw std::runtime_error("it can't be written: " + reason);
}

// Others may be writing the same file.
static std::string beside(const std::string & path) {
    return path + "." + std::to_string(std::random_device()()) + ".tmp";
}

new_file::new_file(const std::string & path) : path(path), unfinished(beside(path)) {
    std::error_code error;
    if (std::filesystem::is_directory(std::filesystem::u8path(path), error)) {
        refuse("it is a folder"); // as renaming would find out at the very end
    }
    file = ggml_fopen(unfinished.c_str(), "wb");
    if (!file) {
        refuse(std::strerror(errno));
    }
}

new_file::~new_file() {
    if (file) {
        std::fclose(file);
    }
    std::error_code ignored; // of one that was kept: there is none
    std::filesystem::remove(std::filesystem::u8path(unfinished), ignored);
}

void new_file::write(const void * data, size_t size) {
    errno = 0;
    if (size > 0 && std::fwrite(data, 1, size, file) != size) {
        refuse(std::strerror(errno));
    }
}

void new_file::keep() {
    errno = 0;
    FILE * complete = file;
    file = nullptr;
    if (std::fclose(complete) != 0) { // a full disk may be noticed here only
        refuse(std::strerror(errno));
    }
    std::error_code error;
    std::filesystem::rename(std::filesystem::u8path(unfinished), std::filesystem::u8path(path), error);
    if (error) {
        refuse(error.message());
    }
}

}
