// The --kv-* options of llama-server: what its KV cache keeps. Compiled into llama-common.

#pragma once

#include "laprox.h"

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct common_arg;
struct common_params;

// As given; empty and -1: not given. Without a budget or a policy the cache is llama.cpp's.
struct common_params_kv {
    std::string budget;
    std::string policy;
    std::string prefill;
    std::string profile;
    std::string gates;

    int32_t window     = -1;
    int32_t sink       = -1;
    int32_t recent     = -1;
    int32_t min_tokens = -1;
    float   floor      = -1;

    bool on() const;

    // With what wasn't given filled in; points into this struct.
    laprox_params resolve() const;

    std::string policy_name() const; // "off" if it isn't on
    std::string budget_text() const;
};

// The options of this process. They are no member of common_params, whose header all of llama.cpp's programs include.
common_params_kv & common_kv();

// Budget and policy of one request, instead of the server's; empty: the server's.
struct common_kv_request {
    std::string budget;
    std::string policy;
};

// Both throw std::invalid_argument, which names the value and what is accepted.
void common_kv_check_budget(const std::string & budget);
void common_kv_check_policy(const std::string & policy);

// Names for the three kinds that policies are made of.
std::vector<std::string> common_kv_policies();
std::vector<std::string> common_kv_scorers();
std::vector<std::string> common_kv_allocators();

void common_kv_add_args(const std::function<void(common_arg)> & add_opt);

// The model is loaded, its context is made next. False: refused, with the reason in the log.
bool common_kv_init(const common_params & params, llama_model * model, llama_context_params & cparams);
