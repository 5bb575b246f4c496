#include "engine/state_io.h"

#include "ggml.h"

#include <algorithm>
#include <cstring>

namespace laprox {

void checksum::add(const void * data, size_t size) {
    const uint8_t * bytes = (const uint8_t *) data;
    for (; size > 0 && n_pending > 0; size--) {
        pend(*bytes++);
    }
    for (; size >= sizeof(uint64_t); bytes += sizeof(uint64_t), size -= sizeof(uint64_t)) {
        uint64_t word;
        memcpy(&word, bytes, sizeof(word));
        mix(word);
    }
    for (; size > 0; size--) {
        pend(*bytes++);
    }
}

uint64_t checksum::result() const {
    checksum last = *this;
    last.mix(pending);
    return last.value;
}

void checksum::pend(uint8_t byte) {
    pending |= (uint64_t) byte << 8*n_pending;
    if (++n_pending == sizeof(pending)) {
        mix(pending);
        pending   = 0;
        n_pending = 0;
    }
}

void checksum::mix(uint64_t word) {
    value = (value ^ word)*0x9e3779b97f4a7c15;
    value ^= value >> 29;
}

void state_writer::write(const void * data, size_t size) {
    if (size == 0) {
        return; // an empty list has no address, and what writes may copy from it
    }
    io.write(data, size);
    if (!io.counts_only()) {
        sum.add(data, size);
    }
}

void state_writer::rows(const ggml_tensor * t, size_t first, size_t n) {
    const size_t size = n*t->nb[1];
    if (io.counts_only()) {
        io.write(nullptr, size);
    } else if (size > 0) {
        std::vector<uint8_t> bytes(size);
        ggml_backend_tensor_get(t, bytes.data(), first*t->nb[1], size);
        write(bytes.data(), size);
    }
}

void state_writer::finish() {
    const uint64_t value = sum.result();
    io.write(&value, sizeof(value));
}

void state_reader::read(void * data, size_t size) {
    io.read(data, size);
    sum.add(data, size);
}

void state_reader::rows(ggml_tensor * t, size_t first, size_t n) {
    std::vector<uint8_t> bytes(n*t->nb[1]);
    if (!bytes.empty()) {
        read(bytes.data(), bytes.size());
        ggml_backend_tensor_set(t, bytes.data(), first*t->nb[1], bytes.size());
    }
}

static void expect_checksum(const checksum & sum, uint64_t saved) {
    if (saved != sum.result()) {
        throw std::runtime_error("the saved state is damaged: its checksum is wrong");
    }
}

void state_reader::finish() {
    uint64_t saved;
    io.read(&saved, sizeof(saved));
    expect_checksum(sum, saved);
}

void framed_writer::write(const void * src, size_t size) {
    if (!in_rest) {
        io.write(src, size);
        return;
    }
    n_rest += size;
    if (!counts_only()) {
        const uint8_t * bytes = (const uint8_t *) src;
        rest.insert(rest.end(), bytes, bytes + size);
    }
}

void framed_writer::write_tensor(ggml_tensor * tensor, size_t offset, size_t size) {
    if (!in_rest) {
        io.write_tensor(tensor, offset, size);
        return;
    }
    n_rest += size;
    if (!counts_only()) {
        rest.resize(rest.size() + size);
        ggml_backend_tensor_get(tensor, rest.data() + rest.size() - size, offset, size);
    }
}

void framed_writer::finish() {
    checksum sum;
    sum.add(rest.data(), rest.size());
    const uint64_t value = sum.result();
    io.write(&n_rest, sizeof(n_rest));
    if (counts_only()) {
        io.write(nullptr, n_rest);
    } else if (!rest.empty()) {
        io.write(rest.data(), rest.size());
    }
    io.write(&value, sizeof(value));
}

// No more memory is taken than the file has bytes, whatever length it claims.
void framed_reader::begin_rest() {
    uint64_t n_rest;
    io.read(&n_rest, sizeof(n_rest));
    while (rest.size() < n_rest) {
        const size_t before = rest.size();
        rest.resize(std::min<uint64_t>(n_rest, before + (1 << 20)));
        io.read(rest.data() + before, rest.size() - before);
    }
    uint64_t saved;
    io.read(&saved, sizeof(saved));
    checksum sum;
    sum.add(rest.data(), rest.size());
    expect_checksum(sum, saved);
    in_rest = true;
}

const uint8_t * framed_reader::take(size_t size) {
    if (size > rest.size() - at) {
        throw std::runtime_error("the saved state doesn't fit this context: a part beside the compressed cache is too short");
    }
    at += size;
    return rest.data() + at - size;
}

void framed_reader::read(void * dst, size_t size) {
    if (in_rest) {
        std::copy_n(take(size), size, (uint8_t *) dst);
    } else {
        io.read(dst, size);
    }
}

void framed_reader::read_tensor(ggml_tensor * tensor, size_t offset, size_t size) {
    if (in_rest) {
        ggml_backend_tensor_set(tensor, take(size), offset, size);
    } else {
        io.read_tensor(tensor, offset, size);
    }
}

void framed_reader::finish() {
    if (at != rest.size()) {
        throw std::runtime_error("the saved state doesn't fit this context: a part beside the compressed cache is too long");
    }
}

}
