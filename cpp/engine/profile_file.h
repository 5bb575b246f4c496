// LU-KV's table (core/profile.h) as a file that goes with a model.

#pragma once

#include "core/profile.h"

#include <map>
#include <string>

struct llama_model;

namespace laprox {

struct profile_file {
    // Throws std::runtime_error naming the file and what is wrong with it, or with it for this model.
    profile_file(const llama_model & model, const std::string & path);

    const std::string path;
    budget_profile    table;
    std::string       scorer; // that its shares were measured for; empty: any
};

// `texts` say more of it: "scorer", "model", ... Throws std::invalid_argument if the table isn't one for this model,
// std::runtime_error if it can't be written.
void write_profile(const llama_model & model, const std::string & path, const budget_profile & table,
                   const std::map<std::string, std::string> & texts);

}
