// Every allocator against brute force on random small cases: ties, NaN, -inf, ragged heads, layers of any number of
// heads. Weights are whole numbers here, so that what the allocators do in floating point is exact on this side.

#include "check.h"

#include "core/allocate.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

using laprox::allocation;
using laprox::head_candidates;
using laprox::head_counts;
using weights = std::vector<int64_t>;

static const float inf = std::numeric_limits<float>::infinity();

// A few distinct scores only, so that most choices are made by position, layer and head.
static float random_score(bool strange) {
    static const float scores[] = { 0.0f, -0.0f, 0.25f, 1.0f, 3.0f, -1.0f, -inf, NAN };
    return scores[below(strange ? 8 : 5)];
}

static allocation random_case() {
    const bool strange = below(2), two_stage = below(2), one_shot = below(2);
    const int n_pos = 1 + below(12);
    allocation a;
    int32_t layer = below(2);
    for (int n_layer = 1 + below(4); n_layer > 0; n_layer--, layer += 1 + below(2)) {
        const int n_head = 1 + below(3);
        for (int head = 0; head < n_head; head++) {
            head_candidates h;
            h.layer = layer;
            h.head  = head;
            for (int pos = one_shot ? 0 : below(3); pos < n_pos; pos += one_shot ? 1 : 1 + below(3)) {
                h.pos.push_back(pos);
                h.score.push_back(random_score(strange));
                if (two_stage) {
                    h.second.push_back(random_score(strange));
                }
            }
            h.n_protected = below(3);
            a.heads.push_back(h);
        }
        a.layer_preference.push_back(below(4));
    }
    return a;
}

static float rank_of(float score) { return std::isnan(score) ? -inf : score; }

static int64_t n_candidates(const std::vector<head_candidates> & heads) {
    int64_t n = 0;
    for (const auto & h : heads) {
        n += (int64_t) h.score.size();
    }
    return n;
}

static head_counts rooms(const std::vector<head_candidates> & heads) {
    head_counts room;
    for (const auto & h : heads) {
        room.push_back((int64_t) h.score.size());
    }
    return room;
}

static std::vector<std::vector<head_candidates>> layers_of(const std::vector<head_candidates> & heads) {
    std::vector<std::vector<head_candidates>> layers;
    for (const auto & h : heads) {
        if (layers.empty() || layers.back().back().layer != h.layer) {
            layers.emplace_back();
        }
        layers.back().push_back(h);
    }
    return layers;
}

// One full place at a time, in whole numbers.
static head_counts shared_out(weights weight, const head_counts & room, int64_t total) {
    head_counts share(room.size(), 0);
    std::vector<bool> done(room.size(), false);
    total = std::max<int64_t>(0, std::min(total, std::accumulate(room.begin(), room.end(), int64_t(0))));
    for (;;) {
        int64_t all = 0;
        for (size_t i = 0; i < room.size(); i++) {
            done[i] = done[i] || room[i] == 0;
            all += done[i] ? 0 : weight[i];
        }
        if (all == 0) {
            std::fill(weight.begin(), weight.end(), 1);
            all = std::count(done.begin(), done.end(), false);
        }
        size_t full = 0;
        while (full < room.size() && (done[full] || total*weight[full] < room[full]*all)) {
            full++;
        }
        if (full == room.size()) {
            std::vector<std::pair<int64_t, size_t>> remainders;
            int64_t left = total;
            for (size_t i = 0; i < room.size(); i++) {
                if (!done[i]) {
                    share[i] = total*weight[i]/all;
                    left -= share[i];
                    remainders.emplace_back(-(total*weight[i] % all), i);
                }
            }
            std::sort(remainders.begin(), remainders.end());
            for (int64_t i = 0; i < left; i++) {
                share[remainders[i].second]++;
            }
            return share;
        }
        share[full] = room[full];
        total -= room[full];
        done[full] = true;
    }
}

