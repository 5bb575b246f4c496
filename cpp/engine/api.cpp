// The C API of laprox.h.

#include "laprox.h"
#include "engine/cache.h"
#include "engine/document.h"
#include "engine/error.h"
#include "engine/hooks.h"
#include "engine/profile_file.h"

#include "llama-context.h"
#include "llama-model.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <stdexcept>

namespace laprox {

// Runs f; an exception becomes the last error and the value of `refused`.
template <typename R, typename F> static R guarded(R refused, F f) {
    try {
        set_last_error("");
        return f();
    } catch (const std::exception & e) {
        set_last_error(e.what());
        return refused;
    }
}

// The same of what has no result: whether it succeeded.
template <typename F> static bool done(F f) {
    return guarded(false, [&] {
        f();
        return true;
    });
}

static cache & cache_of(const llama_context * ctx) {
    cache * kv = ctx ? cache_in(ctx->get_memory()) : nullptr;
    if (!kv) {
        throw std::runtime_error("the context was made without the compressing cache: set a policy on the model before making it");
    }
    return *kv;
}

static const sequence & sequence_of(const llama_context * ctx, llama_seq_id seq_id) {
    return cache_of(ctx).at(seq_id);
}

static std::map<std::string, std::string> texts_of(const char * const * keys, const char * const * values, int32_t n_texts) {
    std::map<std::string, std::string> texts;
    for (int32_t i = 0; i < n_texts; i++) {
        texts[keys[i]] = values[i];
    }
    return texts;
}

// Place of a layer in the cache.
static size_t find_layer(const std::vector<layer_info> & layers, int32_t il, int32_t head) {
    const auto layer = std::find_if(layers.begin(), layers.end(), [&](const layer_info & l) { return (int32_t) l.il == il; });
    if (layer == layers.end()) {
        throw std::invalid_argument("layer " + std::to_string(il) + " isn't in the compressed cache");
    }
    if (head < 0 || head >= (int32_t) layer->n_head_kv) {
        throw std::invalid_argument("KV head " + std::to_string(head) + " doesn't exist in layer " + std::to_string(il) +
                "; accepted: 0 to " + std::to_string(layer->n_head_kv - 1));
    }
    return layer - layers.begin();
}

}

using namespace laprox;

int32_t laprox_api_version(void) {
    return LAPROX_API_VERSION;
}

const char * laprox_last_error(void) {
    return last_error().c_str();
}

int32_t laprox_option_count(void) {
    return (int32_t) std::size(options);
}

struct laprox_option laprox_option_at(int32_t i) {
    static const std::vector<std::string> accepted = [] {
        std::vector<std::string> texts;
        for (const option & row : options) {
            texts.push_back(accepted_texts(row));
        }
        return texts;
    }();
    if (i < 0 || i >= laprox_option_count()) {
        return {};
    }
    const option & row = options[i];
    return { row.name, row.kind, row.initial, accepted[i].c_str(), row.value, row.help };
}

laprox_params * laprox_params_new(const char * before_names) {
    return new laprox_params { option_texts(before_names ? before_names : "") };
}

void laprox_params_free(laprox_params * params) {
    delete params;
}

bool laprox_params_set(laprox_params * params, const char * name, const char * text) {
    return done([&] {
        const option & row = find_option(name);
        set_option(params->given, row, text ? text : row.initial);
    });
}

bool laprox_params_set_custom(laprox_params * params, const char * allocator) {
    return done([&] { set_custom(params->given, allocator); });
}

const char * laprox_params_get(const laprox_params * params, const char * name) {
    return guarded<const char *>(nullptr, [&] { return params->given.get(find_option(name)).c_str(); });
}

bool laprox_params_check(const laprox_params * params) {
    return done([&] { read_settings(params->given); });
}

int32_t laprox_policy_count(void) {
    return n_policies();
}

const char * laprox_policy_name(int32_t i) {
    return i >= 0 && i < n_policies() ? policy_name(i) : nullptr;
}

const char * laprox_policy_meaning(int32_t i) {
    static thread_local std::string meaning;
    return i >= 0 && i < n_policies() ? (meaning = policy_meaning(i)).c_str() : nullptr;
}

bool laprox_policy_probes(const char * policy) {
    return guarded(false, [&] { return find_policy(policy).probes(); });
}

int32_t laprox_scorer_count(void) {
    return n_scorers();
}

