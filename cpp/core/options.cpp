#include "core/options.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <iterator>
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

// "0-300". Throws std::invalid_argument.
static position_range read_positions(const std::string & text) {
    position_range range;
    char dash = 0, more = 0;
    if (text.empty()) {
        return range;
    }
    if (text.find_first_not_of("0123456789-") != std::string::npos ||
            std::sscanf(text.c_str(), "%9d%c%9d%c", &range.first, &dash, &range.end, &more) != 3 || dash != '-' || range.first < 0 || range.end <= range.first) {
        throw std::invalid_argument("");
    }
    return range;
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
    } else if (const auto * to_positions = std::get_if<position_range option_values::*>(&row.field)) {
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