// Which of each head's candidates are among the best of all.
static laprox::choice best(const std::vector<head_candidates> & heads, int64_t n_keep) {
    std::vector<std::tuple<float, int, int, int, size_t, uint32_t>> all;
    for (size_t row = 0; row < heads.size(); row++) {
        for (uint32_t i = 0; i < heads[row].pos.size(); i++) {
            all.emplace_back(-rank_of(heads[row].score[i]), -heads[row].pos[i], heads[row].layer, heads[row].head, row, i);
        }
    }
    std::sort(all.begin(), all.end());
    laprox::choice kept(heads.size());
    for (int64_t i = 0; i < std::min<int64_t>(n_keep, (int64_t) all.size()); i++) {
        kept[std::get<4>(all[i])].push_back(std::get<5>(all[i]));
    }
    for (auto & indices : kept) {
        std::sort(indices.begin(), indices.end());
    }
    return kept;
}

static head_counts sizes(const laprox::choice & kept) {
    head_counts counts;
    for (const auto & indices : kept) {
        counts.push_back((int64_t) indices.size());
    }
    return counts;
}

// A layer's scores from its lowest (if negative) upward, divided by their sum.
static std::vector<head_candidates> normalised(const std::vector<head_candidates> & heads) {
    std::vector<head_candidates> out;
    for (auto layer : layers_of(heads)) {
        double lowest = 0, sum = 0;
        for (const auto & h : layer) {
            for (float s : h.score) {
                lowest = std::isfinite(s) && s < lowest ? s : lowest;
            }
        }
        for (const auto & h : layer) {
            for (float s : h.score) {
                sum += std::isfinite(s) ? s - lowest : 0;
            }
        }
        for (auto & h : layer) {
            for (float & s : h.score) {
                s = std::isfinite(s) ? (float) ((s - lowest)/(sum > 0 ? sum : 1)) : s;
            }
            out.push_back(h);
        }
    }
    return out;
}

static void check_valid(const allocation & a, const head_counts & counts, int64_t n_keep) {
    CHECK(counts.size() == a.heads.size());
    int64_t sum = 0;
    for (size_t i = 0; i < counts.size(); i++) {
        CHECK(counts[i] >= 0 && counts[i] <= (int64_t) a.heads[i].score.size());
        sum += counts[i];
    }
    CHECK(sum == std::max<int64_t>(0, std::min(n_keep, n_candidates(a.heads))));
}

static void each_case(const std::function<void(const allocation & a, int64_t n_keep)> & check) {
    for (int round = 0; round < 3000; round++) {
        const allocation a = random_case();
        check(a, below((int) n_candidates(a.heads) + 4) - 1);
    }
}

// What the allocator gives, after checking that it is allowed to.
static head_counts counts_of(const char * name, const allocation & a, int64_t n_keep) {
    const head_counts counts = laprox::find_allocator(name).count(a, n_keep);
    check_valid(a, counts, n_keep);
    return counts;
}

static void test_apportion() {
    for (int round = 0; round < 20000; round++) {
        weights weight;
        head_counts room;
        for (int n = below(7); n > 0; n--) {
            weight.push_back(below(3) ? below(10) : 0);
            room.push_back(below(8));
        }
        const int64_t total = below(40) - 2;
        CHECK(laprox::apportion({ weight.begin(), weight.end() }, room, total) == shared_out(weight, room, total));
    }
    CHECK(laprox::apportion({ NAN, -1, INFINITY, 1 }, { 9, 9, 9, 9 }, 5) == (head_counts { 0, 0, 0, 5 }));
    CHECK(laprox::apportion({ NAN, -1, INFINITY, 1 }, { 9, 9, 9, 1 }, 7) == (head_counts { 2, 2, 2, 1 }));
    CHECK(laprox::apportion({ 1e300, 1e-300, 1 }, { 1, 1, 1ll << 40 }, 1ll << 40) == (head_counts { 1, 0, (1ll << 40) - 1 }));
}

