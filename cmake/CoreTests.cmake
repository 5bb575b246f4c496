# One program per tests/cpp/*.cpp, linked with the core alone: no llama.cpp needed. Run them by ctest.

enable_testing()
file(GLOB LAPROX_CORE_TESTS CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/tests/cpp/*.cpp")
foreach(source IN LISTS LAPROX_CORE_TESTS)
    get_filename_component(name "${source}" NAME_WE)
    add_executable(${name} "${source}")
    target_link_libraries(${name} PRIVATE laprox-core)
    add_test(NAME ${name} COMMAND ${name})
endforeach()
