#include "core/allocate.h"

#include "core/parallel.h"
#include "core/profile.h"
#include "core/ranking.h"
#include "core/scores.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <numeric>
#include <stdexcept>

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

// LaProx, Algorithm 2 (arXiv 2605.07234): one ranking over the whole model of what an entry weighs in its layer.
static counter prepare_global(const allocation & a) {
    const auto layers = layers_of(a);
    std::vector<std::vector<layer_scale>> by_layer(layers.size());
    parallel_for(layers.size(), a.n_threads, [&](size_t i) {
        std::vector<const std::vector<float> *> scores;
        for (const auto & h : layers[i]) {
            scores.push_back(&h.score);
        }
        by_layer[i].assign(layers[i].size(), scale_of_layer(scores));
    });
    std::vector<layer_scale> scales;
    for (const auto & own : by_layer) {
        scales.insert(scales.end(), own.begin(), own.end());
    }
    auto ranks = std::make_shared<ranking>(a.heads.data(), a.heads.data() + a.heads.size(), std::move(scales), a.n_threads);
    return [ranks, floor = a.floor](int64_t n_keep) { return ranks->best(n_keep, floor); };
}

// The same by raw scores: for scores that can be compared over the model as they are, as those of retention gates.
static counter prepare_global_raw(const allocation & a) {
    auto ranks = std::make_shared<ranking>(a.heads.data(), a.heads.data() + a.heads.size(), a.n_threads);
    return [ranks, floor = a.floor](int64_t n_keep) { return ranks->best(n_keep, floor); };
}

static counter equally(const layer_heads & heads, int) {
    return [room = room_of(heads)](int64_t n_keep) { return apportion(std::vector<double>(room.size(), 1.0), room, n_keep); };
}

static counter prepare_uniform(const allocation & a) {
    return equally({ a.heads.data(), a.heads.data() + a.heads.size() }, a.n_threads);
}

// Ada-KV's budgets within a layer (arXiv 2407.11550): heads compete for the layer's entries by raw score, and the
// share `alpha` of them is spread evenly whatever comes out. The authors' code mixes the two counts; kvpress
// protects the evenly spread part and lets heads compete for the rest. The authors round each head by itself, so
// that a layer may miss its total by half an entry per head; here the total is exact.
static counter adaptively(const layer_heads & heads, int n_threads) {
    auto ranks = std::make_shared<ranking>(heads.begin(), heads.end(), n_threads);
    return [ranks, room = room_of(heads)](int64_t n_keep) {
        const double alpha = 0.2;
        const double base  = (double) n_keep/(double) room.size();
        std::vector<double> mix;
        for (int64_t won : ranks->best(n_keep)) {
            mix.push_back((1.0 - alpha)*(double) won + alpha*base);
        }
        return apportion(mix, room, n_keep);
    };
}

// Layers get their totals in proportion to `weight` per head, then share them out within.
struct layer_counters {
    std::vector<counter> within;
    head_counts rooms;
    std::vector<size_t> sizes;

    layer_counters(const allocation & a, counter (*prepare)(const layer_heads & heads, int n_threads)) {
        for (const auto & heads : layers_of(a)) {
            within.push_back(prepare(heads, a.n_threads));
            rooms.push_back(sum(room_of(heads)));
            sizes.push_back(heads.size());
        }
    }

    head_counts count(const std::vector<double> & weight, int64_t n_keep) const {
        std::vector<double> weights;
        for (size_t i = 0; i < sizes.size(); i++) {
            weights.push_back(weight[i]*(double) sizes[i]);
        }
        const head_counts totals = apportion(weights, rooms, n_keep);
        head_counts counts;
        for (size_t i = 0; i < within.size(); i++) {
            const head_counts own = within[i](totals[i]);
            counts.insert(counts.end(), own.begin(), own.end());
        }
        return counts;
    }
};

// PyramidKV (arXiv 2406.02069): budgets fall linearly from the bottom layer to the top one, which is left with
// 1/beta of the average. Where the bottom layer could not use its budget, the slope is as steep as it can be.
// The authors fall back to equal layers when entries number less than twice the average; here the slope flattens by
// itself, without a jump. Their integer step, which loses up to one entry per layer, is a fraction here.
static std::vector<double> pyramid_weights(const head_counts & room, size_t n_layer, int64_t n_keep) {
    const double beta = 20.0;
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
    return weight;
}

static counter prepare_pyramid(const allocation & a) {
    return [layers = layer_counters(a, equally), room = room_of(a.heads)](int64_t n_keep) {
        return room.empty() ? head_counts() : layers.count(pyramid_weights(room, layers.sizes.size(), n_keep), n_keep);
    };
}