static void test_global() {
    each_case([](const allocation & a, int64_t n_keep) {
        const auto best_normalised = best(normalised(a.heads), n_keep);
        CHECK(counts_of("global", a, n_keep) == sizes(best_normalised));
        CHECK(counts_of("global-raw", a, n_keep) == sizes(best(a.heads, n_keep)));

        auto one_stage = a.heads;
        for (auto & h : one_stage) {
            h.second.clear();
        }
        CHECK(laprox::select(one_stage, counts_of("global-raw", a, n_keep)) == best(a.heads, n_keep));
        CHECK(laprox::select(one_stage, counts_of("global", a, n_keep)) == best_normalised);
    });
}

static void test_uniform() {
    each_case([](const allocation & a, int64_t n_keep) {
        CHECK(counts_of("uniform", a, n_keep) == shared_out(weights(a.heads.size(), 1), rooms(a.heads), n_keep));
    });
}

using within = std::function<head_counts(const std::vector<head_candidates> & layer, int64_t n_keep)>;

static head_counts by_layer(const allocation & a, weights weight, int64_t n_keep, const within & share) {
    const auto layers = layers_of(a.heads);
    head_counts room, counts;
    for (size_t i = 0; i < layers.size(); i++) {
        room.push_back(n_candidates(layers[i]));
        weight[i] *= (int64_t) layers[i].size();
    }
    const head_counts totals = shared_out(weight, room, n_keep);
    for (size_t i = 0; i < layers.size(); i++) {
        for (int64_t count : share(layers[i], totals[i])) {
            counts.push_back(count);
        }
    }
    return counts;
}

static head_counts equally(const std::vector<head_candidates> & layer, int64_t n_keep) {
    return shared_out(weights(layer.size(), 1), rooms(layer), n_keep);
}

// 0.8 of what the head won, 0.2 of the layer's mean: in whole numbers, 4 x won x heads + entries.
static head_counts adaptively(const std::vector<head_candidates> & layer, int64_t n_keep) {
    weights weight;
    for (int64_t won : sizes(best(layer, n_keep))) {
        weight.push_back(4*won*(int64_t) layer.size() + n_keep);
    }
    return shared_out(weight, rooms(layer), n_keep);
}

static void test_pyramid() {
    each_case([](const allocation & a, int64_t n_keep) {
        const int64_t n_layer = (int64_t) layers_of(a.heads).size(), n_head = (int64_t) a.heads.size();
        const int64_t keep = std::max<int64_t>(0, std::min(n_keep, n_candidates(a.heads)));
        const head_counts room = rooms(a.heads);
        // times 20 n_head
        int64_t bottom = 39*keep, top = keep;
        const int64_t available = 20*n_head**std::max_element(room.begin(), room.end());
        if (bottom >= available) {
            bottom = available;
            top    = 40*keep - available;
        }
        weights weight;
        for (int64_t i = 0; i < n_layer; i++) {
            weight.push_back(n_layer == 1 ? 1 : bottom*(n_layer - 1) - i*(bottom - top));
        }
        CHECK(counts_of("pyramid", a, n_keep) == by_layer(a, weight, n_keep, equally));
    });

    // 4 layers of 2 heads, 100 entries each, 20 kept on average: 39, 26.33, 13.67, 1
    allocation a;
    for (int32_t i = 0; i < 8; i++) {
        a.heads.push_back({ i/2, i%2, std::vector<int32_t>(100), std::vector<float>(100), {} });
    }
    CHECK(counts_of("pyramid", a, 160) == (head_counts { 39, 39, 27, 26, 14, 13, 1, 1 }));
}

static void test_ada() {
    each_case([](const allocation & a, int64_t n_keep) {
        const weights equal(layers_of(a.heads).size(), 1);
        CHECK(counts_of("ada", a, n_keep) == by_layer(a, equal, n_keep, adaptively));
    });
}

