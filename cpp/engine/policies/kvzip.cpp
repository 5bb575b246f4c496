// KVzip (arXiv 2505.23416): the most that any query ever looked at an entry. Its queries are those of the model as it repeats the
// text (laprox_probe); without such a probe, those of the observation window.

#include "engine/policies/blocks.h"

namespace laprox::policies {

// Maximum over queries and group.
static ggml_tensor * kvzip_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * best = nullptr;
    g.attention([&](ggml_tensor * a, int64_t, int64_t) {
        ggml_tensor * most = max_heads(ctx, max_dim1(ctx, a));
        best = best ? max_of(ctx, best, most) : most;
    });
    return best;
}

extern const scorer kvzip {
    .name      = "kvzip",
    .paper     = "2505.23416",
    .allocator = "global-raw",
    .needs     = need::window,
    .graph     = kvzip_graph,
};

}
