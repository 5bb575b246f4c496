# laprox_apply_patches(<tree> [ORIGIN <pristine tree>])
#
# Brings <tree> to "patches/series applied", whatever of it is applied already. The files that the patches touch are
# put together in a scratch folder and copied back where they differ, so a file that stays the same keeps its time
# stamp and isn't compiled again, and a series that doesn't apply leaves the tree as it was.
#
# With ORIGIN the touched files start from there. Then even a patch that was changed or dropped since the last time
# comes out right. Without it they start from <tree>, and patches that are in it are taken back first.

# git looks for a repository in the folders above, and would then take paths as relative to its root. Our build
# folder lies in one, so it may not look further than the tree itself.
function(laprox_git_apply result dir)
    get_filename_component(above "${dir}" DIRECTORY)
    execute_process(
        COMMAND "${CMAKE_COMMAND}" -E env --unset=GIT_DIR --unset=GIT_WORK_TREE --unset=GIT_INDEX_FILE
                "GIT_CEILING_DIRECTORIES=${above}"
                "${GIT_EXECUTABLE}" -c core.autocrlf=false apply --whitespace=nowarn ${ARGN}
        WORKING_DIRECTORY "${dir}" RESULT_VARIABLE status OUTPUT_VARIABLE out ERROR_VARIABLE err)
    set(${result} ${status} PARENT_SCOPE)
    set(${result}_OUTPUT "${out}" PARENT_SCOPE)
    set(${result}_ERROR "${err}" PARENT_SCOPE)
endfunction()

# Patch files in the order of patches/series: one name per line, '#' starts a comment.
function(laprox_read_series out)
    set(dir "${PROJECT_SOURCE_DIR}/patches")
    set(patches "")
    if(EXISTS "${dir}/series")
        set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${dir}/series")
        file(STRINGS "${dir}/series" lines)
        foreach(line IN LISTS lines)
            string(REGEX REPLACE "#.*" "" line "${line}")
            string(STRIP "${line}" line)
            if(line)
                if(NOT EXISTS "${dir}/${line}")
                    message(FATAL_ERROR "patches/series lists '${line}', but there is no patches/${line}.")
                endif()
                list(APPEND patches "${dir}/${line}")
                set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS "${dir}/${line}")
            endif()
        endforeach()
    endif()
    set(${out} "${patches}" PARENT_SCOPE)
endfunction()

function(laprox_touched_files out)
    set(files "")
    foreach(patch IN LISTS ARGN)
        laprox_git_apply(numstat "${PROJECT_SOURCE_DIR}/patches" --numstat "${patch}")
        if(NOT numstat EQUAL 0)
            message(FATAL_ERROR "${patch} is not a patch that git can read:\n${numstat_ERROR}")
        endif()
        string(REGEX MATCHALL "[^\n]+" lines "${numstat_OUTPUT}")
        foreach(line IN LISTS lines)
            string(REGEX REPLACE "^[0-9-]+\t[0-9-]+\t" "" file "${line}")
            list(APPEND files "${file}")
        endforeach()
    endforeach()
    list(REMOVE_DUPLICATES files)
    set(${out} "${files}" PARENT_SCOPE)
endfunction()

# Fails if <file> was edited by hand since we wrote it: the edit would be lost, and is in no patch.
function(laprox_refuse_to_overwrite tree file sha256 old_record)
    foreach(line IN LISTS old_record)
        if(line MATCHES "^([0-9a-f]+) (.*)$" AND CMAKE_MATCH_2 STREQUAL file
           AND sha256 AND NOT CMAKE_MATCH_1 STREQUAL sha256)
            message(FATAL_ERROR
                "${tree}/${file} was edited by hand, and patches/ would now overwrite it.\n"
                "Put the edit into a patch, or drop it with\n  rm ${tree}/${file}\nand build again. To work on llama.cpp's "
                "files, use a tree of your own: -DLAPROX_LLAMA_CPP_DIR=<folder>")
        endif()
    endforeach()
endfunction()

