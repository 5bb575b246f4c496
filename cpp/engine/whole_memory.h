// A context's memory as its user sees it.
//
// iSWA and hybrid memories call their parts one after the other, and a compressing cache among them may refuse. This one
// does a call with all parts or with none, and a call about a sequence that doesn't exist changes nothing. The context
// itself goes on to place batches in the parts.

#pragma once

#include "engine/mark.h"

#include "llama-memory.h"

#include <map>

namespace laprox {

class cache;

class whole_memory final : public llama_memory_i {
public:
    // parts: the memory that kv is, or is in; both must outlive this.
    whole_memory(llama_memory_i & parts, cache & kv) : parts(parts), kv(kv) {}

    cache & get_cache() const { return kv; }

    llama_memory_context_ptr init_batch(llama_batch_allocr & balloc, uint32_t n_ubatch, bool embd_all) override {
        return parts.init_batch(balloc, n_ubatch, embd_all);
    }
    llama_memory_context_ptr init_full() override { return parts.init_full(); }
    llama_memory_context_ptr init_update(llama_context * lctx, bool optimize) override { return parts.init_update(lctx, optimize); }

    bool get_can_shift() const override { return parts.get_can_shift(); }
    std::map<ggml_backend_buffer_type_t, size_t> memory_breakdown() const override { return parts.memory_breakdown(); }

    void clear(bool data) override;

    bool seq_rm  (llama_seq_id seq_id, llama_pos p0, llama_pos p1) override;
    void seq_cp  (llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) override;
    void seq_keep(llama_seq_id seq_id) override;
    void seq_add (llama_seq_id seq_id, llama_pos p0, llama_pos p1, llama_pos shift) override; // refused
    void seq_div (llama_seq_id seq_id, llama_pos p0, llama_pos p1, int d) override; // refused

    llama_pos seq_pos_min(llama_seq_id seq_id) const override;
    llama_pos seq_pos_max(llama_seq_id seq_id) const override;

    // A length and a checksum stand around what the parts write, unless flags ask for parts that stay in this process.
    // Both throw std::out_of_range if there is no such sequence. After another refusal the sequence, or all, is empty.
    void state_write(llama_io_write_i & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) const override;
    void state_read (llama_io_read_i  & io, llama_seq_id seq_id = -1, llama_state_seq_flags flags = 0) override;

    // What comes after this can be taken back, whatever the layers: a sequence has one such place, the latest.
    void set_mark(llama_seq_id seq_id);

    // p0, or the mark behind it where layers can't go back to p0.
    llama_pos way_back(llama_seq_id seq_id, llama_pos p0) const;

private:
    bool goes_back(llama_seq_id seq_id, llama_pos p0) const;
    bool take_back(llama_seq_id seq_id, const mark & before);
    bool loses_window(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const;
    void empty(llama_seq_id seq_id);

    llama_memory_i & parts;
    cache & kv;
    std::map<llama_seq_id, mark> marks; // what comes before them hasn't changed since
};

}
