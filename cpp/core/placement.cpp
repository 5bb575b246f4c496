#include "core/placement.h"

namespace laprox {

std::string reason_misplaced(const std::vector<attention_place> & places) {
    for (const attention_place & p : places) {
        if (p.cache != p.attention) {
            return "flash attention isn't supported on " + p.cache + " for this model (layer " + std::to_string(p.layer) + ", head size " +
                std::to_string(p.head_size) + "): it would run on " + p.attention +
                "; accepted: policy off, or the cache where attention runs (offload_kqv off, --no-kv-offload)";
        }
    }
    return "";
}

}
