// The second tier: every row of the tokens that left a sequence's tail, bit by bit as the cache had it, in host memory or
// in an unnamed file. The cache is a selection of these tokens and of the tail's, so what was evicted for one question is
// there when another needs it.
//
// Tokens leave the tail in ascending order and never change afterwards, so each compression adds one chunk, written once;
// sequences that were copied share them. Chunks hold all tokens of all heads, what the cache keeps, too: a fifth more
// memory at the default budget, and a row is found by its token's number alone. Where there is no room for more, whole tokens
// are lost, which moves the others up in their chunk.

#pragma once

#include "core/budget.h"

#include "llama.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace laprox {

enum class archive_kind { memory, file };

// There is no room for more.
struct archive_full : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// Where a context's archives lie, and how much they have taken.
class archive_space {
public:
    // folder: of the unnamed files; empty: the system's folder for temporary files. limit: bytes, or a share of what is free.
    archive_space(archive_kind kind, std::string folder, const budget & limit);

    const archive_kind kind;

    size_t used() const { return n_used; }
    size_t room() const { return limit - std::min(limit, used()); }

private:
    friend class archive_chunk;

    const std::string folder;
    const size_t limit;
    std::atomic<size_t> n_used { 0 };
};

// The space that a setting asks for: "auto", "ram", "off" or a folder. `in_host_memory`: the cache, whose archive is then better
// in a file, which the system keeps in whatever memory is free. null: off. Throws std::invalid_argument for a folder that isn't one.
std::shared_ptr<archive_space> make_archive_space(const std::string & setting, const budget & limit, bool in_host_memory);

// A run of bytes that is written once, from its start to its end, and then read. It is shortened in the same order: what is
// written anew is read before.
class archive_chunk {
public:
    // Takes the room. Throws archive_full where there is none.
    archive_chunk(std::shared_ptr<archive_space> space, size_t size);
    ~archive_chunk();

    archive_chunk(const archive_chunk &) = delete;

    void write(const void * data, size_t n);
    void read(size_t offset, void * data, size_t n) const;

    // The next write() is at the start.
    void rewind() { n_written = 0; }
    // What wasn't written since is given back.
    void shorten();

    size_t size;

private:
    struct free_memory { void operator()(uint8_t * bytes) const { std::free(bytes); } };

    const std::shared_ptr<archive_space> space;
    size_t n_written = 0;
    std::unique_ptr<uint8_t, free_memory> memory; // null: in the file
    int file = -1;
};

// What one sequence has in it.
class archive {
public:
    // row_bytes[layer][pool]: of one row of one KV head
    using layout = std::vector<std::vector<size_t>>;

    // n_heads: KV heads of each layer
    void set_layout(layout row_bytes, std::vector<uint32_t> n_heads);

    // Tokens that leave the tail, ascending and behind all others. `fill(layer, pool, head, rows, size)` writes those of a head,
    // [tokens, row bytes], for one head after the other. Throws archive_full where there is no room, before the first call, or
    // std::runtime_error where they can't be written; nothing has changed then.
    template <typename F> void add(const std::shared_ptr<archive_space> & space, const std::vector<llama_pos> & added, F fill) {
        auto chunk = std::make_shared<archive_chunk>(space, added.size()*token_bytes());
        for_each_block(added.size(), [&](size_t ikv, size_t pool, uint32_t head, std::vector<uint8_t> & rows) {
            fill(ikv, pool, head, rows.data(), rows.size());
            chunk->write(rows.data(), rows.size());
        });
        parts.push_back({ std::move(chunk), added.size(), added.size() });
        positions.insert(positions.end(), added.begin(), added.end());
        join_parts(space);
    }

    // The same calls for n tokens that aren't stored.
    template <typename F> void skip(size_t n, F fill) const {
        for_each_block(n, [&](size_t ikv, size_t pool, uint32_t head, std::vector<uint8_t> & rows) {
            fill(ikv, pool, head, rows.data(), rows.size());
        });
    }

    // Tokens that there can be room for, with these gone.
    size_t capacity(const archive_space & space) const { return (space.room() + bytes())/token_bytes(); }
    // The others are lost; `stays`: of each token that there is. Throws std::runtime_error where the file fails, and what is left is
    // then to be cleared; or archive_full where another sequence has the same chunks, before anything has changed.
    void keep(const std::vector<bool> & stays);
    // So are these, which never came here.
    void add_lost(const std::vector<llama_pos> & added);

    // Rows of all tokens, a block for each head in the order of add(); `sizes_only`: with whatever in them.
    template <typename F> void visit(F use, bool sizes_only) const {
        for_each_block(positions.size(), [&](size_t ikv, size_t pool, uint32_t head, std::vector<uint8_t> & rows) {
            if (!sizes_only) {
                read(ikv, pool, head, rows.data());
            }
            use(rows);
        });
    }

    // Rows of all tokens, in their order: [tokens, row bytes]
    void read(size_t ikv, size_t pool, uint32_t head, uint8_t * data) const;

    // Tokens from that position on are gone. Their room stays taken until trim(), which empties an archive whose file fails.
    void cut(llama_pos pos);
    void trim(const std::shared_ptr<archive_space> & space);

    // Whether tokens before that position share one, as those of an image do: rows can't be found by it.
    bool shares_positions(llama_pos before) const;
    void clear();

    const std::vector<llama_pos> & pos() const { return positions; }
    const std::vector<llama_pos> & lost() const { return lost_positions; } // ascending, too
    // That left the tail.
    size_t n_seen() const { return positions.size() + lost_positions.size(); }

    // Taken by its chunks; those that sequences share count for each.
    size_t bytes() const;

private:
    struct part {
        std::shared_ptr<archive_chunk> chunk;
        size_t n_stored; // tokens in the chunk
        size_t n;        // of them this sequence's, from the first on
    };

    template <typename F> void for_each_block(size_t n, F use) const {
        std::vector<uint8_t> rows;
        for (size_t ikv = 0; ikv < row_bytes.size(); ikv++) {
            for (size_t pool = 0; pool < row_bytes[ikv].size(); pool++) {
                rows.resize(row_bytes[ikv][pool]*n);
                for (uint32_t head = 0; head < n_heads[ikv]; head++) {
                    use(ikv, pool, head, rows);
                }
            }
        }
    }

    size_t token_bytes() const;
    // Where a head's rows of a layer and a pool begin in a chunk: bytes per token of the chunk.
    size_t offset(size_t ikv, size_t pool, uint32_t head) const;
    void join_parts(const std::shared_ptr<archive_space> & space);
    // Of a part's tokens these stay, in its own chunk, which no other archive has. Throws std::runtime_error where the file fails: it is
    // of no use then.
    void move_up(part & p, const std::vector<bool> & stays) const;
    // The last n parts become one; where there is no room for it, they stay as they are.
    bool rewrite_last(const std::shared_ptr<archive_space> & space, size_t n);

    layout row_bytes;
    std::vector<uint32_t> n_heads;
    std::vector<part> parts;
    std::vector<llama_pos> positions, lost_positions;
};

}
