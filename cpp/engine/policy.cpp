#include "engine/policy.h"

#include <iterator>
#include <stdexcept>

namespace laprox {

static const policy policies[] = {
    { "laprox",    scorer_type::laprox,   7, true  },
    { "streaming", scorer_type::position, 1, false },
    { "full",      scorer_type::none,     1, false },
};

int32_t n_policies() {
    return (int32_t) std::size(policies);
}

const policy & policy_at(int32_t i) {
    return policies[i];
}

const policy & find_policy(const std::string & name) {
    std::string names;
    for (const policy & p : policies) {
        if (name == p.name) {
            return p;
        }
        names += (names.empty() ? "" : ", ") + std::string(p.name);
    }
    throw std::invalid_argument("policy \"" + name + "\" is unknown; accepted: " + names);
}

}
