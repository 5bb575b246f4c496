#include "bindings.h"

namespace laprox_python {

// Long calls give up the GIL: the engine's threads may log, and llama_cpp logs through Python.
void register_context(py::module_ & m) {
    m.def("compress", [](uintptr_t ctx, llama_seq_id seq_id) {
        py::gil_scoped_release unlock;
        require(laprox_compress(context_at(ctx), seq_id));
    }, py::arg("ctx"), py::arg("seq_id") = 0);

    m.def("score", [](uintptr_t ctx, llama_seq_id seq_id) {
        py::gil_scoped_release unlock;
        require(laprox_score(context_at(ctx), seq_id));
    }, py::arg("ctx"), py::arg("seq_id") = 0);

    m.def("stats", [](uintptr_t ctx, llama_seq_id seq_id) {
        laprox_stats s;
        require(laprox_get_stats(context_at(ctx), seq_id, &s));
        py::dict result;
        result["tokens_seen"]     = s.tokens_seen;
        result["entries_held"]    = s.entries_held;
        result["entries_full"]    = s.entries_full;
        result["kv_bytes"]        = s.kv_bytes;
        result["kv_bytes_full"]   = s.kv_bytes_full;
        result["window_bytes"]    = s.window_bytes;
        result["compressions"]    = s.compressions;
        result["score_seconds"]   = s.score_seconds;
        result["select_seconds"]  = s.select_seconds;
        result["compact_seconds"] = s.compact_seconds;
        return result;
    }, py::arg("ctx"), py::arg("seq_id") = 0);
}

}