const char * laprox_scorer_name(int32_t i) {
    return i >= 0 && i < n_scorers() ? scorer_at(i).name : nullptr;
}

int32_t laprox_allocator_count(void) {
    return n_allocators();
}

const char * laprox_allocator_name(int32_t i) {
    return i >= 0 && i < n_allocators() ? allocator_at(i).name : nullptr;
}

bool laprox_model_check(const llama_model * model) {
    return done([&] {
        const std::string reason = reason_not_compressible(*model);
        if (!reason.empty()) {
            throw std::runtime_error(reason);
        }
    });
}

bool laprox_model_set_params(llama_model * model, const laprox_params * params) {
    return done([&] {
        const bool on = params && read_settings(params->given).policy.name != policy_off;
        if (on) {
            const std::string reason = reason_not_compressible(*model);
            if (!reason.empty()) {
                throw std::runtime_error(reason);
            }
            model->laprox->config = make_settings(*model, params->given);
        } else if (model->laprox) {
            model->laprox->config = {};
            model->laprox->gates = {};
        }
        if (model->laprox) {
            model->laprox->enabled = on;
        }
    });
}

// Settings of a context that lives.
static settings live_settings(const llama_context & ctx, const laprox_params & params, const settings * read = nullptr) {
    settings s = make_settings(ctx.get_model(), params.given, read);
    if (s.policy.name == policy_off) {
        params.given.refuse(find_option("policy"), policy_off, "the context has a compressing cache", "full, which evicts nothing, or another policy");
    }
    return s;
}

bool laprox_set_params(llama_context * ctx, const laprox_params * params) {
    return done([&] {
        if (!params) {
            throw std::invalid_argument("params is NULL; a live context can't do without them");
        }
        cache & kv = cache_of(ctx);
        kv.set_settings(live_settings(*ctx, *params));
    });
}

bool laprox_seq_set_params(llama_context * ctx, llama_seq_id seq_id, const laprox_params * params) {
    return done([&] {
        cache & kv = cache_of(ctx);
        kv.at(seq_id);
        kv.set_settings(seq_id, params ? std::make_shared<settings>(live_settings(*ctx, *params, &kv.get_settings())) : nullptr);
    });
}

laprox_params * laprox_seq_get_params(llama_context * ctx, llama_seq_id seq_id) {
    return guarded<laprox_params *>(nullptr, [&] { return new laprox_params { sequence_of(ctx, seq_id).config().given }; });
}

laprox_params * laprox_get_params(const llama_context * ctx) {
    return guarded<laprox_params *>(nullptr, [&] { return new laprox_params { cache_of(ctx).get_settings().given }; });
}

bool laprox_model_fingerprint(const llama_model * model, char out[17]) {
    return done([&] {
        const std::string text = fingerprint(*model);
        std::copy_n(text.c_str(), text.size() + 1, out);
    });
}

bool laprox_profile_save(const llama_model * model, const char * path, const double * evicted, int32_t n_layer, int32_t n_head_kv,
        const char * const * keys, const char * const * values, int32_t n_texts) {
    return done([&] {
        const size_t n = (size_t) profile_rows*std::max(n_layer, 0)*std::max(n_head_kv, 0);
        write_profile(*model, path, { n_layer, n_head_kv, { evicted, evicted + n } }, texts_of(keys, values, n_texts));
    });
}

bool laprox_set_scorer(llama_context * ctx, laprox_scorer_callback callback, void * user_data) {
    return done([&] { cache_of(ctx).set_scorer(callback, user_data); });
}

bool laprox_compress(llama_context * ctx, llama_seq_id seq_id) {
    return done([&] { cache_of(ctx).compress(*ctx, seq_id); });
}

bool laprox_probe(llama_context * ctx, llama_seq_id seq_id, const laprox_look * look) {
    return done([&] { cache_of(ctx).look(*ctx, seq_id, *look); });
}

struct laprox_found {
    laprox::probe what;
};

laprox_found * laprox_probe_found(llama_context * ctx, llama_seq_id seq_id) {
    return guarded<laprox_found *>(nullptr, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        if (!seq.probed) {
            throw std::runtime_error("no probe has looked at this sequence");
        }
        return new laprox_found { *seq.probed };
    });
}

bool laprox_probe_again(llama_context * ctx, llama_seq_id seq_id, const laprox_found * found) {
    return guarded(false, [&] {
        cache_of(ctx).look_again(seq_id, found->what);
        return true;
    });
}

