#include "server/kv_params.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>

static const char * const policy_off    = "off";
static const char * const policy_custom = "custom"; // a callback, which no command line can give

template <typename F> static std::vector<std::string> names(int32_t n, F name) {
    std::vector<std::string> result;
    for (int32_t i = 0; i < n; i++) {
        if (std::string(name(i)) != policy_custom) {
            result.push_back(name(i));
        }
    }
    return result;
}

std::vector<std::string> common_kv_policies()   { return names(laprox_policy_count(),    laprox_policy_name); }
std::vector<std::string> common_kv_scorers()    { return names(laprox_scorer_count(),    laprox_scorer_name); }
std::vector<std::string> common_kv_allocators() { return names(laprox_allocator_count(), laprox_allocator_name); }

static bool contains(const std::vector<std::string> & list, const std::string & name) {
    return std::find(list.begin(), list.end(), name) != list.end();
}

void common_kv_check_budget(const std::string & budget) {
    laprox_budget parsed;
    if (budget.find('\0') != std::string::npos) {
        throw std::invalid_argument("budget has a zero byte");
    }
    if (!laprox_parse_budget(budget.c_str(), &parsed)) {
        throw std::invalid_argument(laprox_last_error());
    }
}

void common_kv_check_policy(const std::string & policy) {
    const auto scorers    = common_kv_scorers();
    const auto allocators = common_kv_allocators();

    const size_t colon = policy.find(':');
    const bool   known = colon == std::string::npos ?
        policy == policy_off || contains(common_kv_policies(), policy) || contains(scorers, policy) :
        contains(scorers, policy.substr(0, colon)) && contains(allocators, policy.substr(colon + 1));
    if (!known) {
        throw std::invalid_argument("policy \"" + policy + "\" is unknown; accepted: " + policy_off + ", " + string_join(common_kv_policies(), ", ") +
                ", or <scorer>:<allocator> of the scorers " + string_join(scorers, ", ") + " and the allocators " + string_join(allocators, ", "));
    }
}

//
// common_params_kv
//

common_params_kv & common_kv() {
    static common_params_kv options;
    return options;
}

bool common_params_kv::on() const {
    return policy.empty() ? !budget.empty() : policy != policy_off;
}

std::string common_params_kv::policy_name() const {
    return on() ? resolve().policy : policy_off;
}

std::string common_params_kv::budget_text() const {
    return budget.empty() ? LAPROX_DEFAULT_BUDGET : budget;
}

laprox_params common_params_kv::resolve() const {
    laprox_params params = laprox_default_params();
    if (!policy.empty()) {
        params.policy = policy.c_str();
    }
    laprox_parse_budget(budget_text().c_str(), &params.budget);
    if (prefill == "chunked") {
        params.prefill = LAPROX_PREFILL_CHUNKED;
    }
    if (!profile.empty()) {
        params.profile = profile.c_str();
    }
    if (!gates.empty()) {
        params.gates = gates.c_str();
    }
    if (floor >= 0) {
        params.floor = floor;
    }
    for (const auto & [given, value] : { std::pair { window, &params.window }, { sink, &params.sink }, { recent, &params.recent }, { min_tokens, &params.min_tokens } }) {
        if (given >= 0) {
            *value = given;
        }
    }
    return params;
}

//
// options
//

static int32_t parse_number(const std::string & value, int32_t low, int32_t high) {
    const bool digits = !value.empty() && value.size() <= 9 && value.find_first_not_of("0123456789") == std::string::npos;
    const int32_t number = digits ? std::stoi(value) : -1;
    if (!digits || number < low || number > high) {
        throw std::invalid_argument("\"" + value + "\" is not accepted; accepted: a number from " + std::to_string(low) + " to " + std::to_string(high));
    }
    return number;
}

static float parse_share(const std::string & value) {
    char * end = nullptr;
    const float number = std::strtof(value.c_str(), &end);
    if (value.empty() || value.find_first_not_of("0123456789.") != std::string::npos || *end != 0 || number > 1) {
        throw std::invalid_argument("\"" + value + "\" is not accepted; accepted: a number from 0.0 to 1.0");
    }
    return number;
}

