#include "engine/graph.h"

#include "llama-context.h"
#include "llama-graph.h"

#include <stdexcept>

namespace laprox {

graph_runner::graph_runner(llama_context & lctx) : lctx(lctx) {
    lctx.synchronize();
    auto * res = lctx.get_gf_res_reserve();
    res->reset();
    ctx = res->get_ctx();
    gf  = res->get_gf();
}

ggml_tensor * graph_runner::input(ggml_type type, int64_t ne0, int64_t ne1, const void * data) {
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    inputs.emplace_back(t, data);
    return t;
}

void graph_runner::output(ggml_tensor * t) {
    ggml_set_output(t);
    ggml_build_forward_expand(gf, t);
}

void graph_runner::run() {
    ggml_backend_sched_t sched = lctx.get_sched();
    ggml_backend_sched_reset(sched);
    if (!ggml_backend_sched_alloc_graph(sched, gf)) {
        throw std::runtime_error("no room on the device for the work of a compression");
    }
    for (const auto & [t, data] : inputs) {
        if (t->buffer) { // the allocator leaves inputs out that nothing reads
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
        }
    }
    const ggml_status status = lctx.graph_compute(gf, /*batched =*/ true);
    lctx.synchronize();
    if (status == GGML_STATUS_ABORTED) {
        throw std::runtime_error("the compression was aborted");
    }
    if (status != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(std::string("the work of a compression failed: ") + ggml_status_to_string(status));
    }
}

}
