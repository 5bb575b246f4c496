// What /metrics says about the compressing KV cache, under our own prefix.

#pragma once

#include "laprox.h"

#include <cstdint>
#include <string>
#include <vector>

// Cumulative counts per upper bound, as Prometheus wants them.
struct server_kv_histogram {
    std::vector<double>   bounds;
    std::vector<uint64_t> counts = std::vector<uint64_t>(bounds.size(), 0);
    uint64_t count = 0;
    double   sum   = 0;

    void add(double value);
};

struct server_kv_metrics {
    bool on = false;

    laprox_stats held {}; // of all slots, now

    // since the server started
    uint64_t n_compressions = 0;
    uint64_t n_refused      = 0; // compressions that failed; the cache stayed as it was
    uint64_t n_reread       = 0; // cached prompt tokens evaluated again: they were compressed for another prompt
    uint64_t n_recalls       = 0;
    uint64_t n_recalled      = 0; // entries
    double   score_seconds   = 0;
    double   select_seconds  = 0;
    double   compact_seconds = 0;

    server_kv_histogram compression_seconds { {0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30} };
    server_kv_histogram compression_kept    { {0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1} };

    // What the engine did between two looks at it.
    void add(const laprox_stats & before, const laprox_stats & after);

    std::string to_prometheus() const;
};
