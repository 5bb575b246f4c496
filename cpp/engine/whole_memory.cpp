#include "engine/whole_memory.h"
#include "engine/cache.h"
#include "engine/error.h"
#include "engine/state_io.h"

#include "llama-impl.h"
#include "llama-kv-cache-iswa.h"
#include "llama-memory-hybrid-iswa.h"
#include "llama-memory-hybrid.h"

#include <algorithm>
#include <stdexcept>

namespace laprox {

static void refuse_call(const char * function, const std::string & reason) {
    LLAMA_LOG_ERROR("%s: %s\n", function, reason.c_str());
    set_last_error(reason);
}

//
// sequences
//

// Whether text that continued after a cut would miss tokens in the layers with a sliding window, which have let go of
// them since.
bool whole_memory::loses_window(llama_seq_id seq_id, llama_pos p0, llama_pos p1) const {
    auto * hybrid = dynamic_cast<const llama_memory_hybrid_iswa *>(&parts);
    auto * iswa   = hybrid ? hybrid->get_mem_attn() : dynamic_cast<const llama_kv_cache_iswa *>(&parts);
    const llama_pos last = kv.seq_pos_max(seq_id);
    if (!iswa || kv.at(seq_id).covers(p0, p1) || p0 > last || (p1 >= 0 && p1 <= last)) {
        return false;
    }
    const llama_pos next  = kv.at(seq_id).next_before(p0);
    const llama_pos first = iswa->get_swa()->seq_pos_min(seq_id);
    return kv.misses(seq_id, first < 0 || first >= next ? next - 1 : first - 1, next);
}

static bool has_recurrent(const llama_memory_i & parts) {
    return dynamic_cast<const llama_memory_hybrid *>(&parts) || dynamic_cast<const llama_memory_hybrid_iswa *>(&parts);
}

// Whether all layers can let go of what comes from here on, and have what is before.
bool whole_memory::goes_back(llama_seq_id seq_id, llama_pos p0) const {
    return p0 > kv.seq_pos_max(seq_id) || (!has_recurrent(parts) && !loses_window(seq_id, p0, -1));
}

llama_pos whole_memory::way_back(llama_seq_id seq_id, llama_pos p0) const {
    const auto found = marks.find(seq_id);
    return found == marks.end() || found->second.pos() < p0 || goes_back(seq_id, p0) ? p0 : found->second.pos();
}

void whole_memory::set_mark(llama_seq_id seq_id) {
    kv.at(seq_id); // throws if there is no such sequence
    marks.erase(seq_id);
    if (has_recurrent(parts) || dynamic_cast<const llama_kv_cache_iswa *>(&parts)) {
        kv.synchronize();
        marks.emplace(seq_id, mark(parts, seq_id));
    }
}

// All that came after a mark.
bool whole_memory::take_back(llama_seq_id seq_id, const mark & before) {
    try {
        kv.synchronize();
        before.restore(parts, seq_id);
        if (parts.seq_rm(seq_id, before.pos(), -1)) {
            return true;
        }
        const std::string why = last_error();
        empty(seq_id); // what went back doesn't fit what didn't
        set_last_error(why);
        return false;
    } catch (const std::exception & e) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, e.what());
        empty(seq_id);
        set_last_error(e.what());
        return false;
    }
}

void whole_memory::clear(bool data) {
    marks.clear();
    parts.clear(data);
}

bool whole_memory::seq_rm(llama_seq_id seq_id, llama_pos p0, llama_pos p1) {
    if (seq_id >= 0 && !kv.has_sequence(seq_id)) {
        return true;
    }
    seq_id = std::max(seq_id, -1); // any negative number means all sequences
    // the parts are asked one by one: those that may refuse, first
    bool removed = kv.can_remove(seq_id, p0, p1);
    const auto marked = marks.find(seq_id);
    if (removed && marked != marks.end() && marked->second.pos() == p0 && (p1 < 0 || p1 > kv.seq_pos_max(seq_id)) && !goes_back(seq_id, p0)) {
        return take_back(seq_id, marked->second);
    }
    for (llama_seq_id seq = 0; removed && kv.has_sequence(seq); seq++) {
        if (seq_id < 0 || seq == seq_id) {
            removed = !loses_window(seq, p0, p1);
        }
    }
    if (removed) {
        removed = parts.seq_rm(seq_id, p0, p1);
        for (auto it = marks.begin(); removed && it != marks.end();) {
            const bool changed = (seq_id < 0 || it->first == seq_id) && p0 < it->second.pos() && (p1 < 0 || p1 > p0);
            it = changed ? marks.erase(it) : std::next(it);
        }
        // a part that was asked before the one that had no room has let go: better none of it than parts that don't fit
        for (llama_seq_id seq = 0; !removed && kv.has_sequence(seq); seq++) {
            if ((seq_id < 0 || seq == seq_id) && parts.seq_pos_max(seq) != kv.seq_pos_max(seq)) {
                parts.seq_rm(seq, -1, -1);
            }
        }
    }
    return removed;
}

