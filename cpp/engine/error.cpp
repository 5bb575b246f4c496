#include "engine/error.h"

#include <stdexcept>

namespace laprox {

static thread_local std::string last;

void set_last_error(const std::string & reason) {
    last = reason;
}

const std::string & last_error() {
    return last;
}

void refuse(const std::string & reason) {
    set_last_error(reason);
    throw std::runtime_error("laprox: " + reason);
}

}
