// Budgets, length classes and score transforms against brute force on random small cases.

#include "check.h"

#include "core/budget.h"
#include "core/classes.h"
#include "core/placement.h"
#include "core/scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <vector>

static void test_pooling() {
    for (int n : { 0, 1, 2, 6, 7, 8, 50 }) {
        for (int kernel : { 1, 3, 7 }) {
            std::vector<float> score(n);
            for (float & s : score) {
                s = (float) below(100)/8;
            }
            const auto pooled = laprox::average_pool(score.data(), score.size(), kernel);
            CHECK(pooled.size() == score.size());
            for (int i = 0; i < n; i++) {
                double sum = 0;
                for (int j = i - kernel/2; j <= i + kernel/2; j++) {
                    sum += j >= 0 && j < n ? score[j] : 0;
                }
                CHECK(pooled[i] == (float) (sum/kernel));
            }

            const auto highest = laprox::max_pool(score.data(), score.size(), kernel);
            CHECK(highest.size() == score.size());
            for (int i = 0; i < n; i++) {
                const auto begin = score.begin() + std::max(0, i - kernel/2);
                const auto end   = score.begin() + std::min(n, i + kernel/2 + 1);
                CHECK(highest[i] == *std::max_element(begin, end));
            }
        }
    }
}

static void test_normalisation() {
    std::vector<std::vector<float>> heads = { { 1, 2 }, {}, { 5 } };
    laprox::normalise_layer(heads);
    CHECK(heads == (std::vector<std::vector<float>> { { 0.125f, 0.25f }, {}, { 0.625f } }));

    std::vector<std::vector<float>> zeros = { { 0, 0 }, { 0 } };
    laprox::normalise_layer(zeros);
    CHECK(zeros == (std::vector<std::vector<float>> { { 0, 0 }, { 0 } }));

    // the lowest of the layer becomes 0
    std::vector<std::vector<float>> negative = { { -3, -1 }, { 3, -3 } };
    laprox::normalise_layer(negative);
    CHECK(negative == (std::vector<std::vector<float>> { { 0, 0.25f }, { 0.75f, 0 } }));

    std::vector<std::vector<float>> equal = { { -3, -3 }, { -3 } };
    laprox::normalise_layer(equal);
    CHECK(equal == (std::vector<std::vector<float>> { { 0, 0 }, { 0 } }));

    const float inf = std::numeric_limits<float>::infinity();
    std::vector<std::vector<float>> strange = { { -inf, 1, NAN }, { 3, inf } };
    laprox::normalise_layer(strange);
    CHECK(strange[0][0] == -inf && strange[0][1] == 0.25f && std::isnan(strange[0][2]));
    CHECK(strange[1] == (std::vector<float> { 0.75f, inf }));
}

static void test_max_pool_of_strange_scores() {
    const float inf = std::numeric_limits<float>::infinity();
    const float scores[] = { NAN, -2, -inf, NAN, NAN, NAN };
    CHECK(laprox::max_pool(scores, 6, 3) == (std::vector<float> { -2, -2, -2, -inf, -inf, -inf }));
}

static void test_budgets() {
    using laprox::budget_unit;
    // half an entry is an entry; what is seen is counted over all pairs before it is rounded
    CHECK(laprox::budget_entries({ budget_unit::fraction, 0.05 }, 1000, 16) == 800);
    CHECK(laprox::budget_entries({ budget_unit::fraction, 0.5 }, 1, 1) == 1);
    CHECK(laprox::budget_entries({ budget_unit::fraction, 0.1 }, 101, 3) == 30);
    CHECK(laprox::budget_entries({ budget_unit::fraction, 1.0 }, 131072, 1024) == 131072ll*1024);
    CHECK(laprox::budget_entries({ budget_unit::tokens, 100 }, 1000, 16) == 1600);
    CHECK(laprox::budget_entries({ budget_unit::tokens, 100 }, 30, 16) == 480);
}

// The fewest rows that `n_classes` classes can store, over all ways to group the heads.
static uint64_t fewest_rows(const std::vector<uint32_t> & padded, uint32_t n_classes) {
    uint64_t best = std::numeric_limits<uint64_t>::max();
    std::vector<uint32_t> group(padded.size(), 0);
    for (;;) {
        std::vector<uint32_t> longest(n_classes, 0), members(n_classes, 0);
        for (size_t i = 0; i < padded.size(); i++) {
            longest[group[i]] = std::max(longest[group[i]], padded[i]);
            members[group[i]]++;
        }
        uint64_t rows = 0;
        for (uint32_t c = 0; c < n_classes; c++) {
            rows += (uint64_t) longest[c]*members[c];
        }
        best = std::min(best, rows);

        size_t i = 0;
        while (i < group.size() && ++group[i] == n_classes) {
            group[i++] = 0;
        }
        if (i == group.size()) {
            return best;
        }
    }
}

static void test_classes() {
    for (int round = 0; round < 300; round++) {
        const uint32_t block = round % 2 ? 8 : 1, max_classes = 1 + below(3);
        std::vector<uint32_t> n_kept(1 + below(7));
        for (uint32_t & n : n_kept) {
            n = below(4) ? below(200) : 40;
        }
        const auto classes = laprox::plan_classes(n_kept, max_classes, block, 0.05);
        CHECK(!classes.empty() && classes.size() <= std::min<size_t>(max_classes, n_kept.size()));

        std::vector<uint32_t> padded;
        uint64_t exact = 0, rows = 0;
        for (uint32_t n : n_kept) {
            padded.push_back((n + block - 1)/block*block);
            exact += padded.back();
        }
        std::set<uint32_t> seen;
        for (const auto & c : classes) {
            CHECK(!c.heads.empty() && std::is_sorted(c.heads.begin(), c.heads.end()) && c.n_rows % block == 0);
            for (uint32_t head : c.heads) {
                CHECK(head < n_kept.size() && seen.insert(head).second && n_kept[head] <= c.n_rows);
            }
            rows += (uint64_t) c.n_rows*c.heads.size();
        }
        CHECK(seen.size() == n_kept.size());
        CHECK(rows == fewest_rows(padded, (uint32_t) classes.size()));
        // one class fewer would have wasted too much
        CHECK(classes.size() == 1 || (double) fewest_rows(padded, (uint32_t) classes.size() - 1) > 1.05*(double) exact);

        std::vector<uint32_t> order;
        for (const auto & c : classes) {
            order.insert(order.end(), c.heads.begin(), c.heads.end());
        }
        CHECK(laprox::in_head_order(classes) == std::is_sorted(order.begin(), order.end()));
    }
}

static void test_placement() {
    CHECK(laprox::reason_misplaced({}).empty());
    CHECK(laprox::reason_misplaced({ { 0, 128, "CUDA0", "CUDA0" }, { 1, 128, "CUDA1", "CUDA1" } }).empty());
    const std::string reason = laprox::reason_misplaced({ { 0, 128, "CUDA0", "CUDA0" }, { 1, 200, "CUDA1", "CPU" } });
    for (const char * part : { "CUDA1", "layer 1", "200", "CPU", "policy off" }) {
        CHECK(reason.find(part) != std::string::npos);
    }
}

int main() {
    test_placement();
    test_pooling();
    test_max_pool_of_strange_scores();
    test_normalisation();
    test_budgets();
    test_classes();
    std::printf("ok\n");
}
