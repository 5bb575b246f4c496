# For scripts/build and scripts/wheel: sets the array `tools`, what pip has to bring to build laprox on this machine. To be sourced.
tools=(scikit-build-core pybind11 'pip>=23.1')
command -v ninja >/dev/null || tools+=(ninja)
cmake --version 2>/dev/null | grep -Eq '^cmake version ([4-9]|3\.(2[1-9]|[3-9]))' || tools+=(cmake)
