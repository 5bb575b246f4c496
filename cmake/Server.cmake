# Our part of llama-server: the options join llama-common, the slots join the server.

set(LAPROX_OPTIONS_SOURCE "${PROJECT_SOURCE_DIR}/cpp/server/kv_params.cpp")
target_sources(llama-common PRIVATE "${LAPROX_OPTIONS_SOURCE}")
# for the files that ask for it; the others aren't compiled again
set_property(SOURCE "${LAPROX_OPTIONS_SOURCE}" "${LAPROX_SOURCE_DIR}/common/arg.cpp" "${LAPROX_SOURCE_DIR}/common/common.cpp"
             TARGET_DIRECTORY llama-common APPEND PROPERTY INCLUDE_DIRECTORIES "${PROJECT_SOURCE_DIR}/cpp")

target_sources(server-context PRIVATE
    "${PROJECT_SOURCE_DIR}/cpp/server/kv_documents.cpp"
    "${PROJECT_SOURCE_DIR}/cpp/server/kv_tools.cpp"
    "${PROJECT_SOURCE_DIR}/cpp/server/kv_metrics.cpp"
    "${PROJECT_SOURCE_DIR}/cpp/server/kv_slots.cpp")
target_include_directories(server-context PUBLIC "${PROJECT_SOURCE_DIR}/cpp")

if(LLAMA_BUILD_UI AND LAPROX_NPM)
    message(STATUS "Web page of llama-server: built by ${LAPROX_NPM}")
elseif(LAPROX_NPM)
    message(STATUS "Web page of llama-server: not built in, as LLAMA_BUILD_UI is off")
else()
    message(STATUS "Web page of llama-server: not built in, because npm was not found. Install Node.js and build again")
endif()
