#include "core/profile.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <queue>
#include <stdexcept>
#include <tuple>

namespace laprox {

std::vector<double> isotonic_increasing(const std::vector<double> & y) {
    struct block { double sum; size_t n; double mean() const { return sum/(double) n; } };
    std::vector<block> blocks;
    for (double value : y) {
        blocks.push_back({ value, 1 });
        while (blocks.size() > 1 && blocks[blocks.size() - 2].mean() > blocks.back().mean()) {
            const block last = blocks.back();
            blocks.pop_back();
            blocks.back().sum += last.sum;
            blocks.back().n   += last.n;
        }
    }
    std::vector<double> fit;
    for (const block & b : blocks) {
        fit.insert(fit.end(), b.n, b.mean());
    }
    return fit;
}

// What the next discard costs, worst score first.
static std::vector<double> marginal_costs(const head_utility & head) {
    const auto rank = [&](uint32_t i) { return std::isnan(head.score[i]) ? -INFINITY : head.score[i]; };
    std::vector<uint32_t> order(head.score.size());
    std::iota(order.begin(), order.end(), 0);
    // equal scores: the earlier position goes first, as in select()
    std::stable_sort(order.begin(), order.end(), [&](uint32_t i, uint32_t j) { return rank(i) < rank(j); });

    std::vector<double> costs;
    for (uint32_t i : order) {
        costs.push_back(head.utility[i]);
    }
    return isotonic_increasing(costs);
}

static void check(const std::vector<head_utility> & heads, int64_t n_tokens) {
    for (const auto & head : heads) {
        if (head.score.size() != head.utility.size()) {
            throw std::invalid_argument("a head has " + std::to_string(head.score.size()) + " scores and " +
                    std::to_string(head.utility.size()) + " utilities");
        }
        if ((int64_t) head.score.size() > n_tokens) {
            throw std::invalid_argument("a head has " + std::to_string(head.score.size()) + " entries, more than the " +
                    std::to_string(n_tokens) + " tokens");
        }
        if (!std::all_of(head.utility.begin(), head.utility.end(), [](float u) { return std::isfinite(u); })) {
            throw std::invalid_argument("a head has a utility that isn't finite");
        }
    }
}

std::vector<double> solve_profile(const std::vector<head_utility> & heads, int64_t n_tokens, int64_t min_keep) {
    check(heads, n_tokens);

    std::vector<std::vector<double>> costs;
    std::vector<int64_t> most; // discards that a head can take
    for (const auto & head : heads) {
        costs.push_back(marginal_costs(head));
        most.push_back(std::clamp<int64_t>(n_tokens - min_keep, 0, (int64_t) head.score.size()));
    }

    using discard = std::tuple<double, int64_t, size_t>; // cost, discards of this head before it, head
    std::priority_queue<discard, std::vector<discard>, std::greater<discard>> cheapest;
    std::vector<int64_t> discarded(heads.size(), 0);
    const auto offer = [&](size_t head) {
        if (discarded[head] < most[head]) {
            cheapest.emplace(costs[head][discarded[head]], discarded[head], head);
        }
    };
    for (size_t head = 0; head < heads.size(); head++) {
        offer(head);
    }

    const int64_t n_entries = (int64_t) heads.size()*n_tokens;
    std::vector<double> evicted;
    int64_t n_discarded = 0;
    for (int32_t percent = 1; percent <= profile_rows; percent++) {
        const int64_t target = (percent*n_entries + 50)/100;
        for (; n_discarded < target && !cheapest.empty(); n_discarded++) {
            const size_t head = std::get<2>(cheapest.top());
            cheapest.pop();
            discarded[head]++;
            offer(head);
        }
        for (int64_t n : discarded) {
            evicted.push_back(n_discarded == target ? (double) n/(double) n_tokens : percent/100.0);
        }
    }
    return evicted;
}

}
