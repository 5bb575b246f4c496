// Running small graphs of ours between batches.

#pragma once

#include "ggml-cpp.h"

#include <cstdint>
#include <utility>
#include <vector>

struct llama_context;

namespace laprox {

// Where they run: the context's backends, with a scheduler of its own, so that the scratch memory of a compression
// is given back when it is done and the context's graphs stay as they were reserved.
class workbench {
public:
    // Waits for what the context still computes.
    explicit workbench(llama_context & lctx);

    llama_context & lctx;
    ggml_backend_sched_ptr sched;

    // what it cost so far
    int64_t n_graphs = 0;
    size_t  bytes_in = 0; // of inputs
    size_t  bytes_out = 0; // of results

    // of the layer at hand, see output_rows()
    std::vector<float> projection;
    int32_t projection_layer = -1;

    // of the layer at hand, see expect_queries()
    std::vector<float> rotated_units;
    int32_t rotated_layer = -1;
};

class graph_runner {
public:
    explicit graph_runner(workbench & bench);

    // An input whose data is copied when the graph runs; it must live until then. The same data again is the same tensor.
    ggml_tensor * input(ggml_type type, int64_t ne0, int64_t ne1, const void * data);
    void output(ggml_tensor * t);

    // Whether it is to grow: one more head's part then fits, whatever the scorer.
    bool has_room() const;

    // Throws std::runtime_error if there is no room or the computation is aborted.
    void run();
    // Float32 outputs, when it has run.
    std::vector<std::vector<float>> read(const std::vector<ggml_tensor *> & results);

    workbench & bench;

private:
    ggml_context_ptr owner;
    std::vector<std::pair<ggml_tensor *, const void *>> inputs;
    size_t input_bytes = 0;

public:
    ggml_context * const ctx;
    ggml_cgraph  * const gf;
};

}