function(laprox_apply_patches tree)
    cmake_parse_arguments(PARSE_ARGV 1 ARG "" "ORIGIN" "")
    laprox_read_series(patches)

    # What we wrote into a tree of ours, and so what to restore when a patch is dropped: "<sha256> <file>" per line.
    set(record_file "${tree}/.laprox-patched")
    set(old_record "")
    set(files "")
    if(ARG_ORIGIN AND EXISTS "${record_file}")
        file(STRINGS "${record_file}" old_record)
        list(TRANSFORM old_record REPLACE "^[0-9a-f]+ " "" OUTPUT_VARIABLE files)
    endif()
    laprox_touched_files(touched ${patches})
    list(APPEND files ${touched})
    list(REMOVE_DUPLICATES files)
    if(NOT files)
        return()
    endif()

    set(from "${tree}")
    if(ARG_ORIGIN)
        set(from "${ARG_ORIGIN}")
    endif()
    set(scratch "${CMAKE_BINARY_DIR}/patching")
    file(REMOVE_RECURSE "${scratch}")
    foreach(file IN LISTS files)
        get_filename_component(dir "${scratch}/${file}" DIRECTORY)
        file(MAKE_DIRECTORY "${dir}")
        if(EXISTS "${from}/${file}")
            file(COPY_FILE "${from}/${file}" "${scratch}/${file}")
        endif()
    endforeach()

    # Last first: an earlier patch may only come off after a later one that touches the same lines.
    set(were_applied "")
    if(NOT ARG_ORIGIN)
        set(backwards ${patches})
        list(REVERSE backwards)
        foreach(patch IN LISTS backwards)
            laprox_git_apply(reversible "${scratch}" --reverse --check "${patch}")
            if(reversible EQUAL 0)
                laprox_git_apply(reversed "${scratch}" --reverse "${patch}")
                list(APPEND were_applied "${patch}")
            endif()
        endforeach()
    endif()

    foreach(patch IN LISTS patches)
        get_filename_component(name "${patch}" NAME)
        laprox_git_apply(applied "${scratch}" "${patch}")
        if(NOT applied EQUAL 0)
            if(ARG_ORIGIN)
                set(advice "The patches are not for llama-cpp-python ${LAPROX_LLAMA_CPP_PYTHON_VERSION}. Run this to see all that is wrong:\n"
                           "  scripts/bump_audit ${LAPROX_LLAMA_CPP_PYTHON_VERSION}")
            else()
                set(advice "Run this to see where, then start from a clean tree of llama-cpp-python "
                           "${LAPROX_LLAMA_CPP_PYTHON_VERSION}'s llama.cpp, or repair the patch:\n"
                           "  git -C ${tree} apply --check -v ${patch}")
            endif()
            string(CONCAT advice ${advice})
            message(FATAL_ERROR "patches/${name} does not apply to ${tree}:\n${applied_ERROR}${advice}")
        endif()
        if(patch IN_LIST were_applied)
            message(STATUS "Patch ${name}: was applied already")
        else()
            message(STATUS "Patch ${name}: applied")
        endif()
    endforeach()

    # All are looked at before one is written.
    set(record "")
    set(changed "")
    foreach(file IN LISTS files)
        set(sha256 "")
        set(old_sha256 "")
        if(EXISTS "${scratch}/${file}")
            file(SHA256 "${scratch}/${file}" sha256)
            string(APPEND record "${sha256} ${file}\n")
        endif()
        if(EXISTS "${tree}/${file}")
            file(SHA256 "${tree}/${file}" old_sha256)
        endif()
        if(NOT sha256 STREQUAL old_sha256)
            laprox_refuse_to_overwrite("${tree}" "${file}" "${old_sha256}" "${old_record}")
            list(APPEND changed "${file}")
        endif()
    endforeach()

    foreach(file IN LISTS changed)
        if(EXISTS "${scratch}/${file}")
            get_filename_component(dir "${tree}/${file}" DIRECTORY)
            file(MAKE_DIRECTORY "${dir}")
            file(COPY_FILE "${scratch}/${file}" "${tree}/${file}")
        else() # only a patch had it, and no longer has
            file(REMOVE "${tree}/${file}")
        endif()
    endforeach()
    if(ARG_ORIGIN)
        file(WRITE "${record_file}" "${record}")
    endif()
    file(REMOVE_RECURSE "${scratch}")
endfunction()
