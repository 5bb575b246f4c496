# The package's layout, in a wheel (prefix: its root) as in the source tree (prefix: python/):
#
#   laprox/_core.*.so        the Python module
#   laprox/lib/              libllama, libggml*, libmtmd and what llama-server shares
#   laprox/bin/llama-server, and beside it, where ggml looks for them, backends that are modules (GGML_BACKEND_DL)
#   laprox/licenses/         of what these contain
#
# A component, because llama.cpp has install rules of its own.

install(TARGETS ${LAPROX_LIBRARIES}
    LIBRARY DESTINATION laprox/lib COMPONENT laprox
    RUNTIME DESTINATION laprox/lib COMPONENT laprox # DLLs
    ARCHIVE DESTINATION laprox/lib COMPONENT laprox-development EXCLUDE_FROM_ALL
    PUBLIC_HEADER DESTINATION laprox/include COMPONENT laprox-development EXCLUDE_FROM_ALL)
if(LAPROX_PROGRAMS OR LAPROX_MODULES)
    install(TARGETS ${LAPROX_PROGRAMS} ${LAPROX_MODULES}
        RUNTIME DESTINATION laprox/bin COMPONENT laprox
        LIBRARY DESTINATION laprox/bin COMPONENT laprox)
endif()
if(TARGET _core)
    install(TARGETS _core LIBRARY DESTINATION laprox COMPONENT laprox)
endif()
install(FILES "${LAPROX_SOURCE_DIR}/LICENSE" DESTINATION laprox/licenses RENAME LICENSE-llama.cpp COMPONENT laprox)
if(LAPROX_OPENMP_LICENSE)
    install(FILES "${LAPROX_OPENMP_LICENSE}" DESTINATION laprox/licenses RENAME LICENSE-libgomp COMPONENT laprox)
endif()
if(LAPROX_BUILD_SERVER)
    install(DIRECTORY "${LAPROX_SOURCE_DIR}/licenses/" DESTINATION laprox/licenses COMPONENT laprox)
endif()
