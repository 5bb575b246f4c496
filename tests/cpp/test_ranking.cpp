// One ranking that answers many questions, against sorting everything for each: scores that differ but are worth the same,
// equal ones, infinities, NaN, floors, ragged heads, any number of threads.

#include "check.h"

#include "core/allocate.h"
#include "core/ranking.h"
#include "core/scores.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

using laprox::allocation;
using laprox::head_candidates;

static float random_score(int kind) {
    switch (kind) {
        case 0:  return (float) below(1 << 24)/(1 << 24);
        case 1:  return (float) below(5);                            // mostly ties
        case 2:  return 1.0f + (float) below(64)/(1 << 23);          // neighbours, which a division merges
        case 3:  return (float) below(1000) - 500.0f;
        default: return below(20) == 0 ? NAN : below(20) == 0 ? -std::numeric_limits<float>::infinity() : std::exp((float) below(60) - 30.0f);
    }
}

static allocation random_case(int kind) {
    allocation a;
    const int n_layer = 1 + below(4), n_head = 1 + below(4);
    for (int layer = 0; layer < n_layer; layer++) {
        for (int head = 0; head < n_head; head++) {
            head_candidates h;
            h.layer = layer;
            h.head  = head;
            const int n = below(8) == 0 ? 0 : below(300);
            for (int pos = 0; (int) h.pos.size() < n; pos += 1 + below(3)) {
                h.pos.push_back(pos);
                h.score.push_back(random_score(kind));
            }
            a.heads.push_back(h);
        }
    }
    return a;
}

// What is ranked, best first: (worth, position, layer, head, row).
static std::vector<int64_t> by_sorting(const allocation & a, bool global, int64_t n_keep) {
    std::vector<std::vector<float>> worth;
    for (size_t i = 0; i < a.heads.size();) {
        size_t end = i;
        std::vector<std::vector<float>> layer;
        while (end < a.heads.size() && a.heads[end].layer == a.heads[i].layer) {
            layer.push_back(a.heads[end++].score);
        }
        if (global) {
            laprox::normalise_layer(layer);
        }
        worth.insert(worth.end(), layer.begin(), layer.end());
        i = end;
    }
    const int64_t least = (int64_t) (a.floor*(double) n_keep/(double) a.heads.size());
    std::vector<int64_t> counts(a.heads.size(), 0);
    std::vector<std::tuple<float, int32_t, int32_t, int32_t, size_t>> all;
    int64_t n = n_keep;
    for (size_t row = 0; row < a.heads.size(); row++) {
        const head_candidates & h = a.heads[row];
        const auto rank = [](float score) { return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score; };
        std::vector<size_t> order(h.score.size());
        for (size_t i = 0; i < order.size(); i++) {
            order[i] = i;
        }
        std::sort(order.begin(), order.end(), [&](size_t i, size_t j) {
            return std::make_tuple(-rank(h.score[i]), -h.pos[i]) < std::make_tuple(-rank(h.score[j]), -h.pos[j]);
        });
        for (size_t i = 0; i < order.size(); i++) {
            if ((int64_t) i < least) {
                counts[row]++;
                n--;
            } else {
                all.emplace_back(-rank(worth[row][order[i]]), -h.pos[order[i]], h.layer, h.head, row);
            }
        }
    }
    std::sort(all.begin(), all.end());
    for (int64_t i = 0; i < std::min<int64_t>(n, (int64_t) all.size()); i++) {
        counts[std::get<4>(all[i])]++;
    }
    return counts;
}

int main() {
    for (int i = 0; i < 400; i++) {
        allocation a = random_case(i % 5);
        int64_t n_all = 0;
        for (const auto & h : a.heads) {
            n_all += (int64_t) h.score.size();
        }
        a.floor     = below(3) ? 0.0 : below(11)/10.0;
        a.n_threads = 1 + below(4);
        for (const bool global : { true, false }) {
            const laprox::counter count = laprox::find_allocator(global ? "global" : "global-raw").prepare(a);
            for (int question = 0; question < 6; question++) {
                const int64_t n_keep = question == 0 ? 0 : question == 1 ? n_all : below((int) n_all + 10);
                CHECK(count(n_keep) == by_sorting(a, global, n_keep));
            }
            const laprox::head_counts counts = count(n_all/3);
            CHECK(laprox::select(a.heads, counts, 1) == laprox::select(a.heads, counts, 4));
        }
    }
    std::printf("ok\n");
}
