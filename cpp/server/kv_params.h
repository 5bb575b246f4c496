// The --kv-* options of llama-server: what its KV cache keeps. Compiled into llama-common.

#pragma once

#include "core/options.h"

#include "laprox.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

struct common_arg;
struct common_params;
struct server_kv_document;

using common_kv_settings = std::unique_ptr<laprox_params, decltype(&laprox_params_free)>;

// As given, by the names of laprox_option_at(). Without a budget, a policy or documents the cache is llama.cpp's.
struct common_params_kv {
    std::map<std::string, std::string> given;
    std::string documents;       // a folder; "": none
    bool only_documents = false; // nobody said what is kept, so nothing is evicted

    std::string type_k, type_v; // of the context's cache

    bool on() const;

    // What is in force: as given, or where nothing is.
    std::string text(const std::string & name) const;
    std::string policy_name() const; // "off" if it isn't on

    // All of them. before_names: as the user knows them, for what is refused later.
    common_kv_settings resolve(const char * before_names) const;
};

// The options of this process. They are no member of common_params, whose header all of llama.cpp's programs include.
common_params_kv & common_kv();

// Budget and policy of one request, instead of the server's.
struct common_kv_request {
    std::map<std::string, std::string> given;
    std::vector<laprox::position_range> functions; // where the prompt describes them
    bool archive = false; // of saving a slot: with what was evicted
    std::shared_ptr<const server_kv_document> document; // that the prompt begins with
};

// Names for the three kinds that policies are made of.
std::vector<std::string> common_kv_policies();
std::vector<std::string> common_kv_scorers();
std::vector<std::string> common_kv_allocators();

void common_kv_add_args(const std::function<void(common_arg)> & add_opt);

// The model is loaded, its context is made next. False: refused, with the reason in the log.
bool common_kv_init(const common_params & params, llama_model * model, llama_context_params & cparams);
