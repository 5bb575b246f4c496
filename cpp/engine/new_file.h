// A file that is there whole or not at all: a full disk, or an end of the process, leaves what was at its path before.

#pragma once

#include <cstddef>
#include <cstdio>
#include <string>

namespace laprox {

// All but keep() leads to its deletion. Throws std::runtime_error with the system's reason.
class new_file {
public:
    explicit new_file(const std::string & path);
    ~new_file();

    new_file(const new_file &) = delete;
    new_file & operator=(const new_file &) = delete;

    void write(const void * data, size_t size);
    // It takes the place of `path`.
    void keep();

private:
    const std::string path;
    const std::string unfinished; // beside it, since only there it can be renamed at once
    FILE * file;
};

}
