// What leaves a sequence's tail goes to its archive, and what is lost where that has no room.

#include "engine/sequence.h"

#include "llama-impl.h"

#include <algorithm>

namespace laprox {

// Tokens that the fewest heads hold now, the oldest first, are lost; those of `gone` that aren't are left. An eighth stays free, so
// that this isn't done each time. Throws archive_full where there would be little more to choose from than what is held, or where
// it isn't its limit that is reached.
absorbed sequence::make_archive_room(const absorbed & gone, const std::vector<std::unique_ptr<layer_store>> & fresh,
        const archive_full & why) {
    std::vector<llama_pos> pos = archived.pos();
    pos.insert(pos.end(), gone.pos.begin(), gone.pos.end());
    const size_t capacity = archived.capacity(*shared.space)/8*7;
    std::vector<int32_t> holders(pos.size());
    int64_t n_held = 0;
    for (const auto & store : fresh) {
        for (const auto & held : store->kept) {
            n_held += held.size();
            for (size_t i = 0, j = 0; i < pos.size(); i++) {
                j += std::lower_bound(held.begin() + j, held.end(), pos[i]) - (held.begin() + j);
                holders[i] += j < held.size() && held[j] == pos[i];
            }
        }
    }
    if (capacity >= pos.size() || (int64_t) capacity*shared.n_pairs < 2*n_held) {
        throw why;
    }
    std::vector<size_t> order;
    for (size_t i = 0; i < pos.size(); i++) {
        if (!is_protected(pos[i])) {
            order.push_back(i);
        }
    }
    const size_t n_lost = std::min(order.size(), pos.size() - capacity);
    const auto goes_first = [&](size_t a, size_t b) { return std::pair(holders[a], a) < std::pair(holders[b], b); };
    std::nth_element(order.begin(), order.begin() + n_lost, order.end(), goes_first);
    std::vector<bool> stays(pos.size(), true);
    for (size_t i = 0; i < n_lost; i++) {
        stays[order[i]] = false;
    }
    const size_t n_before = archived.pos().size();
    archived.keep(std::vector<bool>(stays.begin(), stays.begin() + n_before));
    absorbed left, lost;
    for (size_t i = 0; i < gone.pos.size(); i++) {
        absorbed & part = stays[n_before + i] ? left : lost;
        part.cell.push_back(gone.cell[i]);
        part.pos.push_back(gone.pos[i]);
    }
    archived.add_lost(lost.pos);
    LLAMA_LOG_WARN("laprox: archive_limit is reached: %zu of the %zu tokens that left sequence %u's tail, which the fewest heads hold, "
            "are gone for good\n", archived.lost().size(), archived.n_seen() + left.pos.size(), id);
    return left;
}

void sequence::store_away(const absorbed & gone, const std::vector<std::unique_ptr<layer_store>> & fresh) {
    if (!shared.space || (int64_t) archived.n_seen() != n_gone) {
        return;
    }
    if (config().recall == 0 || !config().policy.recalls()) { // not all of it would be of no use
        archived.clear();
        return;
    }
    std::vector<uint8_t> run;
    const uint32_t n = *std::max_element(gone.cell.begin(), gone.cell.end()) + 1;
    const auto add = [&](const absorbed & some) {
        archived.add(shared.space, some.pos, [&](size_t ikv, size_t pool, uint32_t head, uint8_t * rows, size_t) {
            const ggml_tensor * from = stores[ikv]->pools[pool];
            const size_t size = from->nb[1];
            run.resize(n*size);
            ggml_backend_tensor_get(from, run.data(), stores[ikv]->tail_row(head)*size, run.size());
            for (uint32_t cell : some.cell) {
                rows = std::copy_n(run.data() + cell*size, size, rows);
            }
        });
    };
    try {
        try {
            add(gone);
        } catch (const archive_full & e) {
            const absorbed left = make_archive_room(gone, fresh, e);
            if (!left.pos.empty()) {
                add(left);
            }
        }
    } catch (const std::exception & e) {
        LLAMA_LOG_WARN("laprox: what was and will be evicted from sequence %u can't come back: %s\n", id, e.what());
        archived.clear();
    }
}

}