void laprox_found_free(laprox_found * found) {
    delete found;
}

bool laprox_mark(llama_context * ctx, llama_seq_id seq_id) {
    return done([&] { cache_of(ctx).whole().set_mark(seq_id); });
}

bool laprox_prompt_done(llama_context * ctx, llama_seq_id seq_id, int32_t n_again, llama_pos * again) {
    return done([&] {
        cache & kv = cache_of(ctx);
        const bool first = *again < 0;
        *again = -1; // also where it fails: whoever evaluates until it is would do so for ever
        *again = kv.prompt_done(*ctx, seq_id, n_again, first);
        if (*again >= 0 && !llama_memory_seq_rm(ctx->get_memory(), seq_id, *again, -1)) {
            kv.end_turn(seq_id); // layers that can't go back
            *again = -1;
        }
    });
}

llama_pos laprox_tail_begin(llama_context * ctx, llama_seq_id seq_id) {
    return guarded<llama_pos>(-1, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        return seq.remembers() ? 0 : seq.tail_begin();
    });
}

llama_pos laprox_compressed_for(llama_context * ctx, llama_seq_id seq_id) {
    return guarded<llama_pos>(-1, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        return seq.remembers() ? 0 : seq.compressed_for();
    });
}

bool laprox_set_archive_in_states(llama_context * ctx, bool on) {
    return done([&] { cache_of(ctx).set_archive_in_states(on); });
}

bool laprox_document_save(llama_context * ctx, llama_seq_id seq_id, const char * path, const llama_token * tokens, int32_t n_tokens,
        const char * const * keys, const char * const * values, int32_t n_texts) {
    return done([&] {
        save_document(*ctx, seq_id, path, { tokens, tokens + std::max(n_tokens, 0) }, texts_of(keys, values, n_texts));
    });
}

laprox_document * laprox_document_open(const char * path) {
    return guarded<laprox_document *>(nullptr, [&] { return new laprox_document(path); });
}

void laprox_document_free(laprox_document * document) {
    delete document;
}

const char * laprox_document_get(const laprox_document * document, const char * key) {
    return document->text(key);
}

int32_t laprox_document_tokens(const laprox_document * document, llama_token * tokens, int32_t cap) {
    const int32_t n = (int32_t) document->tokens().size();
    std::copy_n(document->tokens().begin(), std::clamp(cap, 0, n), tokens);
    return n;
}

bool laprox_document_load(llama_context * ctx, llama_seq_id seq_id, const laprox_document * document) {
    return done([&] { document->load(*ctx, seq_id); });
}

bool laprox_score(llama_context * ctx, llama_seq_id seq_id) {
    return done([&] { cache_of(ctx).score(*ctx, seq_id); });
}

bool laprox_may_protect(const llama_context * ctx, int64_t n_tokens, double budget_bytes) {
    return guarded(false, [&] {
        size_t token_bytes = 0;
        for (const layer_info & layer : cache_of(ctx).get_layers()) {
            token_bytes += layer.n_head_kv*layer.kv_row_bytes();
        }
        return (double) n_tokens*token_bytes <= budget_bytes/3;
    });
}

bool laprox_get_stats(llama_context * ctx, llama_seq_id seq_id, laprox_stats * out) {
    return done([&] {
        if (seq_id != -1) {
            *out = sequence_of(ctx, seq_id).stats();
            return;
        }
        cache & kv = cache_of(ctx);
        *out = {};
        for (const sequence * seq : kv.sequences_of(-1)) {
            const laprox_stats s = seq->stats();
            out->tokens_seen     += s.tokens_seen;
            out->entries_held    += s.entries_held;
            out->entries_full    += s.entries_full;
            out->kv_bytes        += s.kv_bytes;
            out->kv_bytes_full   += s.kv_bytes_full;
            out->window_bytes    += s.window_bytes;
            out->compressions    += s.compressions;
            out->recalls         += s.recalls;
            out->entries_recalled += s.entries_recalled;
            out->archived_entries += s.archived_entries;
            out->tokens_lost      += s.tokens_lost;
            out->archived_bytes = kv.get_archive_space() ? kv.get_archive_space()->used() : 0;
            out->score_seconds   += s.score_seconds;
            out->select_seconds  += s.select_seconds;
            out->compact_seconds += s.compact_seconds;
        }
    });
}

