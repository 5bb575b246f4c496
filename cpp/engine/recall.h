// What a selection chooses from, and what comes back: with an archive, entries that were evicted for one question are there
// when another needs them.

#pragma once

#include "engine/store.h"

#include <cstdint>
#include <memory>
#include <vector>

struct llama_context;

namespace laprox {

class archive;
class sequence;

// The entries that a selection chooses from, layer by layer: those that a sequence holds or, where its archive has the
// others, all that it has seen, as if nothing had been evicted.
class entry_source {
public:
    enum class scope { held, seen };

    entry_source(const sequence & seq, scope what);
    // All of these, which a sequence has seen.
    entry_source(const sequence & seq, const archive & stored) : seq(seq), stored(&stored) {}

    bool sees_all() const { return stored != nullptr; }

    // Entries of a KV head before the tail, at ascending positions.
    const std::vector<llama_pos> & kept(size_t ikv, uint32_t head) const;
    // Its row that holds an entry, counted from the first kept one; the tail's come behind.
    uint32_t row_of(size_t ikv, uint32_t head, size_t entry, const tail_view & tail) const;
    // Positions of the kept rows and tail cells that these rows are.
    std::vector<llama_pos> positions_at(size_t ikv, uint32_t head, const std::vector<uint32_t> & rows) const;

    // Of the entries that are held: what comes back from the archive is as it was.
    head_bias bias(size_t ikv) const;

    // The sequence's own, or one made of archive and tail, which the next call may give up.
    // Throws std::runtime_error where the device has no room for one more layer, or the archive can't be read.
    const layer_store & store(size_t ikv) const;

    const sequence & seq;

private:
    const archive * const stored; // null: what is held
    mutable std::unique_ptr<layer_store> made;
};

// One pass: choose anew from all that was seen, by the latest queries, and hold that. Tokens from the returned position on, `from`
// or later, are to be cut off: they were evaluated on what was held before, and are to be evaluated again on what is held now.
// Throws std::runtime_error with the reason; the sequence is as it was.
llama_pos recall(llama_context & lctx, sequence & seq, llama_pos from);

// Tokens from p0 on are gone, some that left the tail among them. Of those before, what was held stays, and the latest
// are held whole. Throws std::runtime_error with the reason; the sequence is as it was.
void cut(llama_context & lctx, sequence & seq, llama_pos p0);

}
