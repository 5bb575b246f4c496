// KNorm (arXiv 2406.11430): a small key attracts attention.

#include "engine/policies/blocks.h"

namespace laprox::policies {

static ggml_tensor * knorm_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    return g.in_runs(64, [&](int64_t first, int64_t m) {
        ggml_tensor * squares = ggml_sum_rows(ctx, ggml_sqr(ctx, g.keys(first, m)));
        return ggml_reshape_1d(ctx, ggml_scale(ctx, ggml_sqrt(ctx, squares), -1.0f), m);
    });
}

extern const scorer knorm {
    .name  = "knorm",
    .paper = "2406.11430",
    .graph = knorm_graph,
};

}
