// A document: what a sequence holds, in a file with the tokens and texts that it was made of.

#pragma once

#include "engine/document_file.h"

#include "llama.h"

#include <map>
#include <string>
#include <vector>

namespace laprox {

// Throws std::runtime_error with the reason, which doesn't begin with the path. Then there is no new file.
void save_document(llama_context & ctx, llama_seq_id seq_id, const std::string & path, const std::vector<llama_token> & tokens,
        const std::map<std::string, std::string> & texts);

}

struct laprox_document {
    // Throws std::runtime_error with the reason, without the path.
    explicit laprox_document(const std::string & path);

    const char * text(const char * key) const; // null: there is none
    const std::vector<llama_token> & tokens() const { return file.contents.tokens; }

    // The sequence then holds it, and only it. Throws std::runtime_error with the reason; the sequence is then empty, or as it
    // was where the document is of another model.
    void load(llama_context & ctx, llama_seq_id seq_id) const;

private:
    const laprox::document_file file;
};
