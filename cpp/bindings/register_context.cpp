#include "held_log.h"

#include <algorithm>
#include <memory>

namespace laprox_python {

namespace {

// What a probe found, which Python keeps for another time.
struct found {
    std::unique_ptr<laprox_found, void (*)(laprox_found *)> what;
};

// `with Meanwhile():` a long call of llama.cpp that isn't made here.
struct meanwhile {
    std::unique_ptr<held_log> log;
};

// The engine calls this on the thread that compresses, which has given up the GIL. What goes wrong in Python is kept
// there (laprox.policy): nothing may be thrown through the engine.
bool call_scorer(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head, const llama_pos * pos, int64_t n,
                 float * score, void * scorer) {
    py::gil_scoped_acquire lock;
    try {
        const py::object result = py::handle(static_cast<PyObject *>(scorer))(
            reinterpret_cast<uintptr_t>(ctx), seq_id, il, head, py::array_t<llama_pos>(static_cast<py::ssize_t>(n), pos));
        if (result.is_none()) {
            return false;
        }
        const auto scores = result.cast<py::array_t<float, py::array::c_style>>();
        if (scores.size() != n) {
            return false;
        }
        std::copy_n(scores.data(), n, score);
        return true;
    } catch (py::error_already_set & error) { // a signal's, mostly, before the scorer could catch it
        if (!held_log::keep(error)) {
            error.discard_as_unraisable("laprox: a scorer");
        }
    } catch (const std::exception &) { // not an array
    }
    return false;
}

}

void register_context(py::module_ & m) {
    // For calls of llama.cpp that aren't ours.
    py::class_<meanwhile>(m, "Meanwhile")
        .def(py::init())
        .def("__enter__", [](meanwhile & m) { m.log = std::make_unique<held_log>(); })
        .def("__exit__", [](meanwhile & m, const py::args &) { std::exchange(m.log, nullptr)->tell(); });

    m.def("compress", [](uintptr_t ctx, llama_seq_id seq_id) {
        require_meanwhile([&, c = context_at(ctx)] { return laprox_compress(c, seq_id); });
    }, py::arg("ctx"), py::arg("seq_id") = 0);

    m.def("probe", [](uintptr_t ctx, llama_pos n_text, llama_pos n_prefix, llama_pos first, llama_pos last, int32_t every, int32_t stride,
                    llama_seq_id seq_id) {
        const laprox_look look { n_text, n_prefix, first, last, every, stride };
        require_meanwhile([&, c = context_at(ctx)] { return laprox_probe(c, seq_id, &look); });
    }, py::arg("ctx"), py::arg("n_text"), py::arg("n_prefix"), py::arg("first"), py::arg("last"), py::arg("every") = 0, py::arg("stride") = 0,
       py::arg("seq_id") = 0);

    py::class_<found>(m, "Found");
    m.def("probe_found", [](uintptr_t ctx, llama_seq_id seq_id) {
        found result { { laprox_probe_found(context_at(ctx), seq_id), laprox_found_free } };
        require(result.what != nullptr);
        return result;
    }, py::arg("ctx"), py::arg("seq_id") = 0);
    m.def("probe_again", [](uintptr_t ctx, const found & again, llama_seq_id seq_id) {
        require(laprox_probe_again(context_at(ctx), seq_id, again.what.get()));
    }, py::arg("ctx"), py::arg("found"), py::arg("seq_id") = 0);

    m.def("prompt_done", [](uintptr_t ctx, int32_t n_again, std::optional<llama_pos> before, llama_seq_id seq_id) -> std::optional<llama_pos> {
        llama_pos again = before.value_or(-1);
        require_meanwhile([&, c = context_at(ctx)] { return laprox_prompt_done(c, seq_id, n_again, &again); });
        return again >= 0 ? std::optional<llama_pos>(again) : std::nullopt; // laprox_last_error(): what couldn't come back
    }, py::arg("ctx"), py::arg("n_again"), py::arg("again") = py::none(), py::arg("seq_id") = 0);

    m.def("score", [](uintptr_t ctx, llama_seq_id seq_id) {
        require_meanwhile([&, c = context_at(ctx)] { return laprox_score(c, seq_id); });
    }, py::arg("ctx"), py::arg("seq_id") = 0);

    // The engine borrows the scorer: the caller keeps it alive for as long as it is set.
    m.def("set_scorer", [](uintptr_t ctx, const py::object & scorer) {
        require(scorer.is_none() ? laprox_set_scorer(context_at(ctx), nullptr, nullptr)
                                 : laprox_set_scorer(context_at(ctx), call_scorer, scorer.ptr()));
    }, py::arg("ctx"), py::arg("scorer").none(true));

    m.def("tail_begin", [](uintptr_t ctx, llama_seq_id seq_id) {
        const llama_pos begin = laprox_tail_begin(context_at(ctx), seq_id);
        require(begin >= 0);
        return begin;
    }, py::arg("ctx"), py::arg("seq_id") = 0);

    m.def("compressed_for", [](uintptr_t ctx, llama_seq_id seq_id) {
        const llama_pos pos = laprox_compressed_for(context_at(ctx), seq_id);
        require(pos >= 0);
        return pos;
    }, py::arg("ctx"), py::arg("seq_id") = 0);

    m.def("mark", [](uintptr_t ctx, llama_seq_id seq_id) {
        require(laprox_mark(context_at(ctx), seq_id));
    }, py::arg("ctx"), py::arg("seq_id") = 0);

    m.def("may_protect", [](uintptr_t ctx, int64_t n_tokens, double budget_bytes) {
        return laprox_may_protect(context_at(ctx), n_tokens, budget_bytes);
    }, py::arg("ctx"), py::arg("n_tokens"), py::arg("budget_bytes"));

    m.def("set_archive_in_states", [](uintptr_t ctx, bool on) {
        require(laprox_set_archive_in_states(context_at(ctx), on));
    }, py::arg("ctx"), py::arg("on"));

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
        result["recalls"]          = s.recalls;
        result["entries_recalled"] = s.entries_recalled;
        result["archived_entries"] = s.archived_entries;
        result["archived_bytes"]   = s.archived_bytes;
        result["tokens_lost"]      = s.tokens_lost;
        result["score_seconds"]   = s.score_seconds;
        result["select_seconds"]  = s.select_seconds;
        result["compact_seconds"] = s.compact_seconds;
        return result;
    }, py::arg("ctx"), py::arg("seq_id") = 0);
}

}
