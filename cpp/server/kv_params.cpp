#include "server/kv_params.h"

#include "core/options.h"

#include "arg.h"
#include "common.h"
#include "log.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <filesystem>
#include <iterator>
#include <list>
#include <stdexcept>
#include <utility>

static const char * const policy_off    = "off";
static const char * const policy_full   = "full";
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

//
// common_params_kv
//

common_params_kv & common_kv() {
    static common_params_kv options;
    return options;
}

bool common_params_kv::on() const {
    return given.count("policy") ? given.at("policy") != policy_off : given.count("budget") > 0 || !documents.empty();
}

std::string common_params_kv::policy_name() const {
    return on() ? text("policy") : policy_off;
}

std::string common_params_kv::text(const std::string & name) const {
    const auto it = given.find(name);
    return it != given.end() ? it->second : laprox::find_option(name).initial;
}

common_kv_settings common_params_kv::resolve(const char * before_names) const {
    common_kv_settings settings(laprox_params_new(before_names), laprox_params_free);
    for (const auto & [name, value] : given) {
        if (value.find('\0') != std::string::npos) {
            throw std::invalid_argument(before_names + name + " has a zero byte");
        }
        if (!laprox_params_set(settings.get(), name.c_str(), value.c_str())) {
            throw std::invalid_argument(laprox_last_error());
        }
    }
    return settings;
}

//
// options
//

static const char * const flag_prefix = "--kv-";

static std::string spelled(const std::string & prefix, const std::string & name, char space, bool upper) {
    std::string result = prefix;
    for (const char c : name) {
        result += c == '_' ? space : upper ? (char) std::toupper(c) : c;
    }
    return result;
}

// What stands where none is given, in words. The cache is compressed where a budget or a policy is given.
static std::string initial_in_words(const laprox_option & row) {
    const std::string name = row.name;
    if (name == "budget") {
        return std::string(row.initial) + " with --kv-policy, otherwise everything";
    }
    return name == "policy" ? std::string(row.initial) + " with --kv-budget, otherwise " + policy_off : row.initial;
}

// llama.cpp's handlers are plain functions: one for each row.
template <size_t i> static void take(common_params &, const std::string & value) {
    common_params_kv one;
    one.given[laprox::options[i].name] = value;
    one.resolve(flag_prefix); // throws what is wrong with it
    common_kv().given[laprox::options[i].name] = value; // an argument, after the environment
}

template <size_t... i> static auto handlers(std::index_sequence<i...>) {
    return std::array { &take<i>... };
}

static const char * const documents_flag = "--kv-documents";

static void take_documents(common_params &, const std::string & value) {
    std::error_code error;
    if (value.empty() || value.find('\0') != std::string::npos || !std::filesystem::is_directory(std::filesystem::u8path(value), error)) {
        throw std::invalid_argument(std::string(documents_flag) + " is \"" + value + "\"; accepted: a folder that is there");
    }
    common_kv().documents = value;
}

void common_kv_add_args(const std::function<void(common_arg)> & add_opt) {
    static std::list<std::string> names; // common_arg points to them
    const auto handle = handlers(std::make_index_sequence<std::size(laprox::options)>());
    for (size_t i = 0; i < handle.size(); i++) {
        const laprox_option row = laprox_option_at(i);
        const char * flag = names.emplace_back(spelled(flag_prefix, row.name, '-', false)).c_str();
        const char * env  = names.emplace_back(spelled("LLAMA_ARG_KV_", row.name, '_', true)).c_str();
        std::string help = row.help;
        if (const std::string initial = initial_in_words(row); !initial.empty()) {
            help += " (default: " + initial + ")";
        }
        if (std::string(row.kind) == "policy") {
            help += std::string("\naccepted: ") + row.accepted;
        }
        add_opt(common_arg({flag}, row.value, help, handle[i]).set_env(env).set_examples({LLAMA_EXAMPLE_SERVER}));
    }
    add_opt(common_arg({documents_flag}, "DIR",
            "folder of documents (*.kv) that `laprox read` wrote: requests name them, and they are not read again; see GET /documents (default: none)",
            take_documents).set_env("LLAMA_ARG_KV_DOCUMENTS").set_examples({LLAMA_EXAMPLE_SERVER}));
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
    if (!kv.on() && !kv.documents.empty()) {
        LOG_ERR("%s: %s: documents are held in the compressing KV cache, which --kv-policy off turns off; accepted: full, which evicts nothing, "
                "or another policy\n", __func__, documents_flag);
        return false;
    }
    if (!kv.on()) {
        if (!kv.given.count("policy") && !kv.given.empty()) {
            LOG_WRN("%s: --kv-* options have no effect without --kv-budget, --kv-policy or --kv-documents\n", __func__);
        }
        return true;
    }
    if (params.embedding) {
        LOG_WRN("%s: --kv-* options have no effect with --embedding and --rerank, which generate nothing\n", __func__);
        kv = {};
        return true;
    }

    if (!kv.given.count("policy") && !kv.given.count("budget")) { // nothing is evicted, and no memory is taken before there is something to hold
        kv.only_documents = true;
        kv.given["policy"] = policy_full;
        kv.given["budget"] = "100%";
        kv.given.emplace("prefill", "chunked");
    }
    kv.type_k = ggml_type_name(cparams.type_k);
    kv.type_v = ggml_type_name(cparams.type_v);
    std::string reason = reason_to_refuse(params);
    const common_kv_settings settings = kv.resolve(flag_prefix);
    if (reason.empty() && !laprox_model_set_params(model, settings.get())) {
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
    std::string all;
    for (const laprox::option & row : laprox::options) {
        const std::string text = kv.text(row.name);
        all += text.empty() ? "" : (all.empty() ? "" : ", ") + std::string(row.name) + " " + text;
    }
    LOG_INF("%s: KV cache: %s\n", __func__, all.c_str());
    return true;
}
