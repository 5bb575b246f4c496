# Adds llama.cpp's own build: libllama, ggml and, with LAPROX_BUILD_SERVER, llama-server. All of GGML_* is left to
# the user (CMAKE_ARGS="-DGGML_CUDA=on"), except what the package can't do without.

set(BUILD_SHARED_LIBS ON) # llama-cpp-python loads shared libraries

# llama.cpp builds all of its programs or none; EXCLUDE_FROM_ALL below leaves only those that we depend on.
set(LLAMA_BUILD_COMMON   ${LAPROX_BUILD_SERVER})
set(LLAMA_BUILD_TOOLS    ${LAPROX_BUILD_SERVER})
set(LLAMA_BUILD_SERVER   ${LAPROX_BUILD_SERVER})
set(LLAMA_BUILD_TESTS    OFF)
set(LLAMA_BUILD_EXAMPLES OFF)
set(LLAMA_BUILD_APP      OFF)

# No library of the machine is needed; OpenSSL, for `llama-server -hf` and --ssl-*, can be turned on by hand.
set(LLAMA_OPENSSL OFF CACHE BOOL "llama-server: HTTPS, by the machine's OpenSSL")

# llama-server's page is made by npm, of sources in the release and packages from npm's registry, and not downloaded
# ready-made. Where npm fails, llama.cpp builds the server without the page.
find_program(LAPROX_NPM NAMES npm.cmd npm)
if(LAPROX_NPM AND LAPROX_BUILD_SERVER)
    set(LAPROX_UI_DEFAULT ON)
else()
    set(LAPROX_UI_DEFAULT OFF)
endif()
set(LLAMA_USE_PREBUILT_UI OFF)
set(LLAMA_BUILD_UI ${LAPROX_UI_DEFAULT} CACHE BOOL "llama-server: the web page, built by npm")

# The version that the libraries and llama-server report. Left alone, llama.cpp asks git in the folders above it,
# finds our repository, and is compiled again after each of our commits.
set(LLAMA_BUILD_COMMIT "llama-cpp-python-${LAPROX_LLAMA_CPP_PYTHON_VERSION}-laprox")
get_filename_component(LAPROX_ABOVE_SOURCE_DIR "${LAPROX_SOURCE_DIR}" DIRECTORY)
set(ENV{GIT_CEILING_DIRECTORIES} "${LAPROX_ABOVE_SOURCE_DIR}")

add_subdirectory("${LAPROX_SOURCE_DIR}" "${CMAKE_BINARY_DIR}/llama.cpp" EXCLUDE_FROM_ALL)

if(WIN32)
    # Our C++ is called from the Python module and the server without export macros.
    set_target_properties(llama PROPERTIES WINDOWS_EXPORT_ALL_SYMBOLS ON)
endif()

# ggml's backends differ by machine and options, so they are found, not listed: those of a TYPE, as CMake calls it.
function(laprox_libraries_in out type dir)
    get_property(targets DIRECTORY "${dir}" PROPERTY BUILDSYSTEM_TARGETS)
    set(found "")
    foreach(target IN LISTS targets)
        get_target_property(its_type ${target} TYPE)
        if(its_type STREQUAL type)
            list(APPEND found ${target})
        endif()
    endforeach()
    get_property(subdirs DIRECTORY "${dir}" PROPERTY SUBDIRECTORIES)
    foreach(subdir IN LISTS subdirs)
        laprox_libraries_in(more ${type} "${subdir}")
        list(APPEND found ${more})
    endforeach()
    set(${out} "${found}" PARENT_SCOPE)
endfunction()

laprox_libraries_in(LAPROX_GGML_LIBRARIES SHARED_LIBRARY "${LAPROX_SOURCE_DIR}/ggml")
laprox_libraries_in(LAPROX_MODULES MODULE_LIBRARY "${LAPROX_SOURCE_DIR}/ggml") # with GGML_BACKEND_DL, the backends
set(LAPROX_LIBRARIES llama ${LAPROX_GGML_LIBRARIES})
set(LAPROX_PROGRAMS "")
if(LAPROX_BUILD_SERVER)
    list(APPEND LAPROX_LIBRARIES llama-common llama-server-impl mtmd)
    set(LAPROX_PROGRAMS llama-server)
endif()

# One plain file per library. A version in its name makes three: symbolic links, which wheels turn into copies.
foreach(target IN LISTS LAPROX_LIBRARIES LAPROX_MODULES)
    set_property(TARGET ${target} PROPERTY VERSION)
    set_property(TARGET ${target} PROPERTY SOVERSION)
endforeach()
foreach(target IN LISTS LAPROX_LIBRARIES)
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "${LAPROX_ORIGIN}")
endforeach()
foreach(target IN LISTS LAPROX_MODULES LAPROX_PROGRAMS)
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "${LAPROX_ORIGIN}/../lib;${LAPROX_ORIGIN}")
endforeach()
foreach(target IN LISTS LAPROX_LIBRARIES LAPROX_MODULES LAPROX_PROGRAMS)
    set_target_properties(${target} PROPERTIES
        BUILD_WITH_INSTALL_RPATH ON            # installing is then a plain copy
        INSTALL_RPATH_USE_LINK_PATH ON)        # CUDA and the like outside the system's folders
endforeach()

if(TARGET mtmd)
    set_property(TARGET mtmd PROPERTY PRIVATE_HEADER) # of a program we don't build; CMake would warn
endif()

add_custom_target(laprox ALL)
add_dependencies(laprox ${LAPROX_LIBRARIES} ${LAPROX_MODULES} ${LAPROX_PROGRAMS})
