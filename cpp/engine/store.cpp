#include "engine/store.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <string>

namespace laprox {

// GPU attention kernels want the key axis in multiples of 256. Storage need not be padded that far: a view may
// begin in the rows of the head before, whose values are masked.
static uint32_t view_block(const layer_info & layer) {
    return ggml_backend_buft_is_host(layer.buft) ? 1 : 256;
}

static const uint32_t store_block = 8;

struct row_plan {
    std::vector<store_class> classes;
    size_t n_rows;
};

static row_plan plan_rows(const layer_info & layer, const std::vector<uint32_t> & n_kept, uint32_t n_tail) {
    row_plan plan {};
    // Two heads are cheaper as two calls than as one with a gather.
    const uint32_t max_classes = layer.n_head_kv <= 2 ? layer.n_head_kv : 3;
    size_t row = 0;
    for (auto & planned : plan_classes(n_kept, max_classes, store_block)) {
        store_class cls { planned, (uint32_t) GGML_PAD(planned.n_rows, view_block(layer)), 0, 0 };
        // views reach back by n_back; the first run has no neighbour to reach into
        const size_t n_back = cls.n_view - planned.n_rows;
        cls.row0   = GGML_PAD(std::max(row, n_back) - n_back, start_block(layer)) + n_back;
        cls.stride = planned.n_rows + n_tail;
        row = cls.row0 + cls.stride*planned.heads.size();
        plan.classes.push_back(std::move(cls));
    }
    plan.n_rows = row;
    return plan;
}

// The most that a device asks for: Vulkan's minStorageBufferOffsetAlignment is at most this.
static const size_t alignment = 256;

bool is_aligned(const ggml_tensor * view) {
    return view->view_offs % alignment == 0;
}

size_t start_block(const layer_info & layer) {
    if (ggml_backend_buft_is_host(layer.buft)) {
        return 1;
    }
    const auto rows = [](ggml_type type, uint32_t d) { return alignment/std::gcd(alignment, ggml_row_size(type, d)); };
    return std::max(rows(layer.type_k, layer.d_k), rows(layer.type_v, layer.d_v));
}

size_t layer_store::bytes_for(const layer_info & layer, const std::vector<uint32_t> & n_kept, uint32_t n_tail) {
    const row_plan plan = plan_rows(layer, n_kept, n_tail);
    size_t bytes = plan.n_rows*layer.row_bytes();
    for (const auto & cls : plan.classes) {
        bytes += cls.n_view*cls.plan.heads.size()*sizeof(ggml_fp16_t);
    }
    // alignment of each tensor, and the head orders
    return bytes + (plan.classes.size() + 5)*256 + 2*layer.n_head_kv*sizeof(int32_t);
}

layer_store::layer_store(const layer_info & layer, positions kept_positions, uint32_t n_tail, head_bias biases) :
        n_tail(n_tail), kept(std::move(kept_positions)), bias(std::move(biases)), tail_rows(layer.n_head_kv) {
    row_plan plan = plan_rows(layer, n_kept(), n_tail);
    classes = std::move(plan.classes);

    ggml_init_params params { 16*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true };
    ctx.reset(ggml_init(params));

    k = ggml_new_tensor_2d(ctx.get(), layer.type_k, layer.d_k, plan.n_rows);
    v = ggml_new_tensor_2d(ctx.get(), layer.type_v, layer.d_v, plan.n_rows);
    pools = { k, v };
    if (layer.gated) {
        z = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, 1, plan.n_rows);
        pools.push_back(z);
    }
    ggml_format_name(k, "laprox_k_l%u", layer.il);
    ggml_format_name(v, "laprox_v_l%u", layer.il);

    for (auto & cls : classes) {
        const uint32_t n = cls.plan.heads.size();
        if (cls.n_view > 0) {
            const auto as_first = [&](uint32_t head) { return n_kept(head) == n_kept(cls.plan.heads.front()); };
            const bool equal = bias.value.empty() && std::all_of(cls.plan.heads.begin(), cls.plan.heads.end(), as_first);
            cls.kept_mask = ggml_new_tensor_4d(ctx.get(), GGML_TYPE_F16, cls.n_view, 1, 1, equal ? 1 : n);
        }
        for (uint32_t i = 0; i < n; i++) {
            tail_rows[cls.plan.heads[i]] = cls.row0 + i*cls.stride + cls.plan.n_rows;
        }
    }
    std::vector<length_class> plans;
    for (const auto & cls : classes) {
        plans.push_back(cls.plan);
    }
    if (!in_head_order(plans)) {
        order   = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, layer.n_head_kv);
        inverse = ggml_new_tensor_1d(ctx.get(), GGML_TYPE_I32, layer.n_head_kv);
    }

    buffer.reset(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), layer.buft));
    if (!buffer) {
        throw std::runtime_error("no room on " + std::string(ggml_backend_buft_name(layer.buft)) + " for " +
                std::to_string((ggml_nbytes(k) + ggml_nbytes(v)) >> 20) + " MiB of KV cache (layer " +
                std::to_string(layer.il) + ")");
    }
    zero();
}

