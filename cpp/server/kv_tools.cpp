#include "server/kv_tools.h"

#include "server/kv_documents.h"
#include "server/kv_params.h"

#include "core/inserted.h"

#include "common.h"
#include "log.h"

#include <algorithm>
#include <stdexcept>

json server_kv_tools(const common_chat_templates * templates, const common_chat_templates_inputs & inputs, const json & prompt) {
    if (!common_kv().on() || inputs.tools.empty() || !prompt.is_string()) {
        return nullptr;
    }
    common_chat_templates_inputs others = inputs;
    others.tools.clear();
    others.tool_choice = COMMON_CHAT_TOOL_CHOICE_NONE;
    const std::string text = prompt.get<std::string>();
    json ranges = json::array();
    try {
        const std::string without = common_chat_templates_apply(templates, others).prompt;
        for (const auto & [first, end] : laprox::find_inserted(text, without)) {
            ranges.push_back(first);
            ranges.push_back(end);
        }
        if (without.empty() || (ranges.empty() && text != without)) {
            ranges.clear();
            throw std::runtime_error("the chat template then writes another prompt");
        }
    } catch (const std::exception & e) {
        LOG_WRN("%s: what the prompt says of functions may be evicted, since it can't be told from one without them: %s\n", __func__, e.what());
    }
    return ranges;
}

void server_kv_protect_tools(const json & request, task_response_type reply, server_task & task) {
    const json ranges = json_value(request, "__kv_tools", json());
    const bool is_chat = reply != TASK_RESPONSE_TYPE_NONE && reply != TASK_RESPONSE_TYPE_OAI_CMPL; // whose prompt was rendered here
    if (!is_chat || !common_kv().on() || !ranges.is_array()) {
        return;
    }
    const std::string text = request.at("prompt").get<std::string>();
    // tokens of the prompt that lie within so many bytes of it
    const auto n_tokens = [&](size_t n_bytes) {
        const llama_tokens tokens = common_tokenize(server_kv_docs().vocabulary(), text.substr(0, n_bytes), /*add_special =*/ true, /*parse_special =*/ true);
        const size_t n = std::min(tokens.size(), task.tokens.size());
        size_t i = 0;
        while (i < n && tokens[i] == task.tokens[i]) {
            i++;
        }
        return i;
    };
    for (size_t i = 0; i + 1 < ranges.size(); i += 2) {
        const size_t first = n_tokens(ranges.at(i).get<size_t>());
        const size_t end   = std::min(n_tokens(ranges.at(i + 1).get<size_t>()) + 1, task.tokens.size()); // a token may reach over the end
        if (first < end) {
            task.params.kv.functions.push_back({ (int32_t) first, (int32_t) end });
        }
    }
}
