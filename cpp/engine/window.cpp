#include "engine/window.h"

#include <algorithm>
#include <numeric>
#include <utility>

namespace laprox {

query_window::query_window(const std::vector<layer_info> & layers, int32_t n_observed, uint32_t n_slots) :
        rows(layers, "window", "the observation window of " + std::to_string(n_observed) + " queries", [&](ggml_context * ctx, const layer_info & layer) {
            return ggml_new_tensor_2d(ctx, GGML_TYPE_F32, (int64_t) layer.d_k*layer.n_head, n_slots);
        }),
        n_slots(n_slots), position(n_slots, -1) {
}

void query_window::clear() {
    position.assign(n_slots, -1);
}

void query_window::remove(llama_pos p0, llama_pos p1) {
    for (llama_pos & pos : position) {
        if (pos >= p0 && (p1 < 0 || pos < p1)) {
            pos = -1;
        }
    }
}

void query_window::copy(const query_window & from) {
    rows.copy(from.rows);
    position = from.position;
}

std::vector<uint32_t> query_window::take(const llama_pos * pos, size_t n) {
    std::vector<uint32_t> slots(n_slots);
    std::iota(slots.begin(), slots.end(), 0);
    std::stable_sort(slots.begin(), slots.end(), [&](uint32_t a, uint32_t b) { return position[a] < position[b]; });
    slots.resize(n);
    for (size_t i = 0; i < n; i++) {
        position[slots[i]] = pos[i];
    }
    return slots;
}

observed query_window::latest(size_t n) const {
    observed result;
    for (uint32_t slot = 0; slot < n_slots; slot++) {
        if (position[slot] >= 0) {
            result.slot.push_back(slot);
        }
    }
    std::sort(result.slot.begin(), result.slot.end(), [&](uint32_t a, uint32_t b) { return position[a] < position[b]; });
    if (result.slot.size() > n) {
        result.slot.erase(result.slot.begin(), result.slot.end() - n);
    }
    for (uint32_t slot : result.slot) {
        result.pos.push_back(position[slot]);
    }
    return result;
}

}
