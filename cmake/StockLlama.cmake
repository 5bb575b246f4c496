# stock/libllama: the pinned release without our patches and sources, for the tests that compare with it bit for bit.
# The ggml libraries are those of the main build. LLAMA_CPP_LIB_PATH=<build>/stock makes llama-cpp-python use it.

# The same files, flags and batches as libllama, so that a difference can only come from our changes.
get_target_property(llama_dir llama SOURCE_DIR)
get_target_property(llama_sources llama SOURCES)
get_directory_property(llama_options DIRECTORY "${llama_dir}" COMPILE_OPTIONS)

set(stock_sources "")
set(stock_apart "")
foreach(source IN LISTS llama_sources)
    if(source MATCHES "TARGET_OBJECTS|^${PROJECT_SOURCE_DIR}/cpp/")
        continue() # ours
    endif()
    file(RELATIVE_PATH relative "${llama_dir}" "${llama_dir}/${source}")
    if(IS_ABSOLUTE "${source}")
        file(RELATIVE_PATH relative "${llama_dir}" "${source}")
    endif()
    list(APPEND stock_sources "${LAPROX_STOCK_DIR}/src/${relative}")
    if(NOT relative MATCHES "^models/")
        list(APPEND stock_apart "${LAPROX_STOCK_DIR}/src/${relative}")
    endif()
endforeach()

add_library(llama-stock SHARED ${stock_sources})
set_source_files_properties(${stock_apart} PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
target_include_directories(llama-stock
    PRIVATE "${LAPROX_STOCK_DIR}/src" "${CMAKE_BINARY_DIR}/llama.cpp/src"
    PUBLIC "${LAPROX_STOCK_DIR}/include")
target_compile_options(llama-stock PRIVATE ${llama_options})
target_compile_definitions(llama-stock PRIVATE LLAMA_BUILD PUBLIC LLAMA_SHARED)
target_link_libraries(llama-stock PUBLIC ggml)
set_target_properties(llama-stock PROPERTIES
    OUTPUT_NAME llama
    LIBRARY_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stock"
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stock"
    UNITY_BUILD ON
    UNITY_BUILD_BATCH_SIZE 16
    INSTALL_RPATH "${LAPROX_ORIGIN}/../bin"    # where llama.cpp's build puts libggml*
    BUILD_WITH_INSTALL_RPATH ON)
add_dependencies(laprox llama-stock)
