#include "engine/document.h"
#include "engine/cache.h"
#include "engine/document_context.h"
#include "engine/hooks.h"
#include "engine/settings.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>

namespace laprox {

// Texts that are there in every document, without being given.
static const char * const own_texts[] = { "fingerprint", "llama.cpp", "ggml" };

// Keys of the file that aren't texts.
static const char * const not_texts[] = { "version", "layout", "tokens" };

[[noreturn]] static void damaged(const char * what) {
    throw std::runtime_error(std::string("the document is damaged: ") + what);
}

// "": models without attention norms are told by the layout of their caches alone.
static std::string fingerprint_or_none(const llama_model & model) {
    try {
        return fingerprint(model);
    } catch (const std::exception &) {
        return "";
    }
}

static cache & cache_of(llama_context & ctx) {
    cache * kv = cache_in(ctx.get_memory());
    if (!kv) {
        throw std::runtime_error("the context was made without the compressing cache, which documents are of; accepted: any policy but off");
    }
    return *kv;
}

//
// saving
//

static void check_given(const std::map<std::string, std::string> & texts) {
    const auto in = [](const std::string & key, const auto & list) { return std::find(std::begin(list), std::end(list), key) != std::end(list); };
    for (const auto & [key, text] : texts) {
        const bool spelt = !key.empty() && std::all_of(key.begin(), key.end(), [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; });
        if (!spelt || in(key, own_texts) || in(key, not_texts)) {
            throw std::invalid_argument("a text's key is \"" + key + "\"; accepted: lower-case letters, digits and _, and none that every document has");
        }
        if (!is_utf8(text)) {
            throw std::invalid_argument("the text \"" + key + "\" is not UTF-8");
        }
    }
}

namespace {

class byte_counter : public llama_io_write_i {
public:
    void write(const void *, size_t size) override { n += size; }
    void write_tensor(ggml_tensor *, size_t, size_t size) override { n += size; }
    size_t n_bytes() override { return n; }
    bool counts_only() const override { return true; }

private:
    size_t n = 0;
};

// States without the queries that were observed last: these are as large as a small document, and a question has its own.
class without_queries {
public:
    explicit without_queries(cache & kv) : kv(kv) { kv.set_queries_in_states(false); }
    ~without_queries() { kv.set_queries_in_states(true); }

private:
    cache & kv;
};

}

void save_document(llama_context & ctx, llama_seq_id seq_id, const std::string & path, const std::vector<llama_token> & tokens,
        const std::map<std::string, std::string> & texts) {
    cache & kv = cache_of(ctx);
    kv.at(seq_id); // throws if there is no such sequence
    check_given(texts);
    const int64_t n_seen = (int64_t) kv.seq_pos_max(seq_id) + 1;
    if (tokens.empty() || n_seen != (int64_t) tokens.size()) { // of images, there are no tokens to know them by
        throw std::invalid_argument("sequence " + std::to_string(seq_id) + " holds " + std::to_string(n_seen) + " positions, and " +
                std::to_string(tokens.size()) + " tokens are given; accepted: a token for each, and at least one");
    }
    document_contents contents { texts, tokens, LLAMA_STATE_SEQ_VERSION };
    const std::string values[] = { fingerprint_or_none(ctx.get_model()), llama_version(), ggml_version() };
    for (size_t i = 0; i < std::size(own_texts); i++) {
        contents.texts[own_texts[i]] = values[i];
    }
    note_context(ctx, contents.texts);

    ctx.synchronize();
    llama_memory_i & memory = *ctx.get_memory();
    const without_queries small(kv);
    byte_counter size;
    memory.state_write(size, seq_id);
    document_writer out(path, contents, size.n_bytes());
    memory.state_write(out, seq_id);
    out.finish();
}

//
// loading
//

namespace {

class document_reader : public llama_io_read_i {
public:
    explicit document_reader(const document_file & file) : at(file.state), end(file.state + file.n_state) {}

    void read(void * dst, size_t size) override { std::copy_n(take(size), size, (uint8_t *) dst); }
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        ggml_backend_tensor_set(tensor, take(size), offset, size);
    }
    size_t n_bytes() override { return n_taken; }
    bool at_end() const { return at == end; }

private:
    const uint8_t * take(size_t size) {
        if (size > (size_t) (end - at)) {
            damaged("its state is too short");
        }
        at += size;
        n_taken += size;
        return at - size;
    }

    const uint8_t * at;
    const uint8_t * const end;
    size_t n_taken = 0;
};

}

}

using namespace laprox;

laprox_document::laprox_document(const std::string & path) : file(path) {
    const uint32_t layout = file.contents.layout;
    if (layout != LLAMA_STATE_SEQ_VERSION) {
        throw std::runtime_error("the document was made with another llama.cpp, whose states have version " + std::to_string(layout) +
                "; accepted: " + std::to_string(LLAMA_STATE_SEQ_VERSION) + ", so make it again");
    }
    for (const char * name : own_texts) {
        const char * own = text(name);
        if (!own || strlen(own) > 64 || std::any_of(own, own + strlen(own), [](char c) { return c < ' ' || c > '~'; })) { // they are shown
            throw std::runtime_error(std::string("the document is damaged: it has no ") + name);
        }
    }
}

const char * laprox_document::text(const char * key) const {
    const auto & texts = file.contents.texts;
    const auto   found = texts.find(key);
    return found == texts.end() ? nullptr : found->second.c_str();
}

void laprox_document::load(llama_context & ctx, llama_seq_id seq_id) const {
    const cache & kv = cache_of(ctx);
    kv.at(seq_id);
    const llama_model & model = ctx.get_model();
    const std::string made_for = text("fingerprint");
    const std::string here     = fingerprint_or_none(model);
    if (made_for != here) {
        throw std::runtime_error("the document was made with another model (fingerprint " + made_for + " there, " + here + " here)");
    }
    if (*std::max_element(tokens().begin(), tokens().end()) >= (llama_token) model.vocab.n_tokens()) {
        throw std::runtime_error("the document was made with another model, which has more tokens in its vocabulary");
    }
    check_context(ctx, file.contents.texts);

    ctx.synchronize();
    llama_memory_i & memory = *ctx.get_memory();
    document_reader in(file);
    memory.state_read(in, seq_id);
    if (!in.at_end() || kv.seq_pos_max(seq_id) + 1 != (int64_t) tokens().size()) {
        memory.seq_rm(seq_id, -1, -1);
        damaged("its state is not of its tokens");
    }
}
