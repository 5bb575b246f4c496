#include "engine/graph.h"

#include "llama-context.h"
#include "llama-cparams.h"

#include <stdexcept>
#include <string>

namespace laprox {

static const size_t head_nodes = 8192; // the longest: 64 runs of the projection of a group of 8, 128 blocks of R-KV
// From here on another graph is begun: most heads take less than a hundred nodes, but any may take all that one can.
static const size_t full_nodes = 2048;
static const size_t full_bytes = 64u << 20; // of inputs

static const size_t max_nodes = full_nodes + head_nodes;

workbench::workbench(llama_context & lctx) : lctx(lctx) {
    lctx.synchronize();
    std::vector<ggml_backend_t>             backends;
    std::vector<ggml_backend_buffer_type_t> types;
    ggml_backend_sched_t of_context = lctx.get_sched();
    for (int i = 0; i < ggml_backend_sched_get_n_backends(of_context); i++) {
        backends.push_back(ggml_backend_sched_get_backend(of_context, i));
        types.push_back(ggml_backend_sched_get_buffer_type(of_context, backends.back()));

        // as for a prompt: the last batch may have left the threads of a single token
        ggml_backend_reg_t reg = ggml_backend_dev_backend_reg(ggml_backend_get_device(backends.back()));
        auto set_n_threads = (ggml_backend_set_n_threads_t) ggml_backend_reg_get_proc_address(reg, "ggml_backend_set_n_threads");
        if (set_n_threads) {
            set_n_threads(backends.back(), lctx.n_threads_batch());
        }
    }
    sched.reset(ggml_backend_sched_new(backends.data(), types.data(), (int) backends.size(), max_nodes, /*parallel =*/ false,
            lctx.get_cparams().op_offload));
}

graph_runner::graph_runner(workbench & bench) : bench(bench),
        owner(ggml_init({ max_nodes*ggml_tensor_overhead() + ggml_graph_overhead_custom(max_nodes, false), nullptr, /*.no_alloc =*/ true })),
        ctx(owner.get()), gf(ggml_new_graph_custom(ctx, max_nodes, false)) {
}

ggml_tensor * graph_runner::input(ggml_type type, int64_t ne0, int64_t ne1, const void * data) {
    for (const auto & [t, known] : inputs) {
        if (known == data && t->type == type && t->ne[0] == ne0 && t->ne[1] == ne1) {
            return t;
        }
    }
    ggml_tensor * t = ggml_new_tensor_2d(ctx, type, ne0, ne1);
    ggml_set_input(t);
    inputs.emplace_back(t, data);
    input_bytes += ggml_nbytes(t);
    return t;
}

bool graph_runner::has_room() const {
    const size_t n_left = (ggml_get_mem_size(ctx) - ggml_used_mem(ctx))/ggml_tensor_overhead(); // leaves and views are tensors, too
    return n_left >= head_nodes && ggml_graph_n_nodes(gf) <= (int) full_nodes && input_bytes <= full_bytes;
}

void graph_runner::output(ggml_tensor * t) {
    ggml_set_output(t);
    ggml_build_forward_expand(gf, t);
}

void graph_runner::run() {
    ggml_backend_sched_t sched = bench.sched.get();
    ggml_backend_sched_reset(sched);
    if (!ggml_backend_sched_alloc_graph(sched, gf)) {
        throw std::runtime_error("no room on the device for the work of a compression");
    }
    for (const auto & [t, data] : inputs) {
        if (t->buffer) { // the allocator leaves inputs out that nothing reads
            ggml_backend_tensor_set(t, data, 0, ggml_nbytes(t));
            bench.bytes_in += ggml_nbytes(t);
        }
    }
    bench.n_graphs++;
    const ggml_status status = ggml_backend_sched_graph_compute(sched, gf);
    if (status == GGML_STATUS_ABORTED) {
        throw std::runtime_error("the compression was aborted");
    }
    if (status != GGML_STATUS_SUCCESS) {
        throw std::runtime_error(std::string("the work of a compression failed: ") + ggml_status_to_string(status));
    }
}

std::vector<std::vector<float>> graph_runner::read(const std::vector<ggml_tensor *> & results) {
    std::vector<std::vector<float>> data;
    for (ggml_tensor * t : results) {
        data.emplace_back(ggml_nelements(t));
        bench.bytes_out += ggml_nbytes(t);
        ggml_backend_tensor_get_async(ggml_backend_sched_get_tensor_backend(bench.sched.get(), t), t, data.back().data(), 0, ggml_nbytes(t));
    }
    ggml_backend_sched_synchronize(bench.sched.get()); // once for all
    return data;
}

}
