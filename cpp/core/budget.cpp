#include "core/budget.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <stdexcept>

namespace laprox {

const char * const accepted_budgets =
    "a share of what was seen (\"5%\" or \"0.05\"), tokens per KV head (\"2048\") or bytes (\"512MiB\")";

[[noreturn]] static void refuse(const std::string & why) {
    throw std::invalid_argument(why);
}

static std::string trim(const std::string & text) {
    const char * blank = " \t\n\r";
    const size_t begin = text.find_first_not_of(blank);
    return begin == std::string::npos ? "" : text.substr(begin, text.find_last_not_of(blank) - begin + 1);
}

budget parse_budget(const std::string & text) {
    struct suffix { const char * name; double scale; };
    static const std::array<suffix, 7> suffixes = {{
        {"KiB", 1024.0}, {"MiB", 1024.0*1024.0}, {"GiB", 1024.0*1024.0*1024.0},
        {"kB", 1e3}, {"KB", 1e3}, {"MB", 1e6}, {"GB", 1e9},
    }};

    const std::string s = trim(text);

    // strtod alone would also take "inf", "nan" and hexadecimal
    if (s.empty() || s.find_first_not_of("0123456789.") == 0) {
        refuse(s.rfind('-', 0) == 0 ? "negative" : "not a number");
    }
    char * end = nullptr;
    const double number = std::strtod(s.c_str(), &end);
    const std::string unit = trim(end);
    if (s.find_first_of("xX") != std::string::npos || !std::isfinite(number)) {
        refuse("not a number");
    }

    budget result { budget_unit::tokens, number };
    if (unit == "%") {
        result = { budget_unit::fraction, number/100.0 };
    } else if (!unit.empty()) {
        const suffix * found = nullptr;
        for (const suffix & candidate : suffixes) {
            if (unit == candidate.name) {
                found = &candidate;
            }
        }
        if (!found) {
            refuse("unknown unit \"" + unit + "\"");
        }
        result = { budget_unit::bytes, std::floor(number*found->scale) };
    } else if (number < 1.0 || s.find('.') != std::string::npos) {
        result.unit = budget_unit::fraction;
    }

    if (!(result.value > 0)) {
        refuse("it must be more than 0");
    }
    if (result.unit == budget_unit::fraction && result.value > 1.0) {
        refuse("more than 100% of what was seen");
    }
    if (result.unit != budget_unit::fraction && (result.value < 1.0 || result.value > 1e15 || result.value != std::floor(result.value))) {
        refuse("not a whole number of tokens or bytes");
    }
    return result;
}

int64_t budget_entries(const budget & b, int64_t n_seen, int64_t n_pairs) {
    if (b.unit == budget_unit::fraction) {
        return (int64_t) std::floor(b.value*(double) (n_seen*n_pairs) + 0.5);
    }
    return (int64_t) std::min(b.value, (double) n_seen)*n_pairs;
}

}
