// LU-KV: the solver against exhaustive search, isotonic regression against the convex hull, files read and refused.

#include "check.h"

#include "core/npy.h"
#include "core/profile.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

using laprox::head_utility;

// Slopes of the lower convex hull of the points (k, y[0] + ... + y[k-1]).
static std::vector<double> hull_slopes(const std::vector<double> & y) {
    std::vector<double> height = { 0.0 };
    for (double v : y) {
        height.push_back(height.back() + v);
    }
    std::vector<double> slopes;
    for (size_t at = 0; at + 1 < height.size(); ) {
        // the lowest of all lines to a later point; the furthest of equal ones
        size_t next = at + 1;
        const auto slope_to = [&](size_t i) { return (height[i] - height[at])/(double) (i - at); };
        for (size_t i = at + 1; i < height.size(); i++) {
            next = slope_to(i) <= slope_to(next) ? i : next;
        }
        slopes.insert(slopes.end(), next - at, slope_to(next));
        at = next;
    }
    return slopes;
}

static void test_isotonic_regression() {
    CHECK(laprox::isotonic_increasing({}).empty());
    CHECK(laprox::isotonic_increasing({ 3, 1, 2 }) == (std::vector<double> { 2, 2, 2 }));
    CHECK(laprox::isotonic_increasing({ 1, 3, 2, 4 }) == (std::vector<double> { 1, 2.5, 2.5, 4 }));
    for (int round = 0; round < 2000; round++) {
        std::vector<double> y(below(12));
        for (double & v : y) {
            v = below(9);
        }
        const auto fit = laprox::isotonic_increasing(y), slopes = hull_slopes(y);
        CHECK(fit.size() == y.size() && std::is_sorted(fit.begin(), fit.end()));
        for (size_t i = 0; i < y.size(); i++) {
            CHECK(std::fabs(fit[i] - slopes[i]) < 1e-12);
        }
    }
}

// Utility in the order in which the head gives its entries up.
static std::vector<double> given_up(const head_utility & head) {
    std::vector<size_t> order(head.score.size());
    std::iota(order.begin(), order.end(), 0);
    const auto rank = [&](size_t i) { return std::isnan(head.score[i]) ? -INFINITY : head.score[i]; };
    std::sort(order.begin(), order.end(), [&](size_t i, size_t j) {
        return std::make_pair(rank(i), i) < std::make_pair(rank(j), j);
    });
    std::vector<double> utility;
    for (size_t i : order) {
        utility.push_back(head.utility[i]);
    }
    return utility;
}

// The least loss of all ways to discard n entries; `cost`: what each head's discards cost in their order.
static double least_loss(const std::vector<std::vector<double>> & cost, const std::vector<int64_t> & most, int64_t n,
                         size_t head = 0) {
    if (head == cost.size()) {
        return n == 0 ? 0.0 : std::numeric_limits<double>::infinity();
    }
    double best = std::numeric_limits<double>::infinity(), loss = 0;
    for (int64_t k = 0; k <= std::min(most[head], n); k++) {
        best = std::min(best, loss + least_loss(cost, most, n - k, head + 1));
        loss += k < (int64_t) cost[head].size() ? cost[head][k] : 0.0;
    }
    return best;
}

