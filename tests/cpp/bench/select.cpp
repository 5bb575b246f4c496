// Time and memory of one selection: scripts/bench_select.

#include "core/allocate.h"

#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <random>
#include <string>

#include <sys/resource.h>

static double seconds() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of all threads: what other programs on the machine do is not in it.
static double cpu_seconds() {
    return (double) std::clock()/CLOCKS_PER_SEC;
}

static double peak_bytes() {
    rusage usage {};
    getrusage(RUSAGE_SELF, &usage);
    return (double) usage.ru_maxrss*1024;
}

int main(int argc, char ** argv) {
    if (argc != 7) {
        std::fprintf(stderr, "usage: %s <allocator> <tokens> <layers> <heads> <threads> <questions>\n", argv[0]);
        return 1;
    }
    const std::string name = argv[1];
    const int n_tokens = std::atoi(argv[2]), n_layer = std::atoi(argv[3]), n_head = std::atoi(argv[4]);
    const int n_threads = std::atoi(argv[5]), n_questions = std::atoi(argv[6]);

    laprox::allocation a;
    a.n_threads = n_threads;
    a.n_seen    = n_tokens;
    std::mt19937 rng(1);
    for (int layer = 0; layer < n_layer; layer++) {
        a.layer_preference.push_back(1.0);
        for (int head = 0; head < n_head; head++) {
            laprox::head_candidates h;
            h.layer = layer;
            h.head  = head;
            h.pos.reserve(n_tokens);
            h.score.reserve(n_tokens);
            for (int pos = 0; pos < n_tokens; pos++) {
                h.pos.push_back(pos);
                h.score.push_back(std::exp((float) (rng() % 4096)/128.0f) + (float) (rng() % 1024)/1024.0f); // as skewed as attention
            }
            a.heads.push_back(std::move(h));
        }
    }
    const double n_entries = (double) n_tokens*n_layer*n_head;
    const double before = peak_bytes(), c0 = cpu_seconds(), t0 = seconds();
    const laprox::counter count = laprox::find_allocator(name).prepare(a);
    const double t1 = seconds();
    laprox::head_counts counts;
    for (int i = 0; i < n_questions; i++) { // a byte budget asks about 25 times, others once
        counts = count((int64_t) (n_entries*(0.05 + 0.9*i/n_questions)));
    }
    counts = count((int64_t) (n_entries*0.05));
    const double t2 = seconds();
    const laprox::choice chosen = laprox::select(a.heads, counts, n_threads);
    const double t3 = seconds();
    std::printf("%s: %.1f million entries, %d threads: rank %.2f s, %d questions %.2f s, choose %.2f s, together %.2f s, %.2f s of a processor; %.1f bytes per entry\n",
            name.c_str(), n_entries/1e6, n_threads, t1 - t0, n_questions + 1, t2 - t1, t3 - t2, t3 - t0, cpu_seconds() - c0, (peak_bytes() - before)/n_entries);
    return chosen.size() == a.heads.size() ? 0 : 1;
}
