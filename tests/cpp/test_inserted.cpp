// What chat templates write for functions is found by comparing prompts.

#include "core/inserted.h"

#include "check.h"

#include <string>

using namespace laprox;

static std::string cut_out(std::string text, const std::string & without) {
    std::string found;
    for (const auto & [first, end] : find_inserted(text, without)) {
        found += "[" + text.substr(first, end - first) + "]";
    }
    return found;
}

int main() {
    const std::string system = "<|im_start|>system\nYou are a helpful assistant who reads long documents.", user = "<|im_start|>user\nA long document.\n\nA question?<|im_end|>\n";
    const std::string tools = "\n\n# Tools\n{\"name\": \"send_letter\"}";

    CHECK(cut_out(system + "<|im_end|>\n" + user, system + "<|im_end|>\n" + user) == "");
    CHECK(cut_out(system + tools + "<|im_end|>\n" + user, system + "<|im_end|>\n" + user) == "[" + tools + "]");
    CHECK(cut_out(system + user + tools, system + user) == "[" + tools + "]");
    CHECK(cut_out(tools + system + user, system + user) == "[" + tools + "]");

    // in two places, with a conversation between
    CHECK(cut_out("Environment: ipython\n" + system + "<|user|>" + tools + user, system + "<|user|>" + user) == "[Environment: ipython\n][" + tools + "]");

    // it begins as what follows: as many bytes, a little further on
    const std::string alike = cut_out(system + "<|im_start|>tools\n{}" + user, system + user);
    CHECK(alike == "[tools\n{}<|im_start|>]");

    // another prompt altogether, or one that lacks something
    CHECK(cut_out("## Tools\n" + tools, system + user) == "");
    CHECK(cut_out(system + tools, system + user) == "");
    CHECK(cut_out(user + tools + system, system + user) == "");
    CHECK(cut_out("", "x") == "");
    CHECK(cut_out("x", "") == "[x]");
    std::printf("ok\n");
}