static void test_solver() {
    for (int round = 0; round < 300; round++) {
        const bool monotone = round % 2;
        const int64_t n_tokens = 1 + below(7), min_keep = below(3);
        std::vector<head_utility> heads(1 + below(3));
        std::vector<std::vector<double>> cost;
        std::vector<int64_t> most;
        for (auto & head : heads) {
            for (int64_t n = below((int) n_tokens + 1); n > 0; n--) {
                head.score.push_back(below(8) ? (float) below(5) : NAN);
                head.utility.push_back((float) below(5));
            }
            if (monotone) { // the scorer knows
                std::sort(head.score.begin(), head.score.end(), [](float a, float b) {
                    return !std::isnan(b) && (std::isnan(a) || a < b);
                });
                std::sort(head.utility.begin(), head.utility.end());
                CHECK(hull_slopes(given_up(head)) == given_up(head));
            }
            cost.push_back(monotone ? given_up(head) : hull_slopes(given_up(head)));
            most.push_back(std::max<int64_t>(0, std::min<int64_t>(n_tokens - min_keep, (int64_t) head.score.size())));
        }
        const int64_t reach = std::accumulate(most.begin(), most.end(), int64_t(0));

        const auto evicted = laprox::solve_profile(heads, n_tokens, min_keep);
        CHECK(evicted.size() == 99*heads.size());
        std::vector<int64_t> before(heads.size(), 0);
        for (int percent = 1; percent <= 99; percent++) {
            const double * row = &evicted[(percent - 1)*heads.size()];
            const int64_t target = (int64_t) std::floor(percent*(double) (n_tokens*(int64_t) heads.size())/100 + 0.5);
            if (target > reach) {
                CHECK(std::all_of(row, row + heads.size(), [&](double share) { return share == percent/100.0; }));
                continue;
            }
            double loss = 0;
            int64_t sum = 0;
            for (size_t i = 0; i < heads.size(); i++) {
                const int64_t n = std::llround(row[i]*(double) n_tokens);
                CHECK(std::fabs(row[i] - (double) n/(double) n_tokens) < 1e-12);
                CHECK(n >= before[i] && n <= most[i]);
                before[i] = n;
                sum += n;
                loss += std::accumulate(cost[i].begin(), cost[i].begin() + n, 0.0);
            }
            CHECK(sum == target);
            CHECK(std::fabs(loss - least_loss(cost, most, target)) < 1e-9);
        }
    }
}

// Entries that were worth nothing are taken from all heads alike.
static void test_equal_costs() {
    const head_utility useless = { std::vector<float>(100, 1.0f), std::vector<float>(100, 0.0f) };
    const auto evicted = laprox::solve_profile({ useless, useless, useless }, 100, 1);
    for (int i = 0; i < 99*3; i++) {
        CHECK(evicted[i] == (i/3 + 1)/100.0);
    }
}

template <typename F>
static std::string refusal(const F & f) {
    try {
        f();
    } catch (const std::exception & e) {
        return e.what();
    }
    return "";
}

static bool contains(const std::string & text, const std::string & part) {
    return text.find(part) != std::string::npos;
}

static void test_solver_refuses() {
    const auto solve = [](head_utility head, int64_t n_tokens) {
        return refusal([&] { laprox::solve_profile({ head }, n_tokens, 0); });
    };
    CHECK(contains(solve({ { 1, 2 }, { 1 } }, 4), "2 scores and 1 utilities"));
    CHECK(contains(solve({ { 1, 2 }, { 1, 2 } }, 1), "2 entries, more than the 1 tokens"));
    CHECK(contains(solve({ { 1, 2 }, { 1, NAN } }, 2), "isn't finite"));
    CHECK(laprox::solve_profile({}, 10, 1).empty());
}

static const auto folder = std::filesystem::temp_directory_path() /
                           ("laprox-test-profile-" + std::to_string(std::random_device()()));

static std::string npy(const std::string & dict, const std::string & data, int version = 1) {
    std::string header = dict;
    const size_t length = version == 1 ? 2 : 4;
    header.append(63 - (8 + length + header.size()) % 64, ' ');
    header += '\n';
    std::string bytes = "\x93NUMPY";
    bytes += (char) version;
    bytes += '\0';
    for (size_t i = 0; i < length; i++) {
        bytes += (char) (header.size() >> 8*i & 0xff);
    }
    return bytes + header + data;
}

static std::string dict(const std::string & shape, const std::string & type = "<f8", const std::string & fortran = "False") {
    return "{'descr': '" + type + "', 'fortran_order': " + fortran + ", 'shape': " + shape + ", }";
}

template <typename T>
static std::string raw(const std::vector<T> & values) {
    return std::string((const char *) values.data(), values.size()*sizeof(T)); // tests run where bytes are little-endian
}

static laprox::profile_file read(const std::string & bytes) {
    const std::string path = (folder / "curve.npy").string();
    std::ofstream(path, std::ios::binary) << bytes;
    return laprox::read_profile(path);
}

