#include "server/kv_metrics.h"

#include <algorithm>
#include <sstream>

void server_kv_histogram::add(double value) {
    for (size_t i = 0; i < bounds.size(); i++) {
        counts[i] += value <= bounds[i];
    }
    count++;
    sum += value;
}

void server_kv_metrics::add(const laprox_stats & before, const laprox_stats & after) {
    n_compressions  += std::max<int64_t>(0, after.compressions - before.compressions);
    n_recalls       += std::max<int64_t>(0, after.recalls - before.recalls);
    n_recalled      += std::max<int64_t>(0, after.entries_recalled - before.entries_recalled);
    score_seconds   += std::max(0.0, after.score_seconds   - before.score_seconds);
    select_seconds  += std::max(0.0, after.select_seconds  - before.select_seconds);
    compact_seconds += std::max(0.0, after.compact_seconds - before.compact_seconds);
}

std::string server_kv_metrics::to_prometheus() const {
    if (!on) {
        return "";
    }
    std::ostringstream out;
    out.precision(17); // bytes in full

    const auto head = [&](const char * type, const char * name, const char * help) {
        out << "# HELP laprox:" << name << " " << help << "\n# TYPE laprox:" << name << " " << type << "\n";
    };
    const auto value = [&](const char * type, const char * name, const char * help, double number) {
        head(type, name, help);
        out << "laprox:" << name << " " << number << "\n";
    };
    const auto histogram = [&](const char * name, const char * help, const server_kv_histogram & h) {
        head("histogram", name, help);
        for (size_t i = 0; i < h.bounds.size(); i++) {
            std::ostringstream bound;
            bound << h.bounds[i];
            out << "laprox:" << name << "_bucket{le=\"" << bound.str() << "\"} " << h.counts[i] << "\n";
        }
        out << "laprox:" << name << "_bucket{le=\"+Inf\"} " << h.count << "\n"
            << "laprox:" << name << "_sum "   << h.sum   << "\n"
            << "laprox:" << name << "_count " << h.count << "\n";
    };

    value("gauge", "kv_bytes",      "Bytes allocated for the KV cache of all slots", held.kv_bytes);
    value("gauge", "kv_bytes_full", "Bytes that an uncompressed cache of the same tokens would need", held.kv_bytes_full);
    value("gauge", "window_bytes",  "Bytes allocated for the observation windows", held.window_bytes);
    value("gauge", "tokens_seen",   "Tokens evaluated in all slots", held.tokens_seen);
    value("gauge", "entries_held",  "KV cache entries (one K row and one V row) held in all slots", held.entries_held);
    value("gauge", "entries_full",  "KV cache entries that an uncompressed cache would hold", held.entries_full);

    value("gauge", "archived_entries", "KV cache entries in the archives of all slots, held ones included", held.archived_entries);
    value("gauge", "archived_bytes",   "Memory or disk that the archives take", held.archived_bytes);
    value("gauge", "tokens_lost",      "Tokens that were compressed and are in no archive: what was evicted of them can't come back", held.tokens_lost);

    value("counter", "compressions_total",         "Compressions of a slot's KV cache", n_compressions);
    value("counter", "compressions_refused_total", "Compressions that failed and left the cache as it was", n_refused);
    value("counter", "recalls_total",              "Times that entries were chosen for a later prompt, from the archive, too", n_recalls);
    value("counter", "entries_recalled_total",     "Entries that came back from the archive", n_recalled);
    value("counter", "tokens_reread_total",        "Cached prompt tokens evaluated again, because they were compressed for another prompt", n_reread);
    value("counter", "score_seconds_total",        "Time spent scoring entries", score_seconds);
    value("counter", "select_seconds_total",       "Time spent selecting the entries that stay", select_seconds);
    value("counter", "compact_seconds_total",      "Time spent moving them together", compact_seconds);

    histogram("compression_seconds",    "Time taken by the compression at a prompt's end", compression_seconds);
    histogram("compression_kept_ratio", "Share of the entries held after the compression at a prompt's end", compression_kept);
    return out.str();
}
