# stock/llama-server: the pinned release's server without our patches, for scripts/server_tests, on stock/libllama.
# Its own sources come from the stock tree, and of llama-common the files that our patches touch; the objects of the
# others are the main build's, as are ggml and mtmd.

# The sources of a target that belong to llama.cpp, relative to its tree.
function(laprox_llama_cpp_sources out target)
    get_target_property(dir ${target} SOURCE_DIR)
    get_target_property(sources ${target} SOURCES)
    set(found "")
    foreach(source IN LISTS sources)
        cmake_path(ABSOLUTE_PATH source BASE_DIRECTORY "${dir}" NORMALIZE)
        cmake_path(IS_PREFIX LAPROX_SOURCE_DIR "${source}" NORMALIZE is_theirs)
        if(is_theirs)
            cmake_path(RELATIVE_PATH source BASE_DIRECTORY "${LAPROX_SOURCE_DIR}")
            list(APPEND found "${source}")
        endif()
    endforeach()
    set(${out} "${found}" PARENT_SCOPE)
endfunction()

set(stock_sources "${LAPROX_STOCK_DIR}/tools/server/main.cpp")
set(ours "kv_params") # no objects of these
laprox_llama_cpp_sources(common llama-common)
foreach(source IN LISTS common)
    file(SHA256 "${LAPROX_SOURCE_DIR}/${source}" patched)
    file(SHA256 "${LAPROX_STOCK_DIR}/${source}"  stock)
    if(NOT patched STREQUAL stock)
        if(source MATCHES "\\.h$")
            message(FATAL_ERROR "A patch changes ${source}: then all of llama-common has to be compiled for ${CMAKE_CURRENT_LIST_FILE}.")
        endif()
        cmake_path(GET source STEM name)
        list(APPEND ours "${name}")
        list(APPEND stock_sources "${LAPROX_STOCK_DIR}/${source}")
    endif()
endforeach()
foreach(target IN ITEMS server-context llama-server-impl)
    laprox_llama_cpp_sources(sources ${target})
    list(FILTER sources INCLUDE REGEX "\\.cpp$")
    list(TRANSFORM sources PREPEND "${LAPROX_STOCK_DIR}/")
    list(APPEND stock_sources ${sources})
endforeach()
list(JOIN ours "|" ours)

find_package(Threads REQUIRED)
add_executable(llama-server-stock ${stock_sources}
    "$<FILTER:$<TARGET_OBJECTS:llama-common>,EXCLUDE,/(${ours})\\.cpp\\.>")
target_include_directories(llama-server-stock PRIVATE
    "${LAPROX_STOCK_DIR}" "${LAPROX_STOCK_DIR}/common" "${LAPROX_STOCK_DIR}/vendor"
    "${LAPROX_STOCK_DIR}/tools/server" "${LAPROX_STOCK_DIR}/tools/mtmd")
target_compile_definitions(llama-server-stock PRIVATE $<TARGET_PROPERTY:llama-common,COMPILE_DEFINITIONS>)
# mtmd by its file: as a target it would bring our libllama
target_link_libraries(llama-server-stock PRIVATE
    llama-stock $<TARGET_FILE:mtmd> $<TARGET_FILE:llama-common-base> llama-ui cpp-httplib Threads::Threads)
add_dependencies(llama-server-stock mtmd llama-common-base llama-ui-assets)
set_target_properties(llama-server-stock PROPERTIES
    OUTPUT_NAME llama-server
    RUNTIME_OUTPUT_DIRECTORY "${CMAKE_BINARY_DIR}/stock"
    INSTALL_RPATH "${LAPROX_ORIGIN};${LAPROX_ORIGIN}/../bin"
    BUILD_WITH_INSTALL_RPATH ON)
add_dependencies(laprox llama-server-stock)
