// Descriptions of functions in a chat's prompt. A model that has lost a part of them writes calls of its own invention, so they
// are protected from eviction.

#pragma once

#include "server-common.h"
#include "server-task.h"

#include "chat.h"

// Where in the rendered prompt something is there for the functions alone: first byte and first byte behind, in turn. Null where nothing
// can be evicted.
json server_kv_tools(const common_chat_templates * templates, const common_chat_templates_inputs & inputs, const json & prompt);

// The task of such a request, whose prompt has become tokens, protects them.
void server_kv_protect_tools(const json & request, task_response_type reply, server_task & task);
