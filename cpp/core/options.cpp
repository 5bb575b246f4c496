#include "core/options.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace laprox {

static bool is(const option & row, const char * kind) {
    return std::string(row.kind) == kind;
}

static std::string plain(double number) {
    return number == std::floor(number) ? std::to_string((int64_t) number) : std::to_string(number);
}

const option & find_option(const std::string & name) {
    std::string names;
    for (const option & row : options) {
        if (name == row.name) {
            return row;
        }
        names += (names.empty() ? "" : ", ") + std::string(row.name);
    }
    throw std::invalid_argument("there is no setting \"" + name + "\"; accepted: " + names);
}

std::string accepted_values(const option & row) {
    if (is(row, "budget")) {
        return accepted_budgets;
    }
    if (is(row, "integer") || is(row, "number")) {
        return (is(row, "integer") ? "an integer from " : "a number from ") + plain(row.low) + " to " + plain(row.high);
    }
    return is(row, "path") ? "the path of a file" : row.choices;
}

bool holds(const position_ranges & ranges, int32_t pos) {
    return std::any_of(ranges.begin(), ranges.end(), [&](const position_range & r) { return pos >= r.first && pos < r.end; });
}

int64_t count_within(const position_ranges & ranges, int64_t n) {
    int64_t result = 0;
    for (const position_range & r : ranges) {
        result += std::max<int64_t>(std::min<int64_t>(n, r.end) - r.first, 0);
    }
    return result;
}

// "0-300,500-600"; they may overlap. Throws std::invalid_argument.
static position_ranges read_positions(const std::string & text) {
    position_ranges given;
    std::stringstream all(text);
    for (std::string one; std::getline(all, one, ',');) {
        position_range r;
        char dash = 0, more = 0;
        if (one.find_first_not_of("0123456789-") != std::string::npos || std::sscanf(one.c_str(), "%9d%c%9d%c", &r.first, &dash, &r.end, &more) != 3 ||
                dash != '-' || r.first < 0 || r.end <= r.first) {
            throw std::invalid_argument("");
        }
        given.push_back(r);
    }
    if (!text.empty() && text.back() == ',') {
        throw std::invalid_argument("");
    }
    std::sort(given.begin(), given.end(), [](const auto & p, const auto & q) { return p.first < q.first; });
    position_ranges apart;
    for (const position_range & r : given) {
        if (!apart.empty() && r.first <= apart.back().end) {
            apart.back().end = std::max(apart.back().end, r.end);
        } else {
            apart.push_back(r);
        }
    }
    return apart;
}

// `text` as a value of the row. Throws std::invalid_argument that says what is wrong with it, empty where that is plain.
static void read_value(const option & row, const std::string & text, option_values & values) {
    const auto number = [&](const char * characters) {
        char * end = nullptr;
        const double value = std::strtod(text.c_str(), &end); // alone it would take "inf", "0x1" and blanks before it
        if (text.empty() || text.find_first_not_of(characters) != std::string::npos || *end != 0 || !(value >= row.low && value <= row.high)) {
            throw std::invalid_argument("");
        }
        return value;
    };
    if (const auto * to_budget = std::get_if<laprox::budget option_values::*>(&row.field)) {
        const laprox::budget read = parse_budget(text);
        if (is(row, "space") && read.unit == budget_unit::tokens) {
            throw std::invalid_argument("");
        }
        values.*(*to_budget) = read;
    } else if (const auto * to_positions = std::get_if<position_ranges option_values::*>(&row.field)) {
        values.*(*to_positions) = read_positions(text);
    } else if (const auto * to_integer = std::get_if<int32_t option_values::*>(&row.field)) {
        values.*(*to_integer) = (int32_t) number("0123456789");
    } else if (const auto * to_number = std::get_if<float option_values::*>(&row.field)) {
        values.*(*to_number) = (float) number("0123456789.e-");
    } else {
        const std::string known = std::string(", ") + row.choices + ", ";
        if (is(row, "choice") && (text.find_first_of(", ") != std::string::npos || text.empty() || known.find(", " + text + ", ") == std::string::npos)) {
            throw std::invalid_argument("");
        }
        values.*std::get<std::string option_values::*>(row.field) = text;
    }
}

option_texts::option_texts(const std::string & before) : before_names(before) {
    for (const option & row : options) {
        texts.push_back(row.initial);
    }
}

void option_texts::set(const option & row, const std::string & text) {
    option_values values;
    try {
        read_value(row, text, values);
    } catch (const std::invalid_argument & e) {
        refuse(row, text, e.what(), accepted_values(row));
    }
    texts[&row - options] = text;
}

const std::string & option_texts::get(const option & row) const {
    return texts[&row - options];
}

option_values option_texts::values() const {
    option_values result;
    for (const option & row : options) {
        read_value(row, get(row), result);
    }
    return result;
}

std::string option_texts::spell(const option & row) const {
    std::string name = row.name;
    if (!before_names.empty() && before_names.back() == '-') {
        for (char & c : name) {
            c = c == '_' ? '-' : c;
        }
    }
    return before_names + name;
}

void option_texts::refuse(const option & row, const std::string & text, const std::string & why, const std::string & accepted) const {
    throw std::invalid_argument(spell(row) + " is \"" + text + "\"" + (why.empty() ? "" : " (" + why + ")") + "; accepted: " + accepted);
}

}
