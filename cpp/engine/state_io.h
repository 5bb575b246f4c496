// Bytes of a saved state, with a checksum: a bit flipped in a file must not become a changed memory.

#pragma once

#include "ggml-backend.h"

#include "llama-io.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace laprox {

class checksum {
public:
    // In whatever pieces the data come.
    void add(const void * data, size_t size);
    uint64_t result() const;

private:
    void pend(uint8_t byte);
    void mix(uint64_t word);

    uint64_t value     = 0xcbf29ce484222325;
    uint64_t pending   = 0; // bytes that don't fill a word yet
    uint32_t n_pending = 0;
};

// Our own part, through the host. A writer and a reader have the same calls, so that one visitor serves both.
class state_writer {
public:
    static constexpr bool reads = false;

    explicit state_writer(llama_io_write_i & io) : io(io) {}

    void write(const void * data, size_t size);
    template <typename T> void put(const T & value) {
        write(&value, sizeof(value));
    }
    template <typename T> void field(const T & value) {
        put(value);
    }
    template <typename T> void list(const std::vector<T> & values, size_t n) {
        write(values.data(), n*sizeof(T));
    }
    void rows(const ggml_tensor * t, size_t first, size_t n);
    bool counts_only() const { return io.counts_only(); }
    void finish();

private:
    llama_io_write_i & io;
    checksum sum;
};

class state_reader {
public:
    static constexpr bool reads = true;

    explicit state_reader(llama_io_read_i & io) : io(io) {}

    void read(void * data, size_t size);
    template <typename T> T get() {
        T value;
        read(&value, sizeof(value));
        return value;
    }
    template <typename T> void field(T & value) {
        read(&value, sizeof(value));
    }
    // A list whose length came from the file: memory is taken as its elements come, not on the length's word.
    template <typename T> void list(std::vector<T> & values, size_t n) {
        while (values.size() < n) {
            const size_t before = values.size();
            values.resize(std::min(n, before + 65536));
            read(values.data() + before, (values.size() - before)*sizeof(T));
        }
    }
    void rows(ggml_tensor * t, size_t first, size_t n);
    void finish();

private:
    llama_io_read_i & io;
    checksum sum;
};

// What llama.cpp's own caches beside ours (sliding windows, recurrent states) write behind our part: they check little
// of what they read, so it gets a length and a checksum, and is handed to them only when that is right.
class framed_writer : public llama_io_write_i {
public:
    explicit framed_writer(llama_io_write_i & io) : io(io) {}

    void write(const void * src, size_t size) override;
    void write_tensor(ggml_tensor * tensor, size_t offset, size_t size) override;
    size_t n_bytes() override { return io.n_bytes(); }
    bool counts_only() const override { return io.counts_only(); }

    void begin_rest() { in_rest = true; } // our part is complete
    void finish();

private:
    llama_io_write_i & io;
    bool     in_rest = false;
    uint64_t n_rest  = 0;
    std::vector<uint8_t> rest;
};

class framed_reader : public llama_io_read_i {
public:
    explicit framed_reader(llama_io_read_i & io) : io(io) {}

    void read(void * dst, size_t size) override;
    void read_tensor(ggml_tensor * tensor, size_t offset, size_t size) override;
    size_t n_bytes() override { return io.n_bytes(); }

    void begin_rest();
    void finish();

private:
    const uint8_t * take(size_t size);

    llama_io_read_i & io;
    bool   in_rest = false;
    size_t at      = 0;
    std::vector<uint8_t> rest;
};

}