static void test_reading() {
    std::vector<double> shares;
    for (int i = 0; i < 99*2*3; i++) {
        shares.push_back(below(65)/64.0);
    }
    const std::vector<float> single(shares.begin(), shares.end());
    const std::string shape = "(99, 2, 3)";
    for (int version : { 1, 2 }) {
        for (const auto & bytes : { npy(dict(shape), raw(shares), version), npy(dict(shape, "<f4"), raw(single), version) }) {
            const auto file = read(bytes);
            CHECK(file.table.n_layer == 2 && file.table.n_head_kv == 3);
            CHECK(file.table.evicted == shares && file.notes.empty());

            const auto noted = read(bytes + "\nlaprox-profile\nscorer laprox\nmodel a b\nempty\n");
            CHECK(noted.table.evicted == shares);
            CHECK(noted.notes == (std::map<std::string, std::string> { { "scorer", "laprox" }, { "model", "a b" }, { "empty", "" } }));
            CHECK(read(bytes + "\nlaprox-profile\n").notes.empty());
        }
    }

    const std::string good = npy(dict(shape), raw(shares));
    const auto refused = [](const std::string & bytes, const std::string & why) {
        const std::string message = refusal([&] { read(bytes); });
        if (!contains(message, "curve.npy: ") || !contains(message, why)) {
            std::printf("\"%s\" instead of \"%s\"\n", message.c_str(), why.c_str());
            std::exit(1);
        }
    };
    refused("", "isn't a .npy file");
    refused("PK\x03\x04 and many more bytes", "isn't a .npy file");
    for (size_t n = 0; n < good.size(); n += n < 160 ? 1 : 97) { // wherever it is cut
        refused(good.substr(0, n), "");
    }
    refused(good.substr(0, 40), "truncated within its header");
    refused(good.substr(0, good.size() - 1), "are too few for shape (99, 2, 3)");
    refused(good + "more", "4 bytes after its array");
    refused(good + "\nlaprox-profile\nscorer lap", "truncated within its notes");
    refused(npy(dict("(98, 2, 3)"), raw(shares)), "shape (98, 2, 3); a budget profile has (99, layers, KV heads)");
    refused(npy(dict("(594,)"), raw(shares)), "shape (594,)");
    refused(npy(dict("()"), raw(shares)), "shape ()");
    refused(npy(dict("(99, 0, 3)"), ""), "shape (99, 0, 3)");
    refused(npy(dict("(999999999999, 999999999999, 999999999999)"), raw(shares)), "too few");
    refused(npy(dict("(9999999999999, 1, 1)"), raw(shares)), "can't be read");
    refused(npy(dict("(99, 2, -3)"), raw(shares)), "can't be read");
    refused(npy(dict(shape, ">f8"), raw(shares)), "'>f8'; accepted: '<f8' (float64), '<f4' (float32)");
    refused(npy(dict(shape, "<i8"), raw(shares)), "'<i8'");
    refused(npy("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (99, 2, 3), }", raw(shares)), "accepted: '<f8'");
    refused(npy(dict(shape, "<f8", "True"), raw(shares)), "Fortran order");
    refused(npy("{'descr': '<f8', 'fortran_order': False, }", raw(shares)), "without shape");
    refused(npy(dict(shape), raw(shares), 3), "version 3");
    for (double bad : { std::nan(""), 1.5, -0.25, HUGE_VAL }) {
        auto wrong = shares;
        wrong[500] = bad;
        refused(npy(dict(shape), raw(wrong)), "accepted: 0 to 1");
    }
    CHECK(contains(refusal([] { laprox::read_profile((folder / "absent.npy").string()); }), "absent.npy: can't be opened"));
    CHECK(contains(refusal([] { laprox::read_profile(folder.string()); }), folder.string() + ": "));
}

int main() {
    test_isotonic_regression();
    test_solver();
    test_equal_costs();
    test_solver_refuses();
    std::filesystem::create_directory(folder);
    test_reading();
    std::filesystem::remove_all(folder);
    std::printf("ok\n");
}