static void test_lava() {
    each_case([](const allocation & a, int64_t n_keep) {
        weights weight;
        for (const auto & layer : layers_of(normalised(a.heads))) {
            double entropy = 0, sum = 0;
            for (const auto & h : layer) {
                for (float p : h.score) {
                    if (std::isfinite(p) && p > 0) {
                        entropy -= p*std::log(p);
                        sum += p;
                    }
                }
            }
            const int64_t n = n_candidates(layer);
            // to a millionth: shares above are single precision
            weight.push_back(sum == 0 || n < 2 ? 1000000 : std::llround(1e6*entropy/std::log((double) n)));
        }
        const auto counts = counts_of("lava", a, n_keep), expected = by_layer(a, weight, n_keep, adaptively);
        // a remainder within a millionth of another may go to either layer
        const auto layers = layers_of(a.heads);
        size_t i = 0;
        for (const auto & layer : layers) {
            int64_t total = 0, expected_total = 0;
            const head_counts own(counts.begin() + i, counts.begin() + i + layer.size());
            for (size_t end = i + layer.size(); i < end; i++) {
                total += counts[i];
                expected_total += expected[i];
            }
            CHECK(std::abs(total - expected_total) <= 1);
            CHECK(own == adaptively(layer, total));
        }
    });

    // a layer whose score is spread over all gets four times what a layer with a quarter of the entropy gets
    allocation a;
    a.heads.push_back({ 0, 0, std::vector<int32_t>(16), std::vector<float>(16, 0.5f), {} });
    a.heads.push_back({ 1, 0, std::vector<int32_t>(16), std::vector<float>(16, 0.0f), {} });
    a.heads[1].score[3] = a.heads[1].score[9] = 7.0f;
    CHECK(counts_of("lava", a, 10) == (head_counts { 8, 2 }));
}

static void test_cake() {
    each_case([](const allocation & a, int64_t n_keep) {
        const weights weight(a.layer_preference.begin(), a.layer_preference.end());
        CHECK(counts_of("cake", a, n_keep) == by_layer(a, weight, n_keep, equally));
    });
}

static void test_profile() {
    laprox::budget_profile table;
    table.n_layer   = 9;
    table.n_head_kv = 3;
    const auto at = [&](int row, int layer, int head) { return (row*9 + layer)*3 + head; };
    std::vector<int64_t> hundredths; // evicted, [99, 9, 3]
    for (int i = 0; i < 99*9*3; i++) {
        hundredths.push_back(below(101));
        table.evicted.push_back((double) hundredths.back()/100);
    }
    each_case([&](allocation a, int64_t n_keep) {
        a.profile = &table;
        a.n_seen  = below(2)*20;
        const int64_t keep = std::max<int64_t>(0, std::min(n_keep, n_candidates(a.heads)));

        int64_t all = 0, left = keep;
        for (const auto & h : a.heads) {
            all  += std::max(a.n_seen, (int64_t) h.score.size() + h.n_protected);
            left += h.n_protected;
        }
        // the overall eviction in percent is percent/all
        const int64_t percent = all ? std::min(99*all, std::max(all, 100*(all - left))) : 0;
        const int64_t row     = all ? std::min<int64_t>(percent/all, 98) : 1;
        const int64_t beyond  = all ? percent - row*all : 0;
        weights weight; // times 100 all
        for (const auto & h : a.heads) {
            const int64_t n = std::max(a.n_seen, (int64_t) h.score.size() + h.n_protected);
            const int64_t evicted = (all - beyond)*hundredths[at((int) row - 1, h.layer, h.head)] +
                                    beyond*hundredths[at((int) row, h.layer, h.head)];
            weight.push_back(std::max<int64_t>(0, n*(100*all - evicted) - h.n_protected*100*all));
        }
        CHECK(counts_of("profile", a, n_keep) == shared_out(weight, rooms(a.heads), n_keep));
    });
}