void layer_store::zero() {
    ggml_backend_buffer_clear(buffer.get(), 0);
    set_masks();
    if (order) {
        std::vector<int32_t> heads, back(kept.size());
        for (const auto & cls : classes) {
            for (uint32_t head : cls.plan.heads) {
                back[head] = (int32_t) heads.size();
                heads.push_back((int32_t) head);
            }
        }
        ggml_backend_tensor_set(order,   heads.data(), 0, ggml_nbytes(order));
        ggml_backend_tensor_set(inverse, back.data(),  0, ggml_nbytes(inverse));
    }
}

void layer_store::set_masks() {
    for (auto & cls : classes) {
        if (!cls.kept_mask) {
            continue;
        }
        std::vector<ggml_fp16_t> mask;
        for (int64_t i = 0; i < cls.kept_mask->ne[3]; i++) {
            const uint32_t head = cls.plan.heads[i];
            mask.insert(mask.end(), cls.n_view - n_kept(head), ggml_fp32_to_fp16(-INFINITY));
            for (llama_pos pos : kept[head]) {
                mask.push_back(ggml_fp32_to_fp16(bias.at(head, pos)));
            }
        }
        ggml_backend_tensor_set(cls.kept_mask, mask.data(), 0, ggml_nbytes(cls.kept_mask));
    }
}

void layer_store::copy_rows(const layer_store & from) {
    std::vector<uint8_t> rows;
    for (size_t i = 0; i < pools.size(); i++) {
        if (from.tail_rows == tail_rows && ggml_are_same_shape(from.pools[i], pools[i])) {
            ggml_backend_tensor_copy(from.pools[i], pools[i]);
            continue;
        }
        const size_t size = pools[i]->nb[1];
        for (uint32_t head = 0; head < kept.size(); head++) {
            rows.resize((n_kept(head) + n_tail)*size);
            ggml_backend_tensor_get(from.pools[i], rows.data(), from.held_row(head)*size, rows.size());
            ggml_backend_tensor_set(pools[i], rows.data(), held_row(head)*size, rows.size());
        }
    }
}

void layer_store::set_bias(head_bias b) {
    bias = std::move(b);
    set_masks();
}

void layer_store::drop_kept() {
    if (std::any_of(kept.begin(), kept.end(), [](const auto & pos) { return !pos.empty(); })) {
        kept.assign(kept.size(), {});
        set_masks();
    }
}

std::vector<uint32_t> layer_store::n_kept() const {
    std::vector<uint32_t> result;
    for (const auto & pos : kept) {
        result.push_back(pos.size());
    }
    return result;
}

std::vector<llama_pos> layer_store::positions_of(uint32_t head, const tail_view & tail) const {
    std::vector<llama_pos> result;
    result.reserve(n_kept(head) + tail.pos.size());
    result.insert(result.end(), kept[head].begin(), kept[head].end());
    result.insert(result.end(), tail.pos.begin(), tail.pos.end());
    return result;
}

std::vector<uint32_t> layer_store::rows_of(uint32_t head, const tail_view & tail) const {
    std::vector<uint32_t> result(n_kept(head) + tail.cell.size());
    for (size_t entry = 0; entry < result.size(); entry++) {
        result[entry] = row_of(head, entry, tail);
    }
    return result;
}

layer_tensors::layer_tensors(const std::vector<layer_info> & layers, const char * name, const std::string & what, const make & tensor) {
    for (const layer_info & layer : layers) {
        ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true }) };
        tensors.push_back(tensor(ctx.get(), layer));
        ggml_format_name(tensors.back(), "laprox_%s_l%u", name, layer.il);
        ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), layer.buft) };
        if (!buffer) {
            throw std::runtime_error("no room on " + std::string(ggml_backend_buft_name(layer.buft)) + " for " + what);
        }
        ggml_backend_buffer_clear(buffer.get(), 0);
        buffers.emplace_back(std::move(ctx), std::move(buffer));
    }
}

void layer_tensors::clear() {
    for (auto & [ctx, buffer] : buffers) {
        ggml_backend_buffer_clear(buffer.get(), 0);
    }
}

void layer_tensors::copy(const layer_tensors & from) {
    for (size_t ikv = 0; ikv < tensors.size(); ikv++) {
        ggml_backend_tensor_copy(from[ikv], tensors[ikv]);
    }
}

}
