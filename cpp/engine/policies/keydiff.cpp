// KeyDiff (arXiv 2504.15364): a key unlike the others carries what they don't.

#include "engine/policies/blocks.h"

namespace laprox::policies {

// -cos(k_i, mean of k/||k||)
static ggml_tensor * keydiff_graph(head_graph & g) {
    ggml_context * ctx = g.ctx();
    ggml_tensor * anchor = nullptr;
    const auto unit = [&](int64_t first, int64_t m) { return unit_rows(ctx, g.keys(first, m)); };
    g.in_runs(256, [&](int64_t first, int64_t m) {
        ggml_tensor * sum = ggml_sum_rows(ctx, ggml_cont(ctx, ggml_transpose(ctx, unit(first, m)))); // [1, d]
        anchor = plus(ctx, anchor, sum);
        return sum;
    });
    anchor = unit_rows(ctx, ggml_reshape_2d(ctx, anchor, anchor->ne[1], 1));
    return g.in_runs(256, [&](int64_t first, int64_t m) {
        ggml_tensor * cosine = ggml_sum_rows(ctx, ggml_mul(ctx, unit(first, m), anchor));
        return ggml_reshape_1d(ctx, ggml_scale(ctx, cosine, -1.0f), m);
    });
}

extern const scorer keydiff {
    .name  = "keydiff",
    .paper = "2504.15364",
    .graph = keydiff_graph,
};

}
