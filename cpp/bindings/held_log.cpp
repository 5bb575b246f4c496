#include "held_log.h"

#include <mutex>

namespace laprox_python {

namespace {

struct log_callback {
    ggml_log_callback function;
    void * user_data;

    void operator()(ggml_log_level level, const char * text) const { function(level, text, user_data); }
};

thread_local held_log * held = nullptr;

std::mutex   mutex;
log_callback others; // the one that was set when ours took its place

void log_others(ggml_log_level level, const char * text) {
    const log_callback told = [] {
        const std::lock_guard lock(mutex);
        return others;
    }();
    told(level, text);
}

void hold_or_log(ggml_log_level level, const char * text, void *) {
    if (held) {
        held->add(level, text);
    } else {
        log_others(level, text);
    }
}

// Stays in its place, until someone sets another: threads that log meanwhile are told apart by `held`.
void take_place() {
    const std::lock_guard lock(mutex);
    log_callback now;
    llama_log_get(&now.function, &now.user_data);
    if (now.function != hold_or_log) {
        others = now;
        llama_log_set(hold_or_log, nullptr);
    }
}

}

held_log::held_log() : before(held) {
    take_place();
    held = this;
}

held_log::~held_log() {
    if (held == this) {
        held = before;
    }
}

void held_log::add(ggml_log_level level, const char * text) {
    lines.emplace_back(level, text);
}

bool held_log::keep(const py::error_already_set & error) {
    if (held && !held->raised) {
        held->raised = error;
    }
    return held;
}

void held_log::tell() {
    held = before;
    if (PyErr_CheckSignals() != 0) {
        raised.emplace();
    }
    for (const auto & [level, text] : std::exchange(lines, {})) {
        if (before) {
            before->add(level, text.c_str());
        } else {
            log_others(level, text.c_str());
        }
    }
    if (raised) {
        throw *raised;
    }
}

}
