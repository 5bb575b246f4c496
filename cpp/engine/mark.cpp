#include "engine/mark.h"

#include "ggml-backend.h"

#include "llama-io.h"
#include "llama-memory.h"

#include <cstring>
#include <stdexcept>

namespace laprox {

namespace {

class to_bytes : public llama_io_write_i {
public:
    explicit to_bytes(std::vector<uint8_t> & bytes) : bytes(bytes) {}

    void write(const void * src, size_t size) override { std::memcpy(more(size), src, size); }
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override { ggml_backend_tensor_get(tensor, more(size), offset, size); }
    size_t n_bytes() override { return bytes.size(); }

private:
    uint8_t * more(size_t size) {
        bytes.resize(bytes.size() + size);
        return bytes.data() + bytes.size() - size;
    }

    std::vector<uint8_t> & bytes;
};

class from_bytes : public llama_io_read_i {
public:
    explicit from_bytes(const std::vector<uint8_t> & bytes) : bytes(bytes) {}

    void read(void * dst, size_t size) override { std::memcpy(dst, next(size), size); }
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override { ggml_backend_tensor_set(tensor, next(size), offset, size); }
    size_t n_bytes() override { return at; }

private:
    const uint8_t * next(size_t size) {
        if (size > bytes.size() - at) {
            throw std::runtime_error("what was held at a mark ends early");
        }
        at += size;
        return bytes.data() + at - size;
    }

    const std::vector<uint8_t> & bytes;
    size_t at = 0;
};

}

mark::mark(const llama_memory_i & parts, llama_seq_id seq_id) : next(parts.seq_pos_max(seq_id) + 1) {
    to_bytes out(state);
    parts.state_write(out, seq_id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
}

void mark::restore(llama_memory_i & parts, llama_seq_id seq_id) const {
    from_bytes in(state);
    parts.state_read(in, seq_id, LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY);
}

}
