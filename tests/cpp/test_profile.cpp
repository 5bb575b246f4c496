// LU-KV: the solver against exhaustive search, isotonic regression against the convex hull.

#include "check.h"

#include "core/profile.h"

#include <algorithm>
#include <cmath>
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

int main() {
    test_isotonic_regression();
    test_solver();
    test_equal_costs();
    test_solver_refuses();
    std::printf("ok\n");
}
