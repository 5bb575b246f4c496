// Running a small graph of ours on the context's scheduler, between batches.

#pragma once

#include "ggml.h"

#include <utility>
#include <vector>

struct llama_context;

namespace laprox {

class graph_runner {
public:
    // Waits for what the context still computes, and takes over its reserve graph.
    explicit graph_runner(llama_context & lctx);

    // An input whose data is copied when the graph runs; it must live until then.
    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1, const void * data);
    void output(ggml_tensor * t);

    // Throws std::runtime_error if there is no room or the computation is aborted.
    void run();

    ggml_context * ctx;
    ggml_cgraph  * gf;

private:
    llama_context & lctx;
    std::vector<std::pair<ggml_tensor *, const void *>> inputs;
};

}
