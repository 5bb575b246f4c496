# Gets the llama.cpp tree that the rest of the build uses:
#
#   LAPROX_SOURCE_DIR   the tree to build, patched
#   LAPROX_STOCK_DIR    the same release unpatched (only where the pinned release is used or LAPROX_BUILD_STOCK is on)
#
# The tree comes out of llama-cpp-python's sdist, so that our libraries and its ctypes structs are of one commit.
# In LAPROX_FETCH_DIR lie the sdist, stock-<version>/ and patched-<version>/.

set(LAPROX_SDIST_NAME "llama_cpp_python-${LAPROX_LLAMA_CPP_PYTHON_VERSION}")
set(LAPROX_SDIST "${LAPROX_FETCH_DIR}/${LAPROX_SDIST_NAME}.tar.gz")

function(laprox_sdist_is_good out)
    set(${out} FALSE PARENT_SCOPE)
    if(EXISTS "${LAPROX_SDIST}")
        file(SHA256 "${LAPROX_SDIST}" sha256)
        if(sha256 STREQUAL LAPROX_LLAMA_CPP_PYTHON_SHA256)
            set(${out} TRUE PARENT_SCOPE)
        endif()
    endif()
endfunction()

# pip knows the user's index, proxy, certificates and cache; we needn't.
function(laprox_download_sdist)
    laprox_sdist_is_good(good)
    if(good)
        return()
    endif()

    # pip asks the sdist for its metadata. With its build backend at hand (always so in a build by pip) that takes
    # no second isolated environment.
    execute_process(COMMAND "${Python_EXECUTABLE}" -c "import scikit_build_core" RESULT_VARIABLE missing ERROR_QUIET)
    set(isolation "")
    if(missing EQUAL 0)
        set(isolation --no-build-isolation)
    endif()
    set(command "${Python_EXECUTABLE}" -m pip download --no-deps ${isolation} --no-binary llama-cpp-python
                "llama-cpp-python==${LAPROX_LLAMA_CPP_PYTHON_VERSION}" --dest "${LAPROX_FETCH_DIR}")
    list(JOIN command " " shown)

    message(STATUS "Downloading llama.cpp (74 MB): ${shown}")
    execute_process(COMMAND ${command} RESULT_VARIABLE failed OUTPUT_VARIABLE output ERROR_VARIABLE output)
    if(NOT failed EQUAL 0)
        message(FATAL_ERROR
            "${output}\nDownloading llama.cpp failed. Run this until it works, then build again:\n  ${shown}\n"
            "Or build from a llama.cpp tree that you have: -DLAPROX_LLAMA_CPP_DIR=<folder>")
    endif()

    laprox_sdist_is_good(good)
    if(NOT good)
        file(GLOB found "${LAPROX_FETCH_DIR}/*.tar.gz")
        message(FATAL_ERROR
            "The download is not the release we pin: no ${LAPROX_SDIST} with sha256 ${LAPROX_LLAMA_CPP_PYTHON_SHA256}.\n"
            "Found: ${found}\nDelete it and build again; if it comes back, your package index serves something else.")
    endif()
endfunction()

function(laprox_unpack_sdist)
    if(IS_DIRECTORY "${LAPROX_STOCK_DIR}")
        return()
    endif()
    message(STATUS "Unpacking llama.cpp to ${LAPROX_STOCK_DIR}")
    set(scratch "${LAPROX_FETCH_DIR}/unpacking")
    file(REMOVE_RECURSE "${scratch}")
    file(MAKE_DIRECTORY "${scratch}")
    execute_process(
        COMMAND "${CMAKE_COMMAND}" -E tar xzf "${LAPROX_SDIST}" -- "${LAPROX_SDIST_NAME}/vendor/llama.cpp"
        WORKING_DIRECTORY "${scratch}" RESULT_VARIABLE failed ERROR_VARIABLE output)
    if(NOT failed EQUAL 0)
        message(FATAL_ERROR "${output}\nCould not unpack ${LAPROX_SDIST}. Delete it and build again.")
    endif()
    # The pointer to a submodule's repository, which the sdist doesn't have, stops git in this folder.
    file(REMOVE "${scratch}/${LAPROX_SDIST_NAME}/vendor/llama.cpp/.git")
    # Renamed last: a folder of this name is always complete.
    file(RENAME "${scratch}/${LAPROX_SDIST_NAME}/vendor/llama.cpp" "${LAPROX_STOCK_DIR}")
    file(REMOVE_RECURSE "${scratch}")
endfunction()

# What the build reads; the other two thirds of the release are documents, test models and pictures.
function(laprox_copy_for_patching)
    if(IS_DIRECTORY "${LAPROX_SOURCE_DIR}")
        return()
    endif()
    set(scratch "${LAPROX_FETCH_DIR}/copying")
    file(REMOVE_RECURSE "${scratch}")
    foreach(item IN ITEMS CMakeLists.txt LICENSE cmake common ggml include licenses scripts src tools vendor)
        file(COPY "${LAPROX_STOCK_DIR}/${item}" DESTINATION "${scratch}")
    endforeach()
    file(RENAME "${scratch}" "${LAPROX_SOURCE_DIR}")
endfunction()

function(laprox_get_release)
    file(MAKE_DIRECTORY "${LAPROX_FETCH_DIR}")
    file(LOCK "${LAPROX_FETCH_DIR}/lock" GUARD FUNCTION TIMEOUT 900) # two build folders may configure at once
    laprox_download_sdist()
    laprox_unpack_sdist()
    if(NOT LAPROX_LLAMA_CPP_DIR)
        laprox_copy_for_patching()
        laprox_apply_patches("${LAPROX_SOURCE_DIR}" ORIGIN "${LAPROX_STOCK_DIR}")
    endif()
endfunction()

if(LAPROX_LLAMA_CPP_DIR)
    file(REAL_PATH "${LAPROX_LLAMA_CPP_DIR}" LAPROX_SOURCE_DIR)
    if(NOT EXISTS "${LAPROX_SOURCE_DIR}/src/llama-context.cpp")
        message(FATAL_ERROR "LAPROX_LLAMA_CPP_DIR=${LAPROX_LLAMA_CPP_DIR} is not a llama.cpp tree: "
                            "it has no src/llama-context.cpp.")
    endif()
else()
    set(LAPROX_SOURCE_DIR "${LAPROX_FETCH_DIR}/patched-${LAPROX_LLAMA_CPP_PYTHON_VERSION}")
endif()
set(LAPROX_STOCK_DIR "${LAPROX_FETCH_DIR}/stock-${LAPROX_LLAMA_CPP_PYTHON_VERSION}")

if(LAPROX_BUILD_STOCK OR NOT LAPROX_LLAMA_CPP_DIR)
    laprox_get_release()
endif()
if(LAPROX_LLAMA_CPP_DIR)
    laprox_apply_patches("${LAPROX_SOURCE_DIR}")
endif()
message(STATUS "llama.cpp: ${LAPROX_SOURCE_DIR}")
