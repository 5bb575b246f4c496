# The release of llama-cpp-python whose sdist carries our llama.cpp, and whose ctypes bindings we run with.
# docs/bumping-llama.cpp.md says what else to do when these two lines change; scripts/bump_audit, where the version stands again.
set(LAPROX_LLAMA_CPP_PYTHON_VERSION 0.3.36)
set(LAPROX_LLAMA_CPP_PYTHON_SHA256 832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e)

# A wheel whose bindings are of another release than its libraries would crash, not complain.
file(STRINGS "${PROJECT_SOURCE_DIR}/pyproject.toml" LAPROX_PYTHON_PIN REGEX "\"llama-cpp-python==")
if(NOT LAPROX_PYTHON_PIN MATCHES "llama-cpp-python==${LAPROX_LLAMA_CPP_PYTHON_VERSION}\"")
    message(FATAL_ERROR
        "cmake/LlamaCppPin.cmake pins llama-cpp-python ${LAPROX_LLAMA_CPP_PYTHON_VERSION}, but the dependency in "
        "pyproject.toml reads:${LAPROX_PYTHON_PIN}\nMake them equal.")
endif()
