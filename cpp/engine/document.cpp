#include "engine/document.h"
#include "engine/cache.h"
#include "engine/hooks.h"
#include "engine/new_file.h"
#include "engine/settings.h"
#include "engine/state_io.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <iterator>
#include <stdexcept>

namespace laprox {

static const char * const architecture = "laprox-document";
static const char * const key_prefix   = "laprox.document.";

static const uint32_t document_version = 1;
static const char *   state_name       = "state";
static const size_t   n_keys_max       = 256; // before anything is allocated for them
static const size_t   alignment        = GGUF_DEFAULT_ALIGNMENT;

// Texts that are there in every document, without being given.
static const char * const own_texts[] = { "fingerprint", "llama.cpp", "ggml" };

// The first bytes of a GGUF, and the last ones of a document.
struct file_head {
    char     magic[4];
    uint32_t version;
    int64_t  n_tensors;
    int64_t  n_keys;
};
struct file_end {
    uint64_t n_bytes; // of the file
    uint64_t sum;     // of all bytes before it
};

static std::string key_of(const std::string & name) {
    return key_prefix + name;
}

[[noreturn]] static void damaged(const std::string & what) {
    throw std::runtime_error("the document is damaged: " + what);
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

// Servers send texts as JSON, which takes nothing else.
static bool is_utf8(const char * text) {
    const uint8_t * s = (const uint8_t *) text;
    while (*s) {
        const int n_more = *s < 0x80 ? 0 : *s >= 0xc2 && *s < 0xe0 ? 1 : *s >= 0xe0 && *s < 0xf0 ? 2 : *s >= 0xf0 && *s < 0xf5 ? 3 : -1;
        uint32_t code = n_more == 0 ? *s : *s & (0x3f >> n_more);
        s++;
        for (int i = 0; i < n_more; i++, s++) { // a terminating zero is no continuation
            if ((*s & 0xc0) != 0x80) {
                return false;
            }
            code = code << 6 | (*s & 0x3f);
        }
        const bool overlong = (n_more == 2 && code < 0x800) || (n_more == 3 && code < 0x10000);
        if (n_more < 0 || overlong || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) {
            return false;
        }
    }
    return true;
}

//
// writing
//

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

// Straight into the file: a state may be as large as all memory that is left.
class document_writer : public llama_io_write_i {
public:
    explicit document_writer(const std::string & path) : file(path) {}

    void write(const void * data, size_t size) override {
        file.write(data, size);
        sum.add(data, size);
        n += size;
    }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override {
        std::vector<uint8_t> rows(size);
        ggml_backend_tensor_get(tensor, rows.data(), offset, size);
        write(rows.data(), size);
    }
    size_t n_bytes() override { return n; }

    void finish() {
        const std::vector<uint8_t> padding(GGML_PAD(n, alignment) - n);
        write(padding.data(), padding.size());
        const uint64_t n_all = n + sizeof(file_end);
        write(&n_all, sizeof(n_all));
        const uint64_t value = sum.result();
        write(&value, sizeof(value));
        file.keep();
    }

private:
    new_file file;
    checksum sum;
    size_t   n = 0;
};

}

static void check_given(const named_texts & texts) {
    for (const auto & [key, text] : texts) {
        const bool named = !key.empty() && std::all_of(key.begin(), key.end(), [](char c) { return (c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '_'; });
        const auto same  = [&, &key = key](const auto & other) { return other.first == key; };
        if (!named || key == "version" || key == "layout" || key == "tokens" || std::count(std::begin(own_texts), std::end(own_texts), key) > 0 ||
                std::count_if(texts.begin(), texts.end(), same) > 1) {
            throw std::invalid_argument("a text's key is \"" + key + "\"; accepted: lower-case letters, digits and _, each key once, and none that every document has");
        }
        if (!is_utf8(text.c_str())) {
            throw std::invalid_argument("the text \"" + key + "\" is not UTF-8");
        }
    }
}

static std::vector<uint8_t> describe(const llama_context & ctx, const std::vector<llama_token> & tokens, const named_texts & texts, size_t n_state) {
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> meta(gguf_init_empty(), gguf_free);
    gguf_set_val_str(meta.get(), "general.architecture", architecture);
    gguf_set_val_u32(meta.get(), key_of("version").c_str(), document_version);
    gguf_set_val_u32(meta.get(), key_of("layout").c_str(), LLAMA_STATE_SEQ_VERSION); // of what llama.cpp's own caches write
    const std::string values[] = { fingerprint_or_none(ctx.get_model()), llama_version(), ggml_version() };
    for (size_t i = 0; i < std::size(own_texts); i++) {
        gguf_set_val_str(meta.get(), key_of(own_texts[i]).c_str(), values[i].c_str());
    }
    for (const auto & [key, text] : texts) {
        gguf_set_val_str(meta.get(), key_of(key).c_str(), text.c_str());
    }
    gguf_set_arr_data(meta.get(), key_of("tokens").c_str(), GGUF_TYPE_INT32, tokens.data(), tokens.size());

    const std::unique_ptr<ggml_context, decltype(&ggml_free)> shapes(ggml_init({ ggml_tensor_overhead(), nullptr, /*no_alloc =*/ true }), ggml_free);
    ggml_tensor * state = ggml_new_tensor_1d(shapes.get(), GGML_TYPE_I8, (int64_t) n_state);
    ggml_set_name(state, state_name);
    gguf_add_tensor(meta.get(), state);

    std::vector<uint8_t> bytes(gguf_get_meta_size(meta.get()));
    gguf_get_meta_data(meta.get(), bytes.data());
    return bytes;
}

// States without the queries that were observed: these are as large as a small document, and a question has its own.
class without_queries {
public:
    explicit without_queries(cache & kv) : kv(kv) { kv.set_queries_in_states(false); }
    ~without_queries() { kv.set_queries_in_states(true); }

private:
    cache & kv;
};

void save_document(llama_context & ctx, llama_seq_id seq_id, const std::string & path, const std::vector<llama_token> & tokens,
        const named_texts & texts) {
    cache & kv = cache_of(ctx);
    kv.at(seq_id); // throws if there is no such sequence
    check_given(texts);
    const int64_t n_seen = (int64_t) kv.seq_pos_max(seq_id) + 1;
    if (tokens.empty() || n_seen != (int64_t) tokens.size()) { // of images, there are no tokens to know them by
        throw std::invalid_argument("sequence " + std::to_string(seq_id) + " holds " + std::to_string(n_seen) + " positions, and " +
                std::to_string(tokens.size()) + " tokens are given; accepted: a token for each, and at least one");
    }

    ctx.synchronize();
    llama_memory_i & memory = *ctx.get_memory();
    const without_queries small(kv);
    byte_counter size;
    state_write(memory, size, seq_id, 0);

    const std::vector<uint8_t> head = describe(ctx, tokens, texts, size.n_bytes());
    document_writer out(path);
    out.write(head.data(), head.size());
    state_write(memory, out, seq_id, 0);
    if (out.n_bytes() != head.size() + size.n_bytes()) {
        throw std::runtime_error("the state has another size than it said");
    }
    out.finish();
}

//
// reading
//

// Of no more than this file, which is one whatever its name: a model's gigabytes aren't read to find out.
static std::vector<uint8_t> read_checked(const std::string & path) {
    std::error_code error;
    const auto where = std::filesystem::u8path(path);
    if (std::filesystem::exists(where, error) && !std::filesystem::is_regular_file(where, error)) {
        throw std::runtime_error("it is not a file"); // one that others write into would keep us waiting
    }
    const std::unique_ptr<FILE, int (*)(FILE *)> file(ggml_fopen(path.c_str(), "rb"), std::fclose);
    if (!file) {
        throw std::runtime_error(std::strerror(errno));
    }
    const uint64_t size = std::filesystem::file_size(where, error);
    file_head head;
    if (error || size < sizeof(file_head) + sizeof(file_end) || std::fread(&head, 1, sizeof(head), file.get()) != sizeof(head) ||
            memcmp(head.magic, GGUF_MAGIC, sizeof(head.magic)) != 0) {
        throw std::runtime_error("it is not a document that laprox wrote, nor any GGUF");
    }
    if (head.version != GGUF_VERSION || head.n_tensors != 1 || head.n_keys < 1 || head.n_keys > (int64_t) n_keys_max) {
        throw std::runtime_error("it is not a document that laprox wrote: a GGUF of version " + std::to_string(head.version) + " with " +
                std::to_string(head.n_tensors) + " tensors and " + std::to_string(head.n_keys) + " keys, such as a model");
    }
    std::vector<uint8_t> bytes;
    try {
        bytes.resize(size);
    } catch (const std::exception &) {
        throw std::runtime_error("there is no memory for its " + std::to_string(size) + " bytes");
    }
    memcpy(bytes.data(), &head, sizeof(head));
    const size_t n_rest = size - sizeof(head);
    if (std::fread(bytes.data() + sizeof(head), 1, n_rest, file.get()) != n_rest) {
        throw std::runtime_error("it can't be read to its end");
    }
    file_end end;
    memcpy(&end, bytes.data() + size - sizeof(end), sizeof(end));
    checksum sum;
    sum.add(bytes.data(), size - sizeof(end.sum));
    if (end.n_bytes != size || end.sum != sum.result()) {
        damaged("it was cut off or changed, as its checksum shows");
    }
    return bytes;
}

// The place of a key whose value has this type; -1: there is none.
static int64_t find_typed(const gguf_context * meta, const std::string & key, gguf_type type) {
    const int64_t at = gguf_find_key(meta, key.c_str());
    return at >= 0 && gguf_get_kv_type(meta, at) == type ? at : -1;
}

static uint32_t number_at(const gguf_context * meta, const char * name) {
    const int64_t at = find_typed(meta, key_of(name), GGUF_TYPE_UINT32);
    if (at < 0) {
        damaged(std::string("it has no ") + name);
    }
    return gguf_get_val_u32(meta, at);
}

static void check_version(const gguf_context * meta) {
    const int64_t at = find_typed(meta, "general.architecture", GGUF_TYPE_STRING);
    if (at < 0 || strcmp(gguf_get_val_str(meta, at), architecture) != 0) {
        throw std::runtime_error("it is not a document that laprox wrote, but another GGUF");
    }
    const uint32_t version = number_at(meta, "version");
    if (version != document_version) {
        throw std::runtime_error("the document has version " + std::to_string(version) + "; accepted: " + std::to_string(document_version) +
                ", so make it again");
    }
    const uint32_t layout = number_at(meta, "layout");
    if (layout != LLAMA_STATE_SEQ_VERSION) {
        throw std::runtime_error("the document was made with another llama.cpp, whose states have version " + std::to_string(layout) +
                "; accepted: " + std::to_string(LLAMA_STATE_SEQ_VERSION) + ", so make it again");
    }
}

namespace {

class document_reader : public llama_io_read_i {
public:
    document_reader(const uint8_t * begin, size_t size) : at(begin), end(begin + size) {}

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

laprox_document::laprox_document(const std::string & path) : bytes(read_checked(path)) {
    const size_t n_gguf = bytes.size() - sizeof(file_end);
    meta.reset(gguf_init_from_buffer(bytes.data(), n_gguf, { /*no_alloc =*/ true, /*ctx =*/ nullptr }));
    if (!meta) {
        damaged("its GGUF can't be read");
    }
    check_version(meta.get());
    check_texts();
    find_tokens();
    find_state();
}

void laprox_document::check_texts() const {
    for (int64_t i = 0; i < gguf_get_n_kv(meta.get()); i++) {
        if (!is_utf8(gguf_get_key(meta.get(), i)) || (gguf_get_kv_type(meta.get(), i) == GGUF_TYPE_STRING && !is_utf8(gguf_get_val_str(meta.get(), i)))) {
            damaged("a text in it is not UTF-8");
        }
    }
    for (const char * name : own_texts) {
        const char * own = text(name);
        if (!own || strlen(own) > 64 || std::any_of(own, own + strlen(own), [](char c) { return c < ' ' || c > '~'; })) { // they are shown
            damaged(std::string("it has no ") + name);
        }
    }
}

void laprox_document::find_tokens() {
    const int64_t at = find_typed(meta.get(), key_of("tokens"), GGUF_TYPE_ARRAY);
    if (at < 0 || gguf_get_arr_type(meta.get(), at) != GGUF_TYPE_INT32 || gguf_get_arr_n(meta.get(), at) == 0) {
        damaged("it has no tokens");
    }
    token_count = (int32_t) gguf_get_arr_n(meta.get(), at); // gguf takes no more than fit
    token_ids   = (const llama_token *) gguf_get_arr_data(meta.get(), at);
    if (std::any_of(token_ids, token_ids + token_count, [](llama_token token) { return token < 0; })) {
        damaged("it has a token below 0");
    }
}

void laprox_document::find_state() {
    const gguf_context * g = meta.get();
    const size_t n_gguf = bytes.size() - sizeof(file_end);
    const size_t begin  = gguf_get_data_offset(g);
    if (strcmp(gguf_get_tensor_name(g, 0), state_name) != 0 || gguf_get_tensor_type(g, 0) != GGML_TYPE_I8 || begin > n_gguf ||
            gguf_get_tensor_size(g, 0) > n_gguf - begin || GGML_PAD(begin + gguf_get_tensor_size(g, 0), alignment) != n_gguf) {
        damaged("it has no state");
    }
    state      = bytes.data() + begin;
    state_size = gguf_get_tensor_size(g, 0);
}

const char * laprox_document::text(const char * key) const {
    const int64_t at = find_typed(meta.get(), key_of(key), GGUF_TYPE_STRING);
    return at < 0 ? nullptr : gguf_get_val_str(meta.get(), at);
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
    if (*std::max_element(token_ids, token_ids + token_count) >= (llama_token) model.vocab.n_tokens()) {
        throw std::runtime_error("the document was made with another model, which has more tokens in its vocabulary");
    }

    ctx.synchronize();
    llama_memory_i & memory = *ctx.get_memory();
    document_reader in(state, state_size);
    state_read(memory, in, seq_id, 0);
    if (!in.at_end() || kv.seq_pos_max(seq_id) + 1 != token_count) {
        memory.seq_rm(seq_id, -1, -1);
        damaged("its state is not of its tokens");
    }
}