static void test_profile_reaches_its_targets() {
    // two heads of 100 entries, 10 of them protected; of 20% overall the first gives 30%, the second 10%
    laprox::budget_profile table { 1, 2, {} };
    for (int i = 0; i < 99; i++) {
        table.evicted.push_back(0.015*(i + 1));
        table.evicted.push_back(0.005*(i + 1));
    }
    allocation a;
    a.profile = &table;
    for (int32_t head = 0; head < 2; head++) {
        a.heads.push_back({ 0, head, std::vector<int32_t>(90), std::vector<float>(90), {}, 10 });
    }
    CHECK(counts_of("profile", a, 160 - 20) == (head_counts { 60, 80 }));
    // a second time, when 40 of each are left of the 100 that were seen
    for (auto & h : a.heads) {
        h.pos.resize(30);
        h.score.resize(30);
    }
    a.n_seen = 100;
    CHECK(counts_of("profile", a, 40) == (head_counts { 10, 30 })); // 70% overall: nothing to the first, 55 to the second
}

static void test_select() {
    each_case([](const allocation & a, int64_t n_keep) {
        const head_counts counts = laprox::find_allocator("uniform").count(a, n_keep);
        const auto kept = laprox::select(a.heads, counts);
        CHECK(kept.size() == a.heads.size());
        for (size_t row = 0; row < kept.size(); row++) {
            const auto & h = a.heads[row];
            std::vector<uint32_t> left(h.score.size()), expected;
            std::iota(left.begin(), left.end(), 0);
            const auto take = [&](const std::vector<float> & score, int64_t n) {
                std::sort(left.begin(), left.end(), [&](uint32_t i, uint32_t j) {
                    return std::make_tuple(-rank_of(score[i]), -h.pos[i]) < std::make_tuple(-rank_of(score[j]), -h.pos[j]);
                });
                expected.insert(expected.end(), left.begin(), left.begin() + n);
                left.erase(left.begin(), left.begin() + n);
            };
            const int64_t first = h.second.empty() ? counts[row] : counts[row]/2;
            take(h.score, first);
            take(h.second.empty() ? h.score : h.second, counts[row] - first);
            std::sort(expected.begin(), expected.end());
            CHECK(kept[row] == expected);
        }
    });
}

template <typename F>
static std::string refusal(const F & f) {
    try {
        f();
    } catch (const std::invalid_argument & e) {
        return e.what();
    }
    return "";
}

static void test_table() {
    for (int32_t i = 0; i < laprox::n_allocators(); i++) {
        const laprox::allocator & one = laprox::allocator_at(i);
        CHECK(&laprox::find_allocator(one.name) == &one);
        // nothing to share out
        laprox::budget_profile table { 1, 1, std::vector<double>(99, 0.5) };
        allocation a;
        a.profile = &table;
        CHECK(one.count(a, 5).empty());
        a.heads.push_back({ 0, 0, {}, {}, {} });
        a.layer_preference = { 1.0 };
        CHECK(one.count(a, 5) == head_counts { 0 });
    }
    CHECK(refusal([] { laprox::find_allocator("globl"); }).find("globl\"; accepted: global, global-raw,") != std::string::npos);

    allocation a;
    a.heads.push_back({ 1, 0, { 1 }, { 1.0f }, {} });
    CHECK(refusal([&] { laprox::find_allocator("cake").count(a, 1); }).find("got 0 for 1 layers") != std::string::npos);
    CHECK(refusal([&] { laprox::find_allocator("profile").count(a, 1); }).find("needs a profile") != std::string::npos);
    laprox::budget_profile small { 1, 1, std::vector<double>(99, 0.5) };
    a.profile = &small;
    CHECK(refusal([&] { laprox::find_allocator("profile").count(a, 1); }).find("no layer 1, head 0") != std::string::npos);
}

int main() {
    test_apportion();
    test_global();
    test_uniform();
    test_pyramid();
    test_ada();
    test_lava();
    test_cake();
    test_profile();
    test_profile_reaches_its_targets();
    test_select();
    test_table();
    std::printf("ok\n");
}
