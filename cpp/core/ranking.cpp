#include "core/ranking.h"

#include "core/allocate.h"
#include "core/parallel.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace laprox {

float layer_scale::value(float score) const {
    return std::isfinite(score) ? (float) ((score - lowest)/unit) : score;
}

// A score as a number whose order is the score's; NaN is the lowest, and both zeros are the same.
static uint32_t ordered(float score) {
    score = std::isnan(score) ? -std::numeric_limits<float>::infinity() : score + 0.0f;
    uint32_t bits;
    memcpy(&bits, &score, sizeof(bits));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static float score_of(uint32_t order) {
    const uint32_t bits = order & 0x80000000u ? order & 0x7fffffffu : ~order;
    float score;
    memcpy(&score, &bits, sizeof(score));
    return score;
}

ranking::ranking(const head_candidates * begin, const head_candidates * end, int n_threads) :
        heads(begin), sorted(end - begin) {
    sort(n_threads);
}

ranking::ranking(const head_candidates * begin, const head_candidates * end, std::vector<layer_scale> of_heads, int n_threads) :
        heads(begin), scales(std::move(of_heads)), sorted(end - begin) {
    sort(n_threads);
}

// By digits of 11 bits, from the lowest on; entries that are equal in a digit stay in their order.
template <typename Entry> static void sort_by_order(std::vector<Entry> & entries, std::vector<Entry> & scratch) {
    static const uint32_t n_bits = 11, n_digits = 3, n_buckets = 1 << n_bits;
    std::vector<uint32_t> starts(n_digits*n_buckets, 0);
    for (const Entry & e : entries) {
        for (uint32_t digit = 0; digit < n_digits; digit++) {
            starts[digit*n_buckets + (e.order >> digit*n_bits & (n_buckets - 1))]++;
        }
    }
    scratch.resize(entries.size());
    for (uint32_t digit = 0; digit < n_digits; digit++) {
        uint32_t * start = starts.data() + digit*n_buckets;
        if (std::any_of(start, start + n_buckets, [&](uint32_t n) { return n == entries.size(); })) {
            continue; // all alike
        }
        for (uint32_t bucket = 0, sum = 0; bucket < n_buckets; bucket++) {
            const uint32_t n = start[bucket];
            start[bucket] = sum;
            sum += n;
        }
        for (const Entry & e : entries) {
            scratch[start[e.order >> digit*n_bits & (n_buckets - 1)]++] = e;
        }
        entries.swap(scratch);
    }
}

void ranking::sort(int n_threads) {
    parallel_for(sorted.size(), n_threads, [&](size_t row) {
        const head_candidates & h = heads[row];
        std::vector<entry> & entries = sorted[row];
        entries.reserve(h.score.size());
        // the later position first, and of those that share one, the first
        for (size_t end = h.score.size(); end > 0;) {
            size_t begin = end - 1;
            while (begin > 0 && h.pos[begin - 1] == h.pos[end - 1]) {
                begin--;
            }
            for (size_t i = begin; i < end; i++) {
                entries.push_back({ ~ordered(h.score[i]), (uint32_t) i });
            }
            end = begin;
        }
        static thread_local std::vector<entry> scratch;
        sort_by_order(entries, scratch);
        scratch.clear();
        scratch.shrink_to_fit();
    });
}

uint32_t ranking::value_of(size_t row, size_t i) const {
    const uint32_t order = ~sorted[row][i].order;
    return scales.empty() ? order : ordered(scales[row].value(score_of(order)));
}

// How many of a head's entries from `first` on are worth more; what a score is worth never falls where the score rises.
size_t ranking::count_above(size_t row, size_t first, uint32_t value) const {
    size_t low = first, high = sorted[row].size();
    while (low < high) {
        const size_t middle = low + (high - low)/2;
        if (value_of(row, middle) > value) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low - first;
}

// n of the entries [begin, end) of each head, which are all worth the same, go to the latest positions.
void ranking::share_ties(std::vector<int64_t> & counts, const std::vector<size_t> & begin, const std::vector<size_t> & end, int64_t n) const {
    std::vector<std::vector<int32_t>> pos(sorted.size()); // where scores differ that are worth the same, they are in another order
    const auto at = [&](size_t row, size_t i) { return pos[row].empty() ? heads[row].pos[sorted[row][begin[row] + i].index] : pos[row][i]; };
    int64_t n_all = 0, low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
    for (size_t row = 0; row < sorted.size(); row++) {
        const size_t n_ties = end[row] - begin[row];
        n_all += (int64_t) n_ties;
        if (n_ties == 0) {
            continue;
        }
        if (sorted[row][begin[row]].order != sorted[row][end[row] - 1].order) {
            for (size_t i = begin[row]; i < end[row]; i++) {
                pos[row].push_back(heads[row].pos[sorted[row][i].index]);
            }
            std::sort(pos[row].begin(), pos[row].end(), std::greater<int32_t>());
        }
        high = std::max<int64_t>(high, at(row, 0));
        low  = std::min<int64_t>(low, at(row, n_ties - 1));
    }
    if (n >= n_all) {
        for (size_t row = 0; row < sorted.size(); row++) {
            counts[row] += (int64_t) (end[row] - begin[row]);
        }
        return;
    }
    const auto n_after = [&](size_t row, int64_t position) {
        size_t a = 0, b = end[row] - begin[row];
        while (a < b) {
            const size_t middle = a + (b - a)/2;
            if (at(row, middle) > position) {
                a = middle + 1;
            } else {
                b = middle;
            }
        }
        return (int64_t) a;
    };
    const auto all_after = [&](int64_t position) {
        int64_t sum = 0;
        for (size_t row = 0; row < sorted.size(); row++) {
            sum += n_after(row, position);
        }
        return sum;
    };
    // the last position behind which there are at most n: high qualifies
    low--;
    while (high - low > 1) {
        const int64_t middle = low + (high - low)/2;
        (all_after(middle) <= n ? high : low) = middle;
    }
    n -= all_after(high);
    for (size_t row = 0; row < sorted.size(); row++) {
        const int64_t after = n_after(row, high);
        const int64_t here  = std::min(n_after(row, high - 1) - after, n);
        counts[row] += after + here;
        n -= here;
    }
}

std::vector<int64_t> ranking::best(int64_t n_keep, double floor) const {
    std::vector<int64_t> counts(sorted.size(), 0);
    std::vector<size_t>  first(sorted.size(), 0);
    const int64_t least = counts.empty() ? 0 : (int64_t) (floor*(double) n_keep/(double) counts.size());
    int64_t n_all = 0;
    for (size_t row = 0; row < sorted.size(); row++) {
        first[row]  = std::min<size_t>(std::max<int64_t>(least, 0), sorted[row].size());
        counts[row] = (int64_t) first[row];
        n_keep -= counts[row];
        n_all  += (int64_t) (sorted[row].size() - first[row]);
    }
    n_keep = std::clamp<int64_t>(n_keep, 0, n_all);
    if (n_keep == 0) {
        return counts;
    }
    const auto all_above = [&](uint32_t value) {
        int64_t sum = 0;
        for (size_t row = 0; row < sorted.size(); row++) {
            sum += (int64_t) count_above(row, first[row], value);
        }
        return sum;
    };
    // the lowest value above which there are fewer than n_keep: that of the last one to be kept
    uint32_t low = 0, high = std::numeric_limits<uint32_t>::max();
    while (low < high) {
        const uint32_t middle = low + (high - low)/2;
        if (all_above(middle) < n_keep) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    std::vector<size_t> begin(sorted.size()), end(sorted.size());
    for (size_t row = 0; row < sorted.size(); row++) {
        const size_t above = count_above(row, first[row], low);
        counts[row] += (int64_t) above;
        n_keep      -= (int64_t) above;
        begin[row] = first[row] + above;
        end[row]   = low == 0 ? sorted[row].size() : first[row] + count_above(row, first[row], low - 1);
    }
    share_ties(counts, begin, end, n_keep);
    return counts;
}

}
