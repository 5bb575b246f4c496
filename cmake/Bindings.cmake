# laprox._core, the Python module. Core functions are reached through libllama, so nothing is compiled twice.

file(GLOB LAPROX_BINDING_SOURCES CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cpp/bindings/*.cpp")
if(NOT LAPROX_BINDING_SOURCES)
    return()
endif()

set(PYBIND11_FINDPYTHON ON) # the Python that Toolchain.cmake found, not another one
find_package(pybind11 CONFIG)
if(NOT pybind11_FOUND)
    message(FATAL_ERROR "pybind11 was not found. Install it and say where it is:\n"
                        "  ${Python_EXECUTABLE} -m pip install pybind11\n"
                        "  -Dpybind11_DIR=\$(${Python_EXECUTABLE} -m pybind11 --cmakedir)\n"
                        "scripts/build does both.")
endif()

pybind11_add_module(_core MODULE NO_EXTRAS ${LAPROX_BINDING_SOURCES})
target_include_directories(_core PRIVATE cpp)
target_link_libraries(_core PRIVATE llama)
set_target_properties(_core PROPERTIES
    INSTALL_RPATH "${LAPROX_ORIGIN}/lib"
    BUILD_WITH_INSTALL_RPATH ON)
