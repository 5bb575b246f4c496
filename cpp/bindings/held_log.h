// llama.cpp's log, and what a signal raises, during a long call.

#pragma once

#include "bindings.h"

#include <utility>

namespace laprox_python {

// For as long as this lives, what its thread logs waits. llama.cpp's log callback is Python's, mostly: a signal that came during
// the call would be handled inside of it, and KeyboardInterrupt dropped, as nothing can be raised through the engine.
// What Python raises there all the same, where it scores, waits as well.
class held_log {
public:
    held_log();
    ~held_log();

    held_log(const held_log &)             = delete;
    held_log & operator=(const held_log &) = delete;

    void add(ggml_log_level level, const char * text);

    // Whether one of this thread holds an exception now, to be raised by tell().
    static bool keep(const py::error_already_set & error);

    // What waits is logged, and raised, as is what a signal raises that came meanwhile. With the GIL.
    void tell();

private:
    std::vector<std::pair<ggml_log_level, std::string>> lines;
    std::optional<py::error_already_set> raised;
    held_log * before; // of the same thread
};

// A long call of the C API, which says whether it was accepted: other Python threads run meanwhile.
template <typename Call>
void require_meanwhile(const Call & call) {
    held_log log;
    const bool accepted = [&] {
        py::gil_scoped_release unlock;
        return call();
    }();
    const std::string reason = accepted ? "" : laprox_last_error();
    log.tell();
    if (!accepted) {
        throw refusal(reason);
    }
}

}
