#include "core/allocate.h"

#include "core/profile.h"
#include "core/scores.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <tuple>

namespace laprox {

static float rank_of(float score) {
    return std::isnan(score) ? -std::numeric_limits<float>::infinity() : score;
}

// The heads of one layer.
struct layer_heads {
    const head_candidates * first;
    const head_candidates * last;

    const head_candidates * begin() const { return first; }
    const head_candidates * end()   const { return last; }
    size_t                  size()  const { return last - first; }
};

static std::vector<layer_heads> layers_of(const allocation & a) {
    std::vector<layer_heads> layers;
    for (const auto & h : a.heads) {
        if (layers.empty() || layers.back().first->layer != h.layer) {
            layers.push_back({ &h, &h });
        }
        layers.back().last = &h + 1;
    }
    return layers;
}

template <typename Heads>
static head_counts room_of(const Heads & heads) {
    head_counts room;
    for (const head_candidates & h : heads) {
        room.push_back((int64_t) h.score.size());
    }
    return room;
}

static int64_t sum(const head_counts & counts) {
    return std::accumulate(counts.begin(), counts.end(), int64_t(0));
}

head_counts apportion(const std::vector<double> & weight, const head_counts & room, int64_t total) {
    head_counts share(room.size(), 0);
    std::vector<size_t> open; // not full yet
    for (size_t i = 0; i < room.size(); i++) {
        if (room[i] > 0) {
            open.push_back(i);
        }
    }
    total = std::clamp<int64_t>(total, 0, sum(room));

    const auto usable = [&](size_t i) { return std::isfinite(weight[i]) && weight[i] > 0 ? weight[i] : 0.0; };
    std::vector<double> ideal(room.size());
    while (!open.empty()) {
        double all = 0.0;
        for (size_t i : open) {
            all += usable(i);
        }
        for (size_t i : open) {
            ideal[i] = all > 0 ? (double) total*usable(i)/all : (double) total/(double) open.size();
        }
        // A place that is full leaves more to the others, never less: no place filled here would be reopened.
        const auto full = std::stable_partition(open.begin(), open.end(), [&](size_t i) {
            return ideal[i] < (double) room[i];
        });
        if (full == open.end()) {
            break;
        }
        for (auto i = full; i != open.end(); ++i) {
            // never short of entries: ideals add up to the total, but for rounding
            share[*i] = std::min(room[*i], total);
            total -= share[*i];
        }
        open.erase(full, open.end());
    }

    for (size_t i : open) {
        share[i] = (int64_t) ideal[i];
        total -= share[i];
    }
    // Remainders that are equal in exact arithmetic are equal as floats: the last bits of a double would decide, and
    // differ between compilers.
    const auto remainder = [&](size_t i) { return (float) (ideal[i] - (double) share[i]); };
    std::stable_sort(open.begin(), open.end(), [&](size_t i, size_t j) { return remainder(i) > remainder(j); });
    for (int64_t i = 0; i < total; i++) {
        share[open[i]]++;
    }
    return share;
}

// What competes: a head's candidates under the scores that decide.
struct contender {
    const head_candidates * head;
    const float * score;
};

static std::vector<contender> with_own_scores(const layer_heads & heads) {
    std::vector<contender> contenders;
    for (const auto & h : heads) {
        contenders.push_back({ &h, h.score.data() });
    }
    return contenders;
}

// How many of each contender's candidates are among the best n_keep of all; equal scores: later position, then lower
// layer, then lower head.
static head_counts count_best(const std::vector<contender> & contenders, int64_t n_keep) {
    head_counts counts(contenders.size(), 0);

    std::vector<float> ranks;
    for (const auto & c : contenders) {
        std::transform(c.score, c.score + c.head->score.size(), std::back_inserter(ranks), rank_of);
    }
    n_keep = std::clamp<int64_t>(n_keep, 0, (int64_t) ranks.size());
    if (n_keep == 0) {
        return counts;
    }

    // The n-th best score splits the candidates into kept, dropped and a few equal ones; ordering only the latter
    // keeps the selection linear in the number of entries of the model.
    std::nth_element(ranks.begin(), ranks.begin() + (n_keep - 1), ranks.end(), std::greater<float>());
    const float threshold = ranks[n_keep - 1];

    struct tie { int32_t pos; int32_t layer; int32_t head; size_t row; };
    std::vector<tie> ties;
    for (size_t row = 0; row < contenders.size(); row++) {
        const head_candidates & h = *contenders[row].head;
        for (size_t i = 0; i < h.score.size(); i++) {
            const float rank = rank_of(contenders[row].score[i]);
            if (rank > threshold) {
                counts[row]++;
                n_keep--;
            } else if (rank == threshold) {
                ties.push_back({ h.pos[i], h.layer, h.head, row });
            }
        }
    }
    std::nth_element(ties.begin(), ties.begin() + (n_keep - 1), ties.end(), [](const tie & a, const tie & b) {
        return std::tie(b.pos, a.layer, a.head) < std::tie(a.pos, b.layer, b.head);
    });
    for (int64_t i = 0; i < n_keep; i++) {
        counts[ties[i].row]++;
    }
    return counts;
}

// The same after every contender has taken its best `floor` times the average first.
static head_counts count_best(const std::vector<contender> & contenders, int64_t n_keep, double floor) {
    const int64_t least = contenders.empty() ? 0 : (int64_t) (floor*(double) n_keep/(double) contenders.size());
    if (least <= 0) {
        return count_best(contenders, n_keep);
    }
    head_counts counts;
    std::vector<head_candidates> rest;
    for (const auto & c : contenders) {
        const head_candidates & h = *c.head;
        std::vector<size_t> order(h.score.size());
        std::iota(order.begin(), order.end(), size_t(0));
        const size_t taken = std::min<size_t>(least, order.size());
        std::nth_element(order.begin(), order.begin() + taken, order.end(), [&](size_t i, size_t j) {
            return std::make_tuple(rank_of(c.score[i]), h.pos[i]) > std::make_tuple(rank_of(c.score[j]), h.pos[j]);
        });
        counts.push_back((int64_t) taken);
        rest.push_back({ h.layer, h.head, {}, {}, {}, 0 });
        for (size_t i = taken; i < order.size(); i++) {
            rest.back().pos.push_back(h.pos[order[i]]);
            rest.back().score.push_back(c.score[order[i]]);
        }
    }
    const head_counts more = count_best(with_own_scores({ rest.data(), rest.data() + rest.size() }), n_keep - sum(counts));
    for (size_t i = 0; i < counts.size(); i++) {
        counts[i] += more[i];
    }
    return counts;
}

// LaProx, Algorithm 2 (arXiv 2605.07234): one ranking over the whole model of what an entry weighs in its layer.
static head_counts count_global(const allocation & a, int64_t n_keep) {
    std::vector<std::vector<std::vector<float>>> normalised;
    std::vector<contender> contenders;
    for (const auto & heads : layers_of(a)) {
        std::vector<std::vector<float>> scores;
        for (const auto & h : heads) {
            scores.push_back(h.score);
        }
        normalise_layer(scores);
        for (size_t i = 0; i < heads.size(); i++) {
            contenders.push_back({ heads.first + i, scores[i].data() });
        }
        normalised.push_back(std::move(scores)); // moves the vectors, not what they hold
    }
    return count_best(contenders, n_keep, a.floor);
}

// The same by raw scores: for scores that can be compared over the model as they are, as those of retention gates.
static head_counts count_global_raw(const allocation & a, int64_t n_keep) {
    return count_best(with_own_scores({ a.heads.data(), a.heads.data() + a.heads.size() }), n_keep, a.floor);
}

static head_counts equally(const layer_heads & heads, int64_t n_keep) {
    return apportion(std::vector<double>(heads.size(), 1.0), room_of(heads), n_keep);
}

static head_counts count_uniform(const allocation & a, int64_t n_keep) {
    return equally({ a.heads.data(), a.heads.data() + a.heads.size() }, n_keep);
}

// Ada-KV's budgets within a layer (arXiv 2407.11550): heads compete for the layer's entries by raw score, and the
// share `alpha` of them is spread evenly whatever comes out. The authors' code mixes the two counts; kvpress
// protects the evenly spread part and lets heads compete for the rest. The authors round each head by itself, so
// that a layer may miss its total by half an entry per head; here the total is exact.
static head_counts adaptively(const layer_heads & heads, int64_t n_keep) {
    const double alpha = 0.2;
    const double base  = (double) n_keep/(double) heads.size();
    std::vector<double> mix;
    for (int64_t won : count_best(with_own_scores(heads), n_keep)) {
        mix.push_back((1.0 - alpha)*(double) won + alpha*base);
    }
    return apportion(mix, room_of(heads), n_keep);
}

// Layers get their totals in proportion to `weight` per head, then share them out within.
static head_counts by_layer(const allocation & a, const std::vector<double> & weight, int64_t n_keep,
                            head_counts (*within)(const layer_heads & heads, int64_t n_keep)) {
    const auto layers = layers_of(a);
    std::vector<double> weights;
    head_counts rooms;
    for (size_t i = 0; i < layers.size(); i++) {
        weights.push_back(weight[i]*(double) layers[i].size());
        rooms.push_back(sum(room_of(layers[i])));
    }
    const head_counts totals = apportion(weights, rooms, n_keep);

    head_counts counts;
    for (size_t i = 0; i < layers.size(); i++) {
        const head_counts own = within(layers[i], totals[i]);
        counts.insert(counts.end(), own.begin(), own.end());
    }
    return counts;
}

// PyramidKV (arXiv 2406.02069): budgets fall linearly from the bottom layer to the top one, which is left with
// 1/beta of the average. Where the bottom layer could not use its budget, the slope is as steep as it can be.
// The authors fall back to equal layers when entries number less than twice the average; here the slope flattens by
// itself, without a jump. Their integer step, which loses up to one entry per layer, is a fraction here.
static head_counts count_pyramid(const allocation & a, int64_t n_keep) {
    const double beta = 20.0;
    const size_t n_layer = layers_of(a).size();
    const head_counts room = room_of(a.heads);
    if (n_layer == 0) {
        return {};
    }

    const double average   = (double) std::clamp<int64_t>(n_keep, 0, sum(room))/(double) room.size();
    const double available = (double) *std::max_element(room.begin(), room.end());
    double bottom = 2.0*average - average/beta;
    double top    = average/beta;
    if (bottom >= available) {
        bottom = available;
        top    = 2.0*average - available;
    }
    std::vector<double> weight;
    for (size_t i = 0; i < n_layer; i++) {
        weight.push_back(n_layer > 1 ? bottom - (double) i*(bottom - top)/(double) (n_layer - 1) : average);
    }
    return by_layer(a, weight, n_keep, equally);
}

static head_counts count_ada(const allocation & a, int64_t n_keep) {
    return by_layer(a, std::vector<double>(layers_of(a).size(), 1.0), n_keep, adaptively);
}

// How evenly a layer's score is spread over its candidates: from 0, one has it all, to 1. Scores count from the
// layer's lowest where that is negative, as in normalise_layer().
static double normalised_entropy(const layer_heads & heads) {
    size_t n = 0;
    double lowest = 0.0;
    for (const auto & h : heads) {
        for (float score : h.score) {
            lowest = std::isfinite(score) ? std::min(lowest, (double) score) : lowest;
        }
        n += h.score.size();
    }
    double all = 0.0, all_log = 0.0;
    for (const auto & h : heads) {
        for (float score : h.score) {
            const double x = score - lowest;
            if (std::isfinite(score) && x > 0) {
                all     += x;
                all_log += x*std::log(x);
            }
        }
    }
    // scores that are all the same are spread as evenly as can be, also when they are 0
    return n < 2 || all == 0.0 ? 1.0 : std::max(0.0, std::log(all) - all_log/all)/std::log((double) n);
}

// LAVa's layer budgets from the entropy of the layer's scores, Ada-KV's heads within. The authors know all layers
// only at the end of a prefill and lower budgets as they go; scores of all layers are here at once.
static head_counts count_lava(const allocation & a, int64_t n_keep) {
    std::vector<double> weight;
    for (const auto & heads : layers_of(a)) {
        weight.push_back(normalised_entropy(heads));
    }
    return by_layer(a, weight, n_keep, adaptively);
}

// CAKE's layer budgets (arXiv 2503.12491) from the preference that its scorer computes. The authors share out what
// full layers leave over evenly and in one round, which may miss the total; here in proportion, and exactly.
static head_counts count_cake(const allocation & a, int64_t n_keep) {
    const size_t n_layer = layers_of(a).size();
    if (a.layer_preference.size() != n_layer) {
        throw std::invalid_argument("allocator \"cake\" needs a preference per layer; got " +
                std::to_string(a.layer_preference.size()) + " for " + std::to_string(n_layer) + " layers");
    }
    return by_layer(a, a.layer_preference, n_keep, equally);
}

// LU-KV at run time (arXiv 2602.08585). Between two rows of the table the share is interpolated; the authors take the
// nearest. The table counts every entry of a head, protected ones and those evicted before included, so that
// compressing in two steps aims at the same lengths as in one.
static head_counts count_profile(const allocation & a, int64_t n_keep) {
    if (!a.profile) {
        throw std::invalid_argument("allocator \"profile\" needs a profile");
    }
    const budget_profile & table = *a.profile;
    const head_counts room = room_of(a.heads);
    n_keep = std::clamp<int64_t>(n_keep, 0, sum(room));

    std::vector<double> entries;
    double n_all = 0.0, n_left = (double) n_keep;
    for (size_t i = 0; i < a.heads.size(); i++) {
        const auto & h = a.heads[i];
        if (h.layer < 0 || h.layer >= table.n_layer || h.head < 0 || h.head >= table.n_head_kv) {
            throw std::invalid_argument("profile of " + std::to_string(table.n_layer) + " layers with " +
                    std::to_string(table.n_head_kv) + " KV heads has no layer " + std::to_string(h.layer) +
                    ", head " + std::to_string(h.head));
        }
        entries.push_back((double) std::max(a.n_seen, room[i] + h.n_protected));
        n_all  += entries.back();
        n_left += (double) h.n_protected;
    }

    const double percent = n_all > 0 ? std::clamp(100.0*(1.0 - n_left/n_all), 1.0, (double) profile_rows) : 1.0;
    const int32_t row    = std::min((int32_t) percent - 1, profile_rows - 2);
    const double  beyond = percent - 1.0 - row;
    const size_t  stride = (size_t) table.n_layer*table.n_head_kv;
    std::vector<double> target;
    for (size_t i = 0; i < a.heads.size(); i++) {
        const size_t at = row*stride + (size_t) a.heads[i].layer*table.n_head_kv + a.heads[i].head;
        const double evicted = (1.0 - beyond)*table.evicted[at] + beyond*table.evicted[at + stride];
        const double beyond_protected = (1.0 - evicted)*entries[i] - (double) a.heads[i].n_protected;
        target.push_back(beyond_protected > 1e-6 ? beyond_protected : 0.0); // rounding errors weigh nothing
    }
    return apportion(target, room, n_keep);
}

static const std::array<allocator, 8> allocators = {{
    { "global",     nullptr,            count_global },
    { "global-raw", nullptr,            count_global_raw },
    { "uniform",    nullptr,            count_uniform },
    { "pyramid",    nullptr,            count_pyramid },
    { "ada",        nullptr,            count_ada },
    { "lava",       nullptr,            count_lava },
    { "cake",       "layer_preference", count_cake },
    { "profile",    "profile",          count_profile },
}};

int32_t n_allocators() {
    return (int32_t) allocators.size();
}

const allocator & allocator_at(int32_t i) {
    return allocators.at((size_t) i);
}

const allocator & find_allocator(const std::string & name) {
    std::string names;
    for (const allocator & a : allocators) {
        if (name == a.name) {
            return a;
        }
        names += std::string(names.empty() ? "" : ", ") + a.name;
    }
    throw std::invalid_argument("unknown allocator \"" + name + "\"; accepted: " + names);
}

// Moves the best n of the indices from `begin` on to the front.
static void best_first(const head_candidates & h, const std::vector<float> & score, std::vector<uint32_t> & indices,
                       size_t begin, size_t n) {
    if (n == 0 || begin + n >= indices.size()) {
        return;
    }
    std::nth_element(indices.begin() + begin, indices.begin() + begin + n, indices.end(), [&](uint32_t i, uint32_t j) {
        const float a = rank_of(score[i]), b = rank_of(score[j]);
        return std::tie(b, h.pos[j], i) < std::tie(a, h.pos[i], j);
    });
}

choice select(const std::vector<head_candidates> & heads, const head_counts & counts) {
    choice kept;
    for (size_t row = 0; row < heads.size(); row++) {
        const auto & h = heads[row];
        const size_t n = (size_t) std::clamp<int64_t>(counts[row], 0, (int64_t) h.score.size());
        std::vector<uint32_t> indices(h.score.size());
        std::iota(indices.begin(), indices.end(), 0);

        const size_t first_stage = h.second.empty() ? n : n/2;
        best_first(h, h.score, indices, 0, first_stage);
        if (!h.second.empty()) {
            best_first(h, h.second, indices, first_stage, n - first_stage);
        }
        indices.resize(n);
        std::sort(indices.begin(), indices.end());
        kept.push_back(std::move(indices));
    }
    return kept;
}

}