static counter prepare_ada(const allocation & a) {
    return [layers = layer_counters(a, adaptively)](int64_t n_keep) {
        return layers.count(std::vector<double>(layers.sizes.size(), 1.0), n_keep);
    };
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
static counter prepare_lava(const allocation & a) {
    const auto layers = layers_of(a);
    std::vector<double> weight(layers.size());
    parallel_for(layers.size(), a.n_threads, [&](size_t i) { weight[i] = normalised_entropy(layers[i]); });
    return [counters = layer_counters(a, adaptively), weight](int64_t n_keep) { return counters.count(weight, n_keep); };
}

// CAKE's layer budgets (arXiv 2503.12491) from the preference that its scorer computes. The authors share out what
// full layers leave over evenly and in one round, which may miss the total; here in proportion, and exactly.
static counter prepare_cake(const allocation & a) {
    const size_t n_layer = layers_of(a).size();
    if (a.layer_preference.size() != n_layer) {
        throw std::invalid_argument("allocator \"cake\" needs a preference per layer; got " +
                std::to_string(a.layer_preference.size()) + " for " + std::to_string(n_layer) + " layers");
    }
    return [counters = layer_counters(a, equally), weight = a.layer_preference](int64_t n_keep) { return counters.count(weight, n_keep); };
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

static counter prepare_profile(const allocation & a) {
    return [&a](int64_t n_keep) { return count_profile(a, n_keep); };
}

static const std::array<allocator, 8> allocators = {{
    { "global",     nullptr,            prepare_global },
    { "global-raw", nullptr,            prepare_global_raw },
    { "uniform",    nullptr,            prepare_uniform },
    { "pyramid",    nullptr,            prepare_pyramid },
    { "ada",        nullptr,            prepare_ada },
    { "lava",       nullptr,            prepare_lava },
    { "cake",       "layer_preference", prepare_cake },
    { "profile",    "profile",          prepare_profile },
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

// The n best of some of a head's candidates (null: of all), ascending.
static std::vector<uint32_t> best_of(const head_candidates & h, const std::vector<float> & score, const std::vector<uint32_t> * among, size_t n) {
    const size_t n_all = among ? among->size() : score.size();
    const auto index = [&](size_t i) { return among ? (*among)[i] : (uint32_t) i; };
    n = std::min(n, n_all);
    std::vector<uint32_t> best;
    best.reserve(n);
    if (n == n_all) {
        for (size_t i = 0; i < n; i++) {
            best.push_back(index(i));
        }
        return best;
    }
    if (n == 0) {
        return best;
    }
    std::vector<float> ranks(n_all);
    for (size_t i = 0; i < n_all; i++) {
        ranks[i] = rank_of(score[index(i)]);
    }
    std::nth_element(ranks.begin(), ranks.begin() + (n - 1), ranks.end(), std::greater<float>());
    const float threshold = ranks[n - 1];

    std::vector<uint32_t> ties;
    for (size_t i = 0; i < n_all; i++) {
        const float rank = rank_of(score[index(i)]);
        if (rank > threshold) {
            best.push_back(index(i));
        } else if (rank == threshold) {
            ties.push_back(index(i));
        }
    }
    std::stable_sort(ties.begin(), ties.end(), [&](uint32_t i, uint32_t j) { return h.pos[i] > h.pos[j]; });
    ties.resize(n - best.size());
    std::sort(ties.begin(), ties.end());
    const size_t middle = best.size();
    best.insert(best.end(), ties.begin(), ties.end());
    std::inplace_merge(best.begin(), best.begin() + middle, best.end());
    return best;
}

choice select(const std::vector<head_candidates> & heads, const head_counts & counts, int n_threads) {
    choice kept(heads.size());
    parallel_for(heads.size(), n_threads, [&](size_t row) {
        const auto & h = heads[row];
        const size_t n = (size_t) std::clamp<int64_t>(counts[row], 0, (int64_t) h.score.size());
        if (h.second.empty()) {
            kept[row] = best_of(h, h.score, nullptr, n);
            return;
        }
        const std::vector<uint32_t> first = best_of(h, h.score, nullptr, n/2);
        std::vector<uint32_t> all(h.score.size()), rest;
        std::iota(all.begin(), all.end(), 0);
        std::set_difference(all.begin(), all.end(), first.begin(), first.end(), std::back_inserter(rest));
        const std::vector<uint32_t> second = best_of(h, h.second, &rest, n - first.size());
        std::merge(first.begin(), first.end(), second.begin(), second.end(), std::back_inserter(kept[row]));
    });
    return kept;
}

}
