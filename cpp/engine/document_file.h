// How a document is laid out in its file: a GGUF, which other tools can look into; behind it, where they don't look, the file's
// length and a checksum of all of it.

#pragma once

#include "engine/new_file.h"
#include "engine/state_io.h"

#include "llama.h"

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace laprox {

struct document_contents {
    std::map<std::string, std::string> texts; // UTF-8
    std::vector<llama_token> tokens;
    uint32_t layout = 0; // of what llama.cpp's own caches write: LLAMA_STATE_SEQ_VERSION
};

bool is_utf8(const std::string & text);

// Written beside its path, straight from where the state is: that may be as large as all memory that is left.
class document_writer : public llama_io_write_i {
public:
    // What is written next is the state, of so many bytes.
    document_writer(const std::string & path, const document_contents & contents, size_t n_state);

    void write(const void * data, size_t size) override;
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override;
    size_t n_bytes() override { return n; }

    // The file takes its path. Throws std::runtime_error if that wasn't all of the state, or the system's reason.
    void finish();

private:
    new_file file;
    checksum sum;
    size_t   n = 0;
    size_t   n_with_state;
};

// A file that was checked, in memory: whatever happens to the file now.
struct document_file {
    // Throws std::runtime_error with the reason, without the path.
    explicit document_file(const std::string & path);

    std::vector<uint8_t> bytes;
    document_contents contents;
    const uint8_t * state = nullptr;
    size_t n_state = 0;
};

}
