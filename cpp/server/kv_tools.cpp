#include "server/kv_tools.h"

#include "server/kv_documents.h"
#include "server/kv_params.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <exception>

json server_kv_tools(const common_chat_templates * templates, const common_chat_templates_inputs & inputs, const std::string & prompt) {
    if (!common_kv().on() || inputs.tools.empty()) {
        return nullptr;
    }
    common_chat_templates_inputs others = inputs;
    others.tools.clear();
    others.tool_choice = COMMON_CHAT_TOOL_CHOICE_NONE;
    std::string without;
    try {
        without = common_chat_templates_apply(templates, others).prompt;
    } catch (const std::exception & e) {
        LOG_WRN("%s: the descriptions of functions may be evicted: the chat template doesn't go without them: %s\n", __func__, e.what());
        return nullptr;
    }
    const size_t n = std::min(prompt.size(), without.size());
    const size_t first = std::mismatch(prompt.begin(), prompt.begin() + n, without.begin()).first - prompt.begin();
    const size_t n_behind = std::mismatch(prompt.rbegin(), prompt.rbegin() + (n - first), without.rbegin()).first - prompt.rbegin();
    const size_t end = prompt.size() - n_behind;
    if (first >= end) {
        return nullptr;
    }
    json range = json::array();
    range.push_back(first);
    range.push_back(end);
    return range;
}

void server_kv_protect_tools(const json & request, server_task & task) {
    const json range  = json_value(request, "__kv_tools", json());
    const json prompt = json_value(request, "prompt",     json());
    if (!range.is_array() || range.size() != 2 || !prompt.is_string()) {
        return;
    }
    // a token may reach over the end of either part: it counts
    const std::string text = prompt.get<std::string>();
    const auto n_same = [&](size_t n_bytes) {
        const llama_tokens tokens = common_tokenize(server_kv_docs().vocabulary(), text.substr(0, n_bytes), /*add_special =*/ true, /*parse_special =*/ true);
        const size_t n = std::min(tokens.size(), task.tokens.size());
        size_t i = 0;
        while (i < n && tokens[i] == task.tokens[i]) {
            i++;
        }
        return i;
    };
    const size_t first = n_same(range.at((size_t) 0).get<size_t>());
    const size_t end   = std::min(n_same(range.at(1).get<size_t>()) + 1, task.tokens.size());
    if (first < end) {
        task.params.kv.protect = std::to_string(first) + "-" + std::to_string(end);
    }
}
