#include "engine/archive.h"

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>

#ifdef _WIN32
#define NOMINMAX
#include <windows.h>
#else
#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>
#endif

namespace laprox {

static std::string temporary_folder() {
    for (const char * name : { "TMPDIR", "TMP", "TEMP" }) {
        const char * folder = std::getenv(name);
        if (folder && *folder) {
            return folder;
        }
    }
    return "/tmp";
}

#ifdef _WIN32

static const bool has_unnamed_files = false;

static size_t free_memory() {
    MEMORYSTATUSEX status;
    status.dwLength = sizeof(status);
    return GlobalMemoryStatusEx(&status) ? (size_t) status.ullAvailPhys : 0;
}

static size_t free_disk(const std::string &) {
    return 0;
}

static int open_unnamed(const std::string & folder, size_t) {
    throw archive_full("archive = " + folder + ": files without a name aren't made on this system; accepted: auto, ram, off");
}

static void close(int) {
}

#else

static const bool has_unnamed_files = true;

// Bytes of memory that a process can take without swapping; where the system doesn't say, half of all there is.
static size_t free_memory() {
    std::ifstream lines("/proc/meminfo");
    std::string name, unit;
    for (size_t kilobytes; lines >> name >> kilobytes; std::getline(lines, unit)) {
        if (name == "MemAvailable:") {
            return kilobytes*1024;
        }
    }
    const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    return pages > 0 && size > 0 ? (size_t) pages/2*size : 0;
}

static size_t free_disk(const std::string & folder) {
    struct statvfs s;
    return statvfs(folder.c_str(), &s) == 0 ? (size_t) s.f_bavail*s.f_frsize : 0;
}

// A file without a name, which the system deletes when it is closed, whatever becomes of this process.
static int open_unnamed(const std::string & folder, size_t size) {
    const auto refuse = [&](const char * what, int error) {
        throw archive_full("archive = " + folder + ": " + what + ": " + std::strerror(error));
    };
    std::string path = folder + "/laprox-archive-XXXXXX";
    const int file = mkstemp(path.data());
    if (file < 0) {
        refuse("no file can be made there", errno);
    }
    unlink(path.c_str());
    fcntl(file, F_SETFD, FD_CLOEXEC);
#ifdef __linux__
    const int error = posix_fallocate(file, 0, (off_t) size);
#else
    const int error = ftruncate(file, (off_t) size) == 0 ? 0 : errno;
#endif
    if (error) {
        close(file);
        refuse(("no room for " + std::to_string(size) + " bytes").c_str(), error);
    }
    return file;
}

#endif

static size_t bytes_of(const budget & limit, archive_kind kind, const std::string & folder) {
    if (limit.unit == budget_unit::bytes) {
        return (size_t) limit.value;
    }
    const size_t n_free = kind == archive_kind::file ? free_disk(folder) : free_memory();
    return (size_t) (limit.value*n_free);
}

archive_space::archive_space(archive_kind kind, std::string where, const budget & limit) :
        kind(kind),
        folder(where.empty() ? temporary_folder() : std::move(where)),
        limit(bytes_of(limit, kind, folder)) {
}

std::shared_ptr<archive_space> make_archive_space(const std::string & setting, const budget & limit, bool in_host_memory) {
    if (setting == "off") {
        return nullptr;
    }
    const bool named = setting != "auto" && setting != "ram";
    std::error_code error;
    if (named && !std::filesystem::is_directory(setting, error)) {
        throw std::invalid_argument("archive = " + setting + " is no folder; accepted: auto, ram, off, or a folder for unnamed files");
    }
    if (named) {
        close(open_unnamed(setting, 1)); // throws what is wrong with it
    }
    const bool in_file = named || (setting == "auto" && in_host_memory && has_unnamed_files);
    return std::make_shared<archive_space>(in_file ? archive_kind::file : archive_kind::memory, named ? setting : "", limit);
}

archive_chunk::archive_chunk(std::shared_ptr<archive_space> s, size_t size) : size(size), space(std::move(s)) {
    if (size > space->room()) {
        throw archive_full("archive_limit of " + std::to_string(space->limit) + " bytes is reached: " +
                std::to_string(space->used()) + " are taken, " + std::to_string(size) + " more are needed");
    }
    if (space->kind == archive_kind::file) {
        file = open_unnamed(space->folder, size);
    } else {
        memory.reset((uint8_t *) std::malloc(size));
        if (!memory) {
            throw archive_full("no host memory for an archive of " + std::to_string(size) + " bytes");
        }
    }
    space->n_used += size;
}

archive_chunk::~archive_chunk() {
    space->n_used -= size;
    if (file >= 0) {
        close(file);
    }
}

void archive_chunk::write(const void * data, size_t n) {
    const auto * bytes = (const uint8_t *) data;
    if (memory) {
        std::memcpy(memory.get() + n_written, bytes, n);
        n_written += n;
        return;
    }
#ifndef _WIN32
    for (size_t done = 0; done < n;) {
        const ssize_t written = pwrite(file, bytes + done, n - done, (off_t) n_written);
        if (written < 0 && errno != EINTR) {
            throw std::runtime_error(std::string("the archive's file can't be written: ") + std::strerror(errno));
        }
        done      += std::max<ssize_t>(written, 0);
        n_written += std::max<ssize_t>(written, 0);
    }
#endif
}

void archive_chunk::read(size_t offset, void * data, size_t n) const {
    if (memory) {
        std::memcpy(data, memory.get() + offset, n);
        return;
    }
#ifndef _WIN32
    for (size_t done = 0; done < n;) {
        const ssize_t got = pread(file, (uint8_t *) data + done, n - done, (off_t) (offset + done));
        if (got == 0 || (got < 0 && errno != EINTR)) {
            throw std::runtime_error(std::string("the archive's file can't be read: ") + (got == 0 ? "it ends early" : std::strerror(errno)));
        }
        done += std::max<ssize_t>(got, 0);
    }
#endif
}

void archive_chunk::shorten() {
    space->n_used -= size - n_written;
    size = n_written;
    if (memory) {
        if (auto * less = (uint8_t *) std::realloc(memory.get(), size)) {
            (void) memory.release();
            memory.reset(less);
        }
        return;
    }
#ifndef _WIN32
    if (ftruncate(file, (off_t) size) != 0) {
        throw std::runtime_error(std::string("the archive's file can't be shortened: ") + std::strerror(errno));
    }
#endif
}

void archive::set_layout(layout rows, std::vector<uint32_t> heads) {
    row_bytes = std::move(rows);
    n_heads   = std::move(heads);
}

size_t archive::token_bytes() const {
    size_t n = 0;
    for (size_t ikv = 0; ikv < row_bytes.size(); ikv++) {
        for (size_t bytes : row_bytes[ikv]) {
            n += n_heads[ikv]*bytes;
        }
    }
    return n;
}

size_t archive::offset(size_t ikv, size_t pool, uint32_t head) const {
    size_t before = head*row_bytes[ikv][pool];
    for (size_t i = 0; i < ikv; i++) {
        for (size_t bytes : row_bytes[i]) {
            before += n_heads[i]*bytes;
        }
    }
    for (size_t i = 0; i < pool; i++) {
        before += n_heads[ikv]*row_bytes[ikv][i];
    }
    return before;
}

void archive::read(size_t ikv, size_t pool, uint32_t head, uint8_t * data) const {
    const size_t row = row_bytes[ikv][pool];
    for (const part & p : parts) {
        p.chunk->read(offset(ikv, pool, head)*p.n_stored, data, row*p.n);
        data += row*p.n;
    }
}

bool archive::rewrite_last(const std::shared_ptr<archive_space> & space, size_t n_parts) {
    const std::vector<part> old(parts.end() - n_parts, parts.end());
    size_t n = 0;
    for (const part & p : old) {
        n += p.n;
    }
    try {
        auto chunk = std::make_shared<archive_chunk>(space, n*token_bytes());
        for_each_block(n, [&](size_t ikv, size_t pool, uint32_t head, std::vector<uint8_t> & rows) {
            const size_t row = row_bytes[ikv][pool];
            uint8_t * to = rows.data();
            for (const part & p : old) {
                p.chunk->read(offset(ikv, pool, head)*p.n_stored, to, row*p.n);
                to += row*p.n;
            }
            chunk->write(rows.data(), rows.size());
        });
        parts.resize(parts.size() - n_parts);
        parts.push_back({ std::move(chunk), n, n });
        return true;
    } catch (const std::exception &) {
        return false;
    }
}

// A long generation adds little at a time, and a file each: parts double, so that there are few, and each row is written
// anew as often as it has doubled.
void archive::join_parts(const std::shared_ptr<archive_space> & space) {
    while (parts.size() >= 2 && parts[parts.size() - 2].n <= 2*parts.back().n && rewrite_last(space, 2)) {
    }
}

void archive::trim(const std::shared_ptr<archive_space> & space) {
    if (parts.empty() || 2*parts.back().n >= parts.back().n_stored) {
        return;
    }
    if (parts.back().chunk.use_count() > 1) {
        rewrite_last(space, 1);
        return;
    }
    try {
        move_up(parts.back(), std::vector<bool>(parts.back().n, true));
    } catch (const std::exception &) {
        clear();
    }
}

void archive::move_up(part & p, const std::vector<bool> & stays) const {
    p.chunk->rewind();
    for_each_block(p.n, [&](size_t ikv, size_t pool, uint32_t head, std::vector<uint8_t> & rows) {
        const size_t row = row_bytes[ikv][pool];
        p.chunk->read(offset(ikv, pool, head)*p.n_stored, rows.data(), rows.size());
        uint8_t * to = rows.data();
        for (size_t t = 0; t < p.n; t++) {
            if (stays[t]) {
                to = std::copy_n(rows.data() + t*row, row, to);
            }
        }
        p.chunk->write(rows.data(), to - rows.data());
    });
    p.chunk->shorten();
    p.n = p.n_stored = std::count(stays.begin(), stays.end(), true);
}

void archive::keep(const std::vector<bool> & stays) {
    const auto begin_of = [&](size_t i) { // of a part's tokens
        size_t n = 0;
        for (size_t j = 0; j < i; j++) {
            n += parts[j].n;
        }
        return stays.begin() + n;
    };
    const auto n_staying = [&](size_t i) { return (size_t) std::count(begin_of(i), begin_of(i + 1), true); };
    for (size_t i = 0; i < parts.size(); i++) {
        if (n_staying(i) > 0 && n_staying(i) < parts[i].n && parts[i].chunk.use_count() > 1) {
            throw archive_full("what it shares with a copy can't be let go");
        }
    }
    std::vector<part> left;
    for (size_t i = 0; i < parts.size(); i++) {
        part p = parts[i];
        const auto   stay = begin_of(i);
        const size_t n    = n_staying(i);
        if (n == 0) {
            continue;
        }
        if (n == p.n) {
            left.push_back(std::move(p));
            continue;
        }
        move_up(p, std::vector<bool>(stay, begin_of(i + 1)));
        left.push_back(std::move(p));
    }
    std::vector<llama_pos> held, lost;
    for (size_t i = 0; i < positions.size(); i++) {
        (stays[i] ? held : lost).push_back(positions[i]);
    }
    parts     = std::move(left);
    positions = std::move(held);
    add_lost(lost);
}

void archive::add_lost(const std::vector<llama_pos> & added) {
    const auto middle = lost_positions.insert(lost_positions.end(), added.begin(), added.end());
    std::inplace_merge(lost_positions.begin(), middle, lost_positions.end());
}

bool archive::shares_positions(llama_pos before) const {
    std::vector<llama_pos> all;
    std::merge(positions.begin(), positions.end(), lost_positions.begin(), lost_positions.end(), std::back_inserter(all));
    const auto end = std::lower_bound(all.begin(), all.end(), before);
    return std::adjacent_find(all.begin(), end) != end;
}

void archive::cut(llama_pos pos) {
    const auto n_before = [&](const std::vector<llama_pos> & all) { return std::lower_bound(all.begin(), all.end(), pos) - all.begin(); };
    lost_positions.resize(n_before(lost_positions));
    const size_t n = n_before(positions);
    positions.resize(n);
    size_t before = 0;
    for (size_t i = 0; i < parts.size(); i++) {
        parts[i].n = std::min(parts[i].n, n - before);
        before += parts[i].n;
        if (parts[i].n == 0) {
            parts.resize(i);
        }
    }
}

void archive::clear() {
    parts.clear();
    positions.clear();
    lost_positions.clear();
}

size_t archive::bytes() const {
    size_t n = 0;
    for (const part & p : parts) {
        n += p.chunk->size;
    }
    return n;
}

}
