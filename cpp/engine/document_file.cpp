#include "engine/document_file.h"

#include "ggml-backend.h"
#include "gguf.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <memory>
#include <stdexcept>

namespace laprox {

static const char * const architecture = "laprox-document";
static const std::string  own_keys     = "laprox.document."; // begin so
static const char * const state_name   = "state";

static const uint32_t version    = 1;
static const int64_t  n_keys_max = 256;
static const size_t   alignment  = GGUF_DEFAULT_ALIGNMENT;

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

[[noreturn]] static void damaged(const std::string & what) {
    throw std::runtime_error("the document is damaged: " + what);
}

bool is_utf8(const std::string & text) {
    for (size_t i = 0; i < text.size();) {
        const auto byte = [&](size_t at) { return at < text.size() ? (uint8_t) text[at] : 0u; };
        const uint32_t first  = byte(i);
        const int      n_more = first < 0x80 ? 0 : first >= 0xc2 && first < 0xe0 ? 1 : first >= 0xe0 && first < 0xf0 ? 2 : first >= 0xf0 && first < 0xf5 ? 3 : -1;
        uint32_t code = n_more > 0 ? first & (0x3f >> n_more) : first;
        for (int k = 1; k <= n_more; k++) {
            if ((byte(i + k) & 0xc0) != 0x80) {
                return false;
            }
            code = code << 6 | (byte(i + k) & 0x3f);
        }
        const bool overlong = (n_more == 2 && code < 0x800) || (n_more == 3 && code < 0x10000);
        if (n_more < 0 || overlong || code > 0x10ffff || (code >= 0xd800 && code < 0xe000)) {
            return false;
        }
        i += 1 + n_more;
    }
    return true;
}

//
// writing
//

static std::vector<uint8_t> describe(const document_contents & contents, size_t n_state) {
    const std::unique_ptr<gguf_context, decltype(&gguf_free)> meta(gguf_init_empty(), gguf_free);
    gguf_set_val_str(meta.get(), "general.architecture", architecture);
    gguf_set_val_u32(meta.get(), (own_keys + "version").c_str(), version);
    gguf_set_val_u32(meta.get(), (own_keys + "layout").c_str(), contents.layout);
    for (const auto & [key, text] : contents.texts) {
        gguf_set_val_str(meta.get(), (own_keys + key).c_str(), text.c_str());
    }
    gguf_set_arr_data(meta.get(), (own_keys + "tokens").c_str(), GGUF_TYPE_INT32, contents.tokens.data(), contents.tokens.size());

    const std::unique_ptr<ggml_context, decltype(&ggml_free)> shapes(ggml_init({ ggml_tensor_overhead(), nullptr, /*no_alloc =*/ true }), ggml_free);
    ggml_tensor * state = ggml_new_tensor_1d(shapes.get(), GGML_TYPE_I8, (int64_t) n_state);
    ggml_set_name(state, state_name);
    gguf_add_tensor(meta.get(), state);

    std::vector<uint8_t> bytes(gguf_get_meta_size(meta.get()));
    gguf_get_meta_data(meta.get(), bytes.data());
    return bytes;
}

document_writer::document_writer(const std::string & path, const document_contents & contents, size_t n_state) : file(path) {
    const std::vector<uint8_t> head = describe(contents, n_state);
    write(head.data(), head.size());
    n_with_state = n + n_state;
}

void document_writer::write(const void * data, size_t size) {
    file.write(data, size);
    sum.add(data, size);
    n += size;
}

void document_writer::write_tensor(ggml_tensor * tensor, size_t offset, size_t size) {
    std::vector<uint8_t> rows(size);
    ggml_backend_tensor_get(tensor, rows.data(), offset, size);
    write(rows.data(), size);
}

void document_writer::finish() {
    if (n != n_with_state) {
        throw std::runtime_error("the state has another size than it said");
    }
    const std::vector<uint8_t> padding(GGML_PAD(n, alignment) - n);
    write(padding.data(), padding.size());
    const uint64_t n_all = n + sizeof(file_end);
    write(&n_all, sizeof(n_all));
    const uint64_t value = sum.result();
    write(&value, sizeof(value));
    file.keep();
}

//
// reading
//

// A model's gigabytes aren't read to find out that it is none.
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
    if (head.version != GGUF_VERSION || head.n_tensors != 1 || head.n_keys < 1 || head.n_keys > n_keys_max) {
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

namespace {

// Values one after another, of which none reaches beyond the end. ggml's own parser isn't made for what others forge: it loads
// types that are none, and takes memory for any number of strings.
class cursor {
public:
    cursor(const std::vector<uint8_t> & bytes, size_t begin, size_t end) : bytes(bytes), n(begin), end(end) {}

    const uint8_t * take(uint64_t size) {
        if (size > end - n) {
            damaged("its GGUF can't be read");
        }
        n += size;
        return bytes.data() + n - size;
    }
    template <typename T> T number() {
        T value;
        memcpy(&value, take(sizeof(value)), sizeof(value));
        return value;
    }
    std::string text() {
        const uint64_t size = number<uint64_t>();
        const std::string value((const char *) take(size), size);
        if (!is_utf8(value) || value.find('\0') != std::string::npos) { // servers send it as JSON, and C ends it there
            damaged("a text in it is not UTF-8");
        }
        return value;
    }
    void align() { take(GGML_PAD(n, alignment) - n); }
    size_t at() const { return n; }

private:
    const std::vector<uint8_t> & bytes;
    size_t n;
    const size_t end;
};

}

// What describe() wrote: no other types of values.
static document_contents read_contents(cursor & in, int64_t n_keys) {
    std::map<std::string, std::string> texts;
    std::map<std::string, uint32_t>    numbers;
    document_contents result;
    for (int64_t i = 0; i < n_keys; i++) {
        const std::string key = in.text();
        if (texts.count(key) + numbers.count(key) > 0) {
            damaged("a key is there twice");
        }
        const int32_t type = in.number<int32_t>();
        if (type == GGUF_TYPE_STRING) {
            texts[key] = in.text();
        } else if (type == GGUF_TYPE_UINT32) {
            numbers[key] = in.number<uint32_t>();
        } else if (type == GGUF_TYPE_ARRAY && key == own_keys + "tokens" && result.tokens.empty() && in.number<int32_t>() == GGUF_TYPE_INT32) {
            const uint64_t n = in.number<uint64_t>();
            const uint8_t * values = in.take(n > INT32_MAX ? UINT64_MAX : n*sizeof(llama_token));
            result.tokens.resize(n);
            std::copy_n(values, n*sizeof(llama_token), (uint8_t *) result.tokens.data());
        } else {
            damaged("its GGUF has a value that documents don't have");
        }
    }

    const auto number = [&](const char * name) {
        if (numbers.count(own_keys + name) == 0) {
            damaged(std::string("it has no ") + name);
        }
        return numbers[own_keys + name];
    };
    if (texts["general.architecture"] != architecture) {
        throw std::runtime_error("it is not a document that laprox wrote, but another GGUF");
    }
    if (number("version") != version) {
        throw std::runtime_error("the document has version " + std::to_string(number("version")) + "; accepted: " + std::to_string(version) +
                ", so make it again");
    }
    result.layout = number("layout");
    for (const auto & [key, text] : texts) {
        if (key.compare(0, own_keys.size(), own_keys) == 0) {
            result.texts[key.substr(own_keys.size())] = text;
        }
    }
    return result;
}

document_file::document_file(const std::string & path) : bytes(read_checked(path)) {
    file_head head;
    memcpy(&head, bytes.data(), sizeof(head));
    const size_t n_gguf = bytes.size() - sizeof(file_end);
    cursor in(bytes, sizeof(head), n_gguf);
    contents = read_contents(in, head.n_keys);
    if (contents.tokens.empty() || std::any_of(contents.tokens.begin(), contents.tokens.end(), [](llama_token token) { return token < 0; })) {
        damaged("it has no tokens, or one below 0");
    }
    const bool named = in.text() == state_name;
    const bool flat  = in.number<uint32_t>() == 1;
    n_state = in.number<uint64_t>();
    const bool bytewise = in.number<int32_t>() == GGML_TYPE_I8;
    const bool first    = in.number<uint64_t>() == 0;
    in.align();
    state = in.take(n_state);
    in.align();
    if (!named || !flat || !bytewise || !first || in.at() != n_gguf) {
        damaged("it has no state");
    }
}

}
