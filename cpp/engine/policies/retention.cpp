// Retention gates (DBTrimKV, arXiv 2605.09649): networks that say, when a token is created, how long it will matter; engine/gates.h.
// retention:uniform is TRIM-KV's form (2512.03324).

#include "engine/policies/blocks.h"

#include <cmath>

namespace laprox::policies {

static ggml_tensor * retention_graph(head_graph & g) {
    return g.gate_logits();
}

// log(beta^age) with beta = sigmoid(z). An age is at least 1. 1 - beta may be as small as 1e-8: no sigmoid in float32 here.
static float retention_at_age(float z, int64_t age) {
    const double log_beta = z > 0 ? -std::log1p(std::exp(-(double) z)) : (double) z - std::log1p(std::exp((double) z));
    return (float) ((double) age*log_beta);
}

extern const scorer retention {
    .name      = "retention",
    .paper     = "2605.09649",
    .allocator = "global-raw",
    .needs     = need::gates,
    .graph     = retention_graph,
    .at_age    = retention_at_age,
};

}
