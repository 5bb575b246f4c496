// Why the engine refused, for whoever asks after the call.

#pragma once

#include <string>

namespace laprox {

// What laprox_last_error() returns on this thread from now on.
void set_last_error(const std::string & reason);
const std::string & last_error();

// Where llama.cpp catches what is thrown and tells its caller nothing: both. Throws std::runtime_error.
[[noreturn]] void refuse(const std::string & reason);

}
