// What a budget means in entries. One definition for the command line, Python, the server and the engine.

#pragma once

#include <cstdint>
#include <string>

namespace laprox {

enum class budget_unit { fraction, tokens, bytes };

struct budget {
    budget_unit unit;
    double      value; // fraction: 0 < value <= 1; tokens per KV head; bytes
};

extern const char * const accepted_budgets;

// "5%", "0.05", "2048", "512MiB". Throws std::invalid_argument, which says what is wrong with the text.
budget parse_budget(const std::string & text);

// Entries that a sequence may keep. n_seen: tokens evaluated; n_pairs: (layer, KV head) pairs.
// Byte budgets have no such number: the engine searches for the largest one whose allocation fits.
int64_t budget_entries(const budget & b, int64_t n_seen, int64_t n_pairs);

}
