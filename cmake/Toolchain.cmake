# Compiler settings for everything below: llama.cpp, our C++ and the tests.

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)

if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
    set(CMAKE_BUILD_TYPE Release CACHE STRING "Release, RelWithDebInfo or Debug" FORCE)
endif()

if(LAPROX_SANITIZE)
    if(MSVC)
        message(FATAL_ERROR "LAPROX_SANITIZE=${LAPROX_SANITIZE}: only GCC and Clang builds can be sanitized.")
    endif()
    foreach(name IN ITEMS ${LAPROX_SANITIZE})
        string(REPLACE "," ";" names "${name}")
        foreach(part IN LISTS names)
            if(NOT part MATCHES "^(address|undefined|leak|thread)$")
                message(FATAL_ERROR "LAPROX_SANITIZE=${LAPROX_SANITIZE}: '${part}' is not one of "
                                    "address, undefined, leak, thread (separate several by commas).")
            endif()
        endforeach()
    endforeach()
    add_compile_options(-fsanitize=${LAPROX_SANITIZE} -fno-omit-frame-pointer)
    add_link_options(-fsanitize=${LAPROX_SANITIZE})
endif()

# Our libraries find each other by their own place, so that the package can be moved.
if(APPLE)
    set(LAPROX_ORIGIN "@loader_path")
else()
    set(LAPROX_ORIGIN "$ORIGIN")
endif()

find_package(Git)
if(NOT Git_FOUND)
    message(FATAL_ERROR "git was not found; it applies our patches to llama.cpp. Install it (apt install git, brew install git) "
                        "or pass -DGIT_EXECUTABLE=<path of git>.")
endif()

find_package(Python 3.10 REQUIRED COMPONENTS Interpreter OPTIONAL_COMPONENTS Development.Module)
if(NOT Python_Development.Module_FOUND)
    message(FATAL_ERROR "The C headers of Python ${Python_VERSION} (${Python_EXECUTABLE}) were not found. "
                        "Install them (apt install python3-dev, dnf install python3-devel) or use another Python.")
endif()
