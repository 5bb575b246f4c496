// Storage of one layer for one sequence: a pool of K rows and one of V rows, head-major.
//
// Each KV head owns one contiguous run of rows, [padding | kept | tail]:
//   kept     entries that survived a compression, in ascending position
//   tail     one row per llama.cpp cell, the recent tokens that every head still has
//   padding  up to the length of the longest head of its class, masked by `kept_mask`
// Heads of a class have equally long runs, so that one ggml_flash_attn_ext call reads them all. The unused cells of the tail come last, where CUDA's kernels can skip them, and a cache
// that nothing was evicted from has the row order of llama.cpp's own, hence its exact results.

#pragma once

#include "core/classes.h"

#include "ggml-cpp.h"
#include "llama.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace laprox {

struct layer_info {
    uint32_t il;
    uint32_t n_head;
    uint32_t n_head_kv;
    uint32_t d_k; // head sizes
    uint32_t d_v;
    ggml_type type_k;
    ggml_type type_v;
    bool gated; // retention gates write a number per entry
    ggml_backend_buffer_type_t buft;

    uint32_t n_gqa() const { return n_head/n_head_kv; }
    size_t kv_row_bytes() const { return ggml_row_size(type_k, d_k) + ggml_row_size(type_v, d_v); }
    size_t row_bytes()    const { return kv_row_bytes() + (gated ? sizeof(float) : 0); }
};

// Whether a view begins where a tensor of its own could, on any device: attention on Vulkan needs that, and other operations there
// find the blocks of a quantised type nowhere else.
bool is_aligned(const ggml_tensor * view);

// A view of a layer's pools is aligned where its first row is a multiple of this, a power of two. 1 in host memory, from which devices
// get copies.
size_t start_block(const layer_info & layer);

struct store_class {
    length_class plan;
    uint32_t n_view;  // masked rows in front of the tail that attention reads; at least plan.n_rows
    size_t   row0;    // where the first head's run begins
    size_t   stride;  // rows from one head's run to the next
    // F16 [n_view, 1, 1, n_heads], or with 1 in place of n_heads where they have equally many rows and no biases: -inf on padding; null
    // if nothing is kept
    ggml_tensor * kept_mask = nullptr;
};

// The tokens of a tail in ascending position.
struct tail_view {
    std::vector<uint32_t>  cell;
    std::vector<llama_pos> pos;
};

// What is added to the q k^T of a KV head's kept entries from a position on, for the attention that evicted ones had.
struct head_bias {
    std::vector<float> value = {}; // [head]; empty: none has any
    llama_pos from = 0;

    float of(uint32_t head) const { return value.empty() ? 0.0f : value[head]; }
    float at(uint32_t head, llama_pos pos) const { return pos < from ? 0.0f : of(head); }
};

class layer_store {
public:
    using positions = std::vector<std::vector<llama_pos>>; // [head]

    // Empty until filled. Throws std::runtime_error when the device has no room.
    layer_store(const layer_info & layer, positions kept, uint32_t n_tail, head_bias bias = {});

    // Bytes that such a store takes, without allocating it (alignment aside).
    static size_t bytes_for(const layer_info & layer, const std::vector<uint32_t> & n_kept, uint32_t n_tail);

    size_t bytes() const { return buffer ? ggml_backend_buffer_get_size(buffer.get()) : 0; }

    uint32_t n_kept(uint32_t head) const { return kept[head].size(); }
    std::vector<uint32_t> n_kept() const; // by head

    // First row of the tail of a KV head; its kept rows are the n_kept(head) rows before.
    size_t tail_row(uint32_t head) const { return tail_rows[head]; }
    size_t held_row(uint32_t head) const { return tail_rows[head] - n_kept(head); }

    // The entries of a KV head in ascending position, those of the tail last: where they are in the text, and their rows, relative
    // to held_row().
    std::vector<llama_pos> positions_of(uint32_t head, const tail_view & tail) const;
    std::vector<uint32_t> rows_of(uint32_t head, const tail_view & tail) const;
    uint32_t row_of(uint32_t head, size_t entry, const tail_view & tail) const {
        return entry < n_kept(head) ? entry : n_kept(head) + tail.cell[entry - n_kept(head)];
    }

    // Those of a store that holds the same; where something was dropped from it, its rows may be elsewhere.
    void copy_rows(const layer_store & from);

    // Nothing is kept any more: the rows stay where they are, masked. Can't fail.
    void drop_kept();

    // All rows are 0. Devices read masked rows, too, which must not be other than numbers. What they compute must have ended.
    void zero();

    // Of a store that was made with biases.
    void set_bias(head_bias b);

    const uint32_t n_tail;
    positions kept; // ascending, of the rows before the tail
    head_bias bias;

    ggml_tensor * k = nullptr; // [d_k, n_rows]
    ggml_tensor * v = nullptr; // [d_v, n_rows]
    ggml_tensor * z = nullptr; // F32 [1, n_rows]: what the gates said; null without them
    std::vector<ggml_tensor *> pools; // all of these that there are

    std::vector<store_class> classes;

    // KV heads in the order of the classes, and back; null where that is the natural order
    ggml_tensor * order   = nullptr; // I32 [n_head_kv]
    ggml_tensor * inverse = nullptr; // I32 [n_head_kv]

private:
    void set_masks();

    std::vector<size_t> tail_rows;

    ggml_context_ptr        ctx;
    ggml_backend_buffer_ptr buffer;
};

// One tensor per layer, where the layer's cache is; zeros at first.
class layer_tensors {
public:
    using make = std::function<ggml_tensor * (ggml_context * ctx, const layer_info & layer)>;

    // Throws std::runtime_error where a device has no room for `what` they are.
    layer_tensors(const std::vector<layer_info> & layers, const char * name, const std::string & what, const make & tensor);

    ggml_tensor * operator[](size_t ikv) const { return tensors[ikv]; }
    size_t size() const { return tensors.size(); }
    void clear();
    void copy(const layer_tensors & from);
    size_t bytes(size_t ikv) const { return ggml_backend_buffer_get_size(buffers[ikv].second.get()); }

private:
    std::vector<ggml_tensor *> tensors;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;
};

}
