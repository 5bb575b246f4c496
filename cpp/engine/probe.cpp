#include "engine/probe.h"
#include "engine/graph.h"
#include "engine/score_graph.h"
#include "engine/sequence.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

namespace laprox {

static void check(const sequence & seq, const laprox_look & part, const tail_view & all) {
    const auto refuse = [](const std::string & why) { throw std::invalid_argument(why); };
    const settings & own = seq.config();
    if (!own.policy.probes()) {
        refuse("policy " + own.policy.name + " doesn't score by queries of the latest tokens, so a probe has nothing to tell it");
    }
    if (seq.n_absorbed() > 0) {
        refuse("entries of this sequence were evicted already; a probe has to come first");
    }
    if (part.n_text < 1 || part.n_text >= seq.next_position()) {
        refuse("n_text is " + std::to_string(part.n_text) + "; accepted: 1 to " + std::to_string(seq.next_position() - 1) +
                ", since the probe's tokens are behind the text");
    }
    if (part.n_prefix < 0 || part.first < part.n_prefix || part.last <= part.first || part.last > part.n_text) {
        refuse("the part [" + std::to_string(part.first) + ", " + std::to_string(part.last) + ") with a prefix of " + std::to_string(part.n_prefix) +
                " doesn't lie within a text of " + std::to_string(part.n_text) + " tokens");
    }
    if (part.every < 0) {
        refuse("every is " + std::to_string(part.every) + "; accepted: 0 or more");
    }
    if (part.stride < 0) {
        refuse("stride is " + std::to_string(part.stride) + "; accepted: 0 or more");
    }
    for (size_t i = 0; i < all.pos.size(); i++) {
        if (all.pos[i] != (llama_pos) i) {
            refuse("the sequence isn't text from position 0 on without gaps");
        }
    }
}

// Of these queries, every so many-th.
static void keep_queries(probe & found, const sequence & seq, const observed & looked, int32_t every) {
    for (uint32_t slot : looked.slot) {
        if (every == 0 || found.n_looked++ % every != 0) {
            continue;
        }
        found.queries.resize(seq.shared.layers.size());
        found.n_queries++;
        for (size_t ikv = 0; ikv < found.queries.size(); ikv++) {
            const ggml_tensor * rows = seq.window.rows[ikv];
            auto & kept = found.queries[ikv];
            kept.resize(kept.size() + rows->ne[0]);
            ggml_backend_tensor_get(rows, kept.data() + kept.size() - rows->ne[0], slot*rows->nb[1], rows->nb[1]);
        }
    }
}

// Those of every so many-th token behind the text.
static observed thinned(const observed & all, llama_pos n_text, int32_t stride) {
    observed result;
    for (size_t i = 0; i < all.pos.size(); i++) {
        if (stride < 2 || (all.pos[i] - n_text) % stride == 0) {
            result.slot.push_back(all.slot[i]);
            result.pos.push_back(all.pos[i]);
        }
    }
    return result;
}

static float both(over_looks how, float a, float b) {
    return how == over_looks::norm ? std::hypot(a, b) : std::max(a, b);
}

void look(llama_context & lctx, sequence & seq, const laprox_look & part) {
    const tail_view all = seq.tail();
    check(seq, part, all);
    const scorer & how = *seq.config().policy.score;
    const probe * before = seq.probed.get();
    if (before && (before->n_text != part.n_text || before->how != &how || before->n_prefix != part.n_prefix)) {
        before = nullptr;
    }
    const llama_pos from = before ? std::max(before->next, part.n_text) : part.n_text;

    observed fresh = seq.observed_queries();
    const size_t n_old = std::lower_bound(fresh.pos.begin(), fresh.pos.end(), from) - fresh.pos.begin();
    fresh.slot.erase(fresh.slot.begin(), fresh.slot.begin() + n_old);
    fresh.pos.erase(fresh.pos.begin(), fresh.pos.begin() + n_old);
    const llama_pos n_fresh = seq.next_position() - from;
    if ((llama_pos) fresh.pos.size() != n_fresh || n_fresh == 0) {
        throw std::invalid_argument(std::to_string(n_fresh) + " tokens were evaluated since the last look; accepted: 1 to " +
                std::to_string(seq.config().window) + ", as many as the window holds");
    }

    // The prefix, the part, and the probe itself compete for a query's attention; other parts are out of it.
    tail_view seen;
    for (size_t i = 0; i < all.pos.size(); i++) {
        const llama_pos p = all.pos[i];
        if (p < part.n_prefix || (p >= part.first && p < part.last) || p >= part.n_text) {
            seen.cell.push_back(all.cell[i]);
            seen.pos.push_back(p);
        }
    }

    const observed asked = thinned(fresh, part.n_text, part.stride);
    workbench bench(lctx);
    score_source::mask shared_mask;
    std::vector<layer_scores> found;
    for (size_t ikv = 0; ikv < seq.shared.layers.size() && !asked.pos.empty(); ikv++) {
        found.push_back(score_layer(bench, { seq, ikv, seq.store(ikv), seen, asked, seq.window.rows[ikv], shared_mask }, how));
    }

    if (!before) {
        seq.probed = std::make_unique<probe>(probe { &how, part.n_text, part.n_prefix, part.n_text, {} });
        for (const layer_info & layer : seq.shared.layers) {
            layer_scores::head nothing;
            nothing.pos.assign(all.pos.begin(), all.pos.begin() + part.n_text);
            nothing.numbers.assign(how.n_numbers, std::vector<float>(part.n_text, 0.0f));
            seq.probed->layers.push_back({ std::vector<layer_scores::head>(layer.n_head_kv, nothing), layer.n_gqa(), 0.0 });
        }
    }
    for (size_t ikv = 0; ikv < found.size(); ikv++) {
        for (size_t head = 0; head < found[ikv].heads.size(); head++) {
            const layer_scores::head & now  = found[ikv].heads[head];
            layer_scores::head       & best = seq.probed->layers[ikv].heads[head];
            for (size_t number = 0; number < now.numbers.size(); number++) {
                for (size_t i = 0; i < now.pos.size() && now.pos[i] < part.n_text; i++) {
                    float & so_far = best.numbers[number][now.pos[i]];
                    so_far = both(how.looks, so_far, now.numbers[number][i]);
                }
            }
        }
    }
    seq.probed->next = seq.next_position();
    keep_queries(*seq.probed, seq, fresh, part.every);
}

void look_again(sequence & seq, const probe & found) {
    const settings & own = seq.config();
    if (found.how != own.policy.score) {
        throw std::invalid_argument(std::string("a probe scored the text by ") + found.how->name + ", and the policy is " + own.policy.name);
    }
    if (seq.n_absorbed() > 0 || seq.next_position() != found.n_text) {
        throw std::invalid_argument("a probe looked at a text of " + std::to_string(found.n_text) + " tokens; here are " +
                std::to_string(seq.next_position()) + (seq.n_absorbed() > 0 ? ", of which entries were evicted" : ""));
    }
    bool same = found.layers.size() == seq.shared.layers.size();
    for (size_t ikv = 0; same && ikv < found.layers.size(); ikv++) {
        const layer_info & layer = seq.shared.layers[ikv];
        same = found.layers[ikv].heads.size() == layer.n_head_kv &&
            (found.queries.empty() || (int64_t) found.queries[ikv].size() == found.n_queries*layer.d_k*layer.n_head);
    }
    if (!same) {
        throw std::invalid_argument("a probe of another model");
    }
    seq.probed = std::make_unique<probe>(found);
}

std::vector<layer_scores> scores_by_probe(const sequence & seq) {
    const probe & found = *seq.probed;
    if (found.n_text != seq.next_position()) {
        throw std::runtime_error("a probe looked at a text of " + std::to_string(found.n_text) + " tokens, and the sequence has " +
                std::to_string(seq.next_position()) + "; remove those behind the text first");
    }
    if (found.how != seq.config().policy.score) {
        throw std::runtime_error(std::string("a probe scored the text by ") + found.how->name + ", and the policy is " + seq.config().policy.name + " now");
    }
    return found.layers;
}

}