void whole_memory::seq_cp(llama_seq_id src, llama_seq_id dst, llama_pos p0, llama_pos p1) {
    if (!kv.has_sequence(src) || !kv.has_sequence(dst)) {
        refuse_call("llama_memory_seq_cp", "sequence " + std::to_string(kv.has_sequence(src) ? dst : src) + " doesn't exist; accepted: 0 to " +
                std::to_string(kv.n_sequences() - 1));
    } else if (!kv.at(src).covers(p0, p1)) {
        refuse_call("llama_memory_seq_cp", "the compressing cache can only copy whole sequences");
    } else if (src != dst) {
        marks.erase(dst);
        parts.seq_rm(dst, -1, -1); // a cache that sequences share would add to what it holds
        parts.seq_cp(src, dst, -1, -1);
        if (kv.seq_pos_max(dst) != kv.seq_pos_max(src)) { // there was no room: no part of it is left
            parts.seq_rm(dst, -1, -1);
        }
    }
}

// The streams may stand for what the user asked for as one unified cache, in which everything else goes.
void whole_memory::seq_keep(llama_seq_id seq_id) {
    for (llama_seq_id other = 0; kv.has_sequence(other); other++) {
        if (other != seq_id) {
            marks.erase(other);
            parts.seq_rm(other, -1, -1);
        }
    }
}

void whole_memory::seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos) {
    refuse_call("llama_memory_seq_add", "the compressing cache can't shift positions");
}

void whole_memory::seq_div(llama_seq_id, llama_pos, llama_pos, int) {
    refuse_call("llama_memory_seq_div", "the compressing cache can't shift positions");
}

llama_pos whole_memory::seq_pos_min(llama_seq_id seq_id) const {
    // iSWA memories answer for their sliding window, which may reach back into the compressed part
    return kv.has_sequence(seq_id) ? std::max(parts.seq_pos_min(seq_id), kv.seq_pos_min(seq_id)) : -1;
}

llama_pos whole_memory::seq_pos_max(llama_seq_id seq_id) const {
    return kv.has_sequence(seq_id) ? parts.seq_pos_max(seq_id) : -1;
}

//
// states
//

void whole_memory::empty(llama_seq_id seq_id) {
    if (seq_id < 0) {
        clear(true);
    } else {
        marks.erase(seq_id);
        parts.seq_rm(seq_id, -1, -1);
    }
}

void whole_memory::state_write(llama_io_write_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) const {
    if (seq_id != -1) {
        kv.at(seq_id);
    }
    if (flags != 0) {
        parts.state_write(io, seq_id, flags);
        return;
    }
    framed_writer out(io);
    parts.state_write(out, seq_id, flags);
    out.finish();
}

void whole_memory::state_read(llama_io_read_i & io, llama_seq_id seq_id, llama_state_seq_flags flags) {
    if (seq_id != -1) {
        kv.at(seq_id);
    }
    if (flags != 0) {
        seq_id < 0 ? marks.clear() : (void) marks.erase(seq_id);
        parts.state_read(io, seq_id, flags);
        return;
    }
    try {
        framed_reader in(io);
        empty(seq_id); // llama.cpp's own caches leave what they hold where a state has nothing
        parts.state_read(in, seq_id, flags);
        in.finish();
        for (llama_seq_id seq = 0; kv.has_sequence(seq); seq++) {
            if ((seq_id < 0 || seq == seq_id) && parts.seq_pos_max(seq) != kv.seq_pos_max(seq)) {
                throw std::runtime_error("the saved state is damaged: its parts end at different positions, " +
                        std::to_string(parts.seq_pos_max(seq)) + " and " + std::to_string(kv.seq_pos_max(seq)));
            }
        }
    } catch (const std::exception & e) {
        empty(seq_id); // some parts keep what they have got
        set_last_error(e.what());
        throw;
    }
}

}