void common_kv_add_args(const std::function<void(common_arg)> & add_opt) {
    const laprox_params def = laprox_default_params();

    add_opt(common_arg(
        {"--kv-budget"}, "N",
        "what the KV cache of a prompt may keep: a share of its entries (5%), tokens per KV head on average (2048), or bytes (512MiB) (default: " LAPROX_DEFAULT_BUDGET " with --kv-policy, otherwise everything)",
        [](common_params &, const std::string & value) {
            common_kv_check_budget(value);
            common_kv().budget = value;
        }
    ).set_env("LLAMA_ARG_KV_BUDGET").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-policy"}, "NAME",
        string_format("how the entries that stay are chosen: %s, or <scorer>:<allocator> (default: %s with --kv-budget, otherwise off)\n"
            "scorers: %s; allocators: %s", string_join(common_kv_policies(), ", ").c_str(), def.policy,
            string_join(common_kv_scorers(), ", ").c_str(), string_join(common_kv_allocators(), ", ").c_str()),
        [](common_params &, const std::string & value) {
            common_kv_check_policy(value);
            common_kv().policy = value;
        }
    ).set_env("LLAMA_ARG_KV_POLICY").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-window"}, "N",
        string_format("the queries of the last N tokens of a prompt score the entries (default: %d)", def.window),
        [](common_params &, const std::string & value) {
            common_kv().window = parse_number(value, 1, 1024);
        }
    ).set_env("LLAMA_ARG_KV_WINDOW").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-sink"}, "N",
        string_format("the first N tokens always stay in the KV cache (default: %d)", def.sink),
        [](common_params &, const std::string & value) {
            common_kv().sink = parse_number(value, 0, 1 << 20);
        }
    ).set_env("LLAMA_ARG_KV_SINK").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-recent"}, "N",
        string_format("the last N tokens of a prompt always stay in the KV cache (default: %d)", def.recent),
        [](common_params &, const std::string & value) {
            common_kv().recent = parse_number(value, 1, 1 << 20);
        }
    ).set_env("LLAMA_ARG_KV_RECENT").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-min-tokens"}, "N",
        string_format("nothing is evicted from a prompt of at most N tokens (default: %d)", def.min_tokens),
        [](common_params &, const std::string & value) {
            common_kv().min_tokens = parse_number(value, 0, 999999999);
        }
    ).set_env("LLAMA_ARG_KV_MIN_TOKENS").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-prefill"}, "[dense|chunked]",
        "'dense': the whole prompt is in the KV cache before entries are evicted, 'chunked': they are evicted whenever a small cache is full, which bounds its memory (default: dense)",
        [](common_params &, const std::string & value) {
            if (value != "dense" && value != "chunked") {
                throw std::invalid_argument("\"" + value + "\" is unknown; accepted: dense, chunked");
            }
            common_kv().prefill = value;
        }
    ).set_env("LLAMA_ARG_KV_PREFILL").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-profile"}, "FNAME",
        "table of `laprox profile` for --kv-policy lukv and allocator 'profile' (default: MODEL.kv-profile.npy beside the model)",
        [](common_params &, const std::string & value) {
            common_kv().profile = value;
        }
    ).set_env("LLAMA_ARG_KV_PROFILE").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-gates"}, "FNAME",
        "retention gates of `laprox train-gates` or `laprox convert-gates` for scorer 'retention' (default: MODEL.kv-gates.gguf beside the model)",
        [](common_params &, const std::string & value) {
            common_kv().gates = value;
        }
    ).set_env("LLAMA_ARG_KV_GATES").set_examples({LLAMA_EXAMPLE_SERVER}));
    add_opt(common_arg(
        {"--kv-floor"}, "P",
        string_format("the share of the average budget that every KV head keeps, 0.0 to 1.0, with the allocators global and global-raw (default: %.2f)", def.floor),
        [](common_params &, const std::string & value) {
            common_kv().floor = parse_share(value);
        }
    ).set_env("LLAMA_ARG_KV_FLOOR").set_examples({LLAMA_EXAMPLE_SERVER}));
}

//
// start
//

// Why these options can't be used together; empty if they can.
static std::string reason_to_refuse(const common_params & params) {
    const auto & types = params.speculative.types;
    if (!params.mmproj.path.empty()) {
        return "--mmproj: an image has several tokens at one position, which compressing isn't tested with (--no-mmproj serves text)";
    }
    if (std::find(types.begin(), types.end(), COMMON_SPECULATIVE_TYPE_DRAFT_MTP) != types.end()) {
        return "--spec-type draft-mtp: a second context would share the model and its policy (a draft model of its own works: --spec-type draft-simple -md FNAME)";
    }
    return "";
}

bool common_kv_init(const common_params & params, llama_model * model, llama_context_params & cparams) {
    common_params_kv & kv = common_kv();
    if (!kv.on()) {
        const bool given = !kv.prefill.empty() || !kv.profile.empty() || !kv.gates.empty() || kv.floor >= 0 ||
            std::max({ kv.window, kv.sink, kv.recent, kv.min_tokens }) >= 0;
        if (kv.policy.empty() && given) {
            LOG_WRN("%s: --kv-* options have no effect without --kv-budget or --kv-policy\n", __func__);
        }
        return true;
    }
    if (params.embedding) {
        LOG_WRN("%s: --kv-* options have no effect with --embedding and --rerank, which generate nothing\n", __func__);
        kv = {};
        return true;
    }

    std::string reason = reason_to_refuse(params);
    const laprox_params settings = kv.resolve();
    if (reason.empty() && !laprox_model_set_params(model, &settings)) {
        reason = laprox_last_error();
    }
    if (!reason.empty()) {
        LOG_ERR("%s: the KV cache can't be compressed: %s (--kv-policy off serves this model as it is)\n", __func__, reason.c_str());
        return false;
    }
    if (cparams.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_AUTO) {
        cparams.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED; // there is no other way to attend to such a cache
    }
    if (params.ctx_shift) {
        LOG_WRN("%s: --context-shift has no effect: the entries of a compressed KV cache keep their positions\n", __func__);
    }
    LOG_INF("%s: KV cache: policy %s, budget %s, window %d, sink %d, recent %d, min tokens %d, prefill %s\n", __func__,
            settings.policy, kv.budget_text().c_str(), settings.window, settings.sink, settings.recent, settings.min_tokens,
            settings.prefill == LAPROX_PREFILL_CHUNKED ? "chunked" : "dense");
    return true;
}