int32_t laprox_layers(llama_context * ctx, int32_t * il, int32_t * n_head_kv, int32_t cap) {
    return guarded(-1, [&] {
        const auto & layers = cache_of(ctx).get_layers();
        for (int32_t i = 0; i < std::min<int32_t>(cap, layers.size()); i++) {
            il[i]        = layers[i].il;
            n_head_kv[i] = layers[i].n_head_kv;
        }
        return (int32_t) layers.size();
    });
}

bool laprox_head_shape(llama_context * ctx, int32_t il, int32_t * n_head, int32_t * n_embd_head_k, int32_t * n_embd_head_v) {
    return done([&] {
        const auto & layers = cache_of(ctx).get_layers();
        const layer_info & layer = layers[find_layer(layers, il, 0)];
        const auto set = [](int32_t * out, uint32_t value) {
            if (out) {
                *out = value;
            }
        };
        set(n_head, layer.n_head);
        set(n_embd_head_k, layer.d_k);
        set(n_embd_head_v, layer.d_v);
    });
}

float laprox_kq_scale(llama_context * ctx, int32_t il) {
    return guarded(0.0f, [&] {
        const common & shared = cache_of(ctx).shared();
        const float scale = shared.kq_scales[find_layer(shared.layers, il, 0)];
        if (scale == 0.0f) {
            throw std::runtime_error("layer " + std::to_string(il) + " hasn't attended yet");
        }
        return scale;
    });
}

int64_t laprox_positions(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head, llama_pos * pos, int64_t cap) {
    return guarded<int64_t>(-1, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        const auto held = seq.store(find_layer(seq.shared.layers, il, head)).positions_of(head, seq.tail());
        std::copy_n(held.begin(), std::clamp<int64_t>(cap, 0, held.size()), pos);
        return (int64_t) held.size();
    });
}

// Writes what `of` makes of a KV head's scores.
template <typename F> static int64_t read_scores(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head, float * score, int64_t cap, F of) {
    return guarded<int64_t>(-1, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        const size_t ikv = find_layer(seq.shared.layers, il, head);
        if (seq.scores.empty()) {
            throw std::runtime_error("what is held now hasn't been scored: call laprox_score() first");
        }
        const std::vector<float> mine = of(seq.scores[ikv].heads[head]);
        std::copy_n(mine.begin(), std::clamp<int64_t>(cap, 0, mine.size()), score);
        return (int64_t) mine.size();
    });
}

int64_t laprox_scores(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head, float * score, int64_t cap) {
    return read_scores(ctx, seq_id, il, head, score, cap, [](const layer_scores::head & h) { return h.numbers.front(); });
}

int64_t laprox_finished_scores(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head, float * score, int64_t cap) {
    return read_scores(ctx, seq_id, il, head, score, cap, [](const layer_scores::head & h) {
        std::vector<float> all(h.numbers.front().size(), NAN);
        std::copy(h.score.begin(), h.score.end(), all.begin() + h.first);
        return all;
    });
}

int64_t laprox_entries(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head, float * k, float * v, int64_t cap) {
    return guarded<int64_t>(-1, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        const size_t  ikv = find_layer(seq.shared.layers, il, head);
        const int64_t n   = seq.store(ikv).n_kept(head) + (int64_t) seq.n_tail();
        if (n <= cap) {
            ctx->synchronize();
            seq.entries(ikv, head, k, v);
        }
        return n;
    });
}

float laprox_bias(llama_context * ctx, llama_seq_id seq_id, int32_t il, int32_t head) {
    return guarded<float>(NAN, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        return seq.store(find_layer(seq.shared.layers, il, head)).bias.of(head);
    });
}

int64_t laprox_queries(llama_context * ctx, llama_seq_id seq_id, int32_t il, float * q, llama_pos * pos, int64_t cap) {
    return guarded<int64_t>(-1, [&] {
        const sequence & seq = sequence_of(ctx, seq_id);
        const size_t   ikv    = find_layer(seq.shared.layers, il, 0);
        const observed window = seq.observed_queries();
        const int64_t  n      = window.pos.size();
        if (n <= cap) {
            ctx->synchronize();
            std::copy(window.pos.begin(), window.pos.end(), pos);
            if (q) {
                seq.queries(ikv, window, q);
            }
        }
        return n;
    });
}
