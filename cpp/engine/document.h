// A document: what a sequence holds, in a file with the tokens and texts that it was made of. GGUF, which other tools can look
// into; behind it, where they don't look, the file's length and a checksum of all of it.

#pragma once

#include "gguf.h"
#include "llama.h"

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace laprox {

using named_texts = std::vector<std::pair<std::string, std::string>>;

// Throws std::runtime_error with the reason, which doesn't begin with the path. Then there is no new file.
void save_document(llama_context & ctx, llama_seq_id seq_id, const std::string & path, const std::vector<llama_token> & tokens,
        const named_texts & texts);

}

// A file that was checked, in memory: whatever happens to the file now.
struct laprox_document {
    // Throws std::runtime_error with the reason, without the path.
    explicit laprox_document(const std::string & path);

    const char * text(const char * key) const; // null: there is none
    const llama_token * tokens() const { return token_ids; }
    int32_t n_tokens() const { return token_count; }

    // The sequence then holds it, and only it. Throws std::runtime_error with the reason; the sequence is then empty, or as it
    // was where the document is of another model.
    void load(llama_context & ctx, llama_seq_id seq_id) const;

private:
    struct free_gguf { void operator()(gguf_context * meta) const { gguf_free(meta); } };

    void check_texts() const;
    void find_tokens();
    void find_state();

    std::vector<uint8_t> bytes;
    std::unique_ptr<gguf_context, free_gguf> meta;
    const llama_token * token_ids = nullptr;
    int32_t token_count = 0;
    const uint8_t * state = nullptr;
    size_t state_size = 0;
};
