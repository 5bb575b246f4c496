// The rows of the settings, and texts against what they mean.

#include "check.h"

#include "core/options.h"

#include <cmath>
#include <stdexcept>
#include <string>

using laprox::budget_unit;

// The reason of a refusal; "": it wasn't refused, and that is what the text is now.
static std::string refused(const std::string & name, const std::string & text, const std::string & before_names = "") {
    laprox::option_texts texts(before_names);
    try {
        texts.set(laprox::find_option(name), text);
    } catch (const std::invalid_argument & e) {
        CHECK(texts.get(laprox::find_option(name)) == laprox::find_option(name).initial);
        return e.what();
    }
    CHECK(texts.get(laprox::find_option(name)) == text);
    return "";
}

static laprox::option_values given(const std::string & name, const std::string & text) {
    laprox::option_texts texts;
    texts.set(laprox::find_option(name), text);
    return texts.values();
}

static void test_rows() {
    laprox::option_texts texts;
    for (const laprox::option & row : laprox::options) {
        const laprox::option & found = laprox::find_option(row.name);
        CHECK(std::string(found.name) == row.name && found.help[0] != 0 && found.value[0] != 0);
        texts.set(found, row.initial); // what stands where none is given can be given
    }
    const laprox::option_values v = texts.values();
    CHECK(v.policy_name == "laprox" && v.budget.unit == budget_unit::fraction && v.budget.value == 0.2);
    CHECK(v.window == 32 && v.sink == 4 && v.recent == 32 && v.min_tokens == 512 && v.prefill == "dense");
    CHECK(v.profile.empty() && v.gates.empty() && v.floor == 0.0f);
    try {
        laprox::find_option("widow");
        CHECK(false);
    } catch (const std::invalid_argument & e) {
        CHECK(std::string(e.what()).find("there is no setting \"widow\"; accepted: budget, policy, window") == 0);
    }
}

static void test_budgets() {
    const struct { const char * text; budget_unit unit; double value; } cases[] = {
        { "5%",   budget_unit::fraction, 0.05  }, { "100%",   budget_unit::fraction, 1.0      }, { "0.05",   budget_unit::fraction, 0.05     },
        { "2.5%", budget_unit::fraction, 0.025 }, { "2048",   budget_unit::tokens,   2048     }, { "1",      budget_unit::tokens,   1        },
        { "1GB",  budget_unit::bytes,    1e9   }, { "512MiB", budget_unit::bytes,    512 << 20 }, { "64KiB", budget_unit::bytes,    64 << 10 },
        { "2GB",  budget_unit::bytes,    2e9   }, { "500kB",  budget_unit::bytes,    500e3    }, { "1.5GiB", budget_unit::bytes,    1.5*(1 << 30) },
    };
    for (const auto & c : cases) {
        const laprox::budget b = given("budget", c.text).budget;
        CHECK(b.unit == c.unit && std::abs(b.value - c.value) <= 1e-12*c.value);
    }
    for (const char * text : { "0", "0%", "0.0", "-3%", "-5", "abc", "", " ", "5%%", "%", "120%", "nan", "inf", "1e400", "5 apples", "-1MiB",
                               "0MiB", "5TB5", "1.5", "0x10", "MiB" }) {
        CHECK(refused("budget", text).find("budget is \"" + std::string(text) + "\" (") == 0);
        CHECK(refused("budget", text).find("; accepted: a share") != std::string::npos);
    }
    CHECK(refused("budget", "5 apples").find("unknown unit \"apples\"") != std::string::npos);
    CHECK(refused("budget", "-5%").find("negative") != std::string::npos);
    CHECK(refused("budget", "101%").find("more than 100% of what was seen") != std::string::npos);
}

static void test_numbers() {
    const struct { const char * name; const char * least; const char * most; } ranges[] = {
        { "window", "1", "1024" }, { "sink", "0", "1048576" }, { "recent", "1", "1048576" }, { "min_tokens", "0", "1073741824" },
    };
    for (const auto & range : ranges) {
        const std::string accepted = std::string("; accepted: an integer from ") + range.least + " to " + range.most;
        CHECK(refused(range.name, range.least).empty() && refused(range.name, range.most).empty());
        const std::string beyond = std::to_string(std::stoll(range.most) + 1);
        for (const std::string & text : { beyond, std::string("-1"), std::string(""), std::string(" 8"), std::string("8.0"), std::string("many"),
                                          std::string("0x8"), std::string("99999999999999999999") }) {
            CHECK(refused(range.name, text) == std::string(range.name) + " is \"" + text + "\"" + accepted);
        }
    }
    CHECK(given("min_tokens", "1073741824").min_tokens == 1 << 30);
    CHECK(given("floor", "0.25").floor == 0.25f && given("floor", "1e-05").floor == 1e-05f);
    for (const char * text : { "1.5", "-0.1", "nan", "", "1e", "--" }) {
        CHECK(refused("floor", text) == "floor is \"" + std::string(text) + "\"; accepted: a number from 0 to 1");
    }
}

static void test_names() {
    CHECK(given("prefill", "chunked").prefill == "chunked");
    for (const char * text : { "lazy", "", "dense, chunked", "dense,", "DENSE" }) {
        CHECK(refused("prefill", text) == "prefill is \"" + std::string(text) + "\"; accepted: dense, chunked");
    }
    CHECK(refused("min_tokens", "x", "--kv-").find("--kv-min-tokens is \"x\"; accepted: ") == 0);
    CHECK(refused("min_tokens", "x", "kv_").find("kv_min_tokens is \"x\"; accepted: ") == 0);
}

static void test_positions() {
    const auto read = [](const std::string & text) {
        std::string result;
        for (const auto & r : given("protect", text).protect) {
            result += "[" + std::to_string(r.first) + ", " + std::to_string(r.end) + ")";
        }
        return result;
    };
    CHECK(read("") == "" && read("0-300") == "[0, 300)" && read("7-8,500-600") == "[7, 8)[500, 600)");
    CHECK(read("500-600,7-8") == "[7, 8)[500, 600)"); // in any order, and overlapping
    CHECK(read("5-9,1-5") == "[1, 9)" && read("1-90,5-6,80-95,97-98") == "[1, 95)[97, 98)");
    for (const char * text : { "5", "5-5", "9-3", "-1-3", "1-2-3", "a-b", "0-", "-", " 0-3", "0 - 3", "0-9999999999", "0x0-3", "0-3,", ",0-3", "0-3,,4-5" }) {
        CHECK(refused("protect", text) == "protect is \"" + std::string(text) + "\"; accepted: positions FIRST-END, such as 0-300 or 0-20,80-300");
    }
    const auto ranges = given("protect", "2-4,6-9").protect;
    for (int pos = 0; pos < 12; pos++) {
        CHECK(laprox::holds(ranges, pos) == ((pos >= 2 && pos < 4) || (pos >= 6 && pos < 9)));
    }
    const int within[] = { 0, 0, 0, 1, 2, 2, 2, 3, 4, 5, 5, 5 };
    for (int n = 0; n < 12; n++) {
        CHECK(laprox::count_within(ranges, n) == within[n]);
    }
    CHECK(laprox::count_within({}, 100) == 0);
}

int main() {
    test_positions();
    test_rows();
    test_budgets();
    test_numbers();
    test_names();
}
