// One function over many items, on several threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace laprox {

// f(i) for 0 <= i < n, in any order. The first exception is thrown again here once all threads are done.
template <typename F> void parallel_for(size_t n, int n_threads, F f) {
    std::atomic<size_t> next { 0 };
    std::exception_ptr  error;
    std::mutex          mutex;
    const auto work = [&] {
        try {
            for (size_t i = next++; i < n; i = next++) {
                f(i);
            }
        } catch (...) {
            std::lock_guard<std::mutex> lock(mutex);
            error = error ? error : std::current_exception();
            next  = n;
        }
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < std::min<size_t>(n_threads > 0 ? n_threads : 1, n); i++) {
        try {
            others.emplace_back(work);
        } catch (const std::system_error &) {
            break; // as many as the system grants
        }
    }
    work();
    for (std::thread & other : others) {
        other.join();
    }
    if (error) {
        std::rethrow_exception(error);
    }
}

}
