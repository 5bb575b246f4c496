// Every setting: its field, and the row that says what it is. The engine, its C API, llama-server's options, KVConfig, the
// options in the terminal and the tables in docs/ are made from the rows.
//
// Another setting is a field and a row here, a field of KVConfig (python/laprox/config.py), and the line that uses it.

#pragma once

#include "core/budget.h"

#include <cstdint>
#include <string>
#include <variant>
#include <vector>

namespace laprox {

constexpr int32_t max_window = 1024; // queries

// Positions from `first` to before `end`; ascending, apart from one another.
struct position_range {
    int32_t first;
    int32_t end;
};
using position_ranges = std::vector<position_range>;

bool holds(const position_ranges & ranges, int32_t pos);
// How many of the first n positions.
int64_t count_within(const position_ranges & ranges, int64_t n);

struct option_values {
    std::string    policy_name;
    laprox::budget budget;
    int32_t        window;
    int32_t        sink;
    int32_t        recent;
    position_ranges protect;
    int32_t        min_tokens;
    std::string    prefill;
    std::string    profile; // paths; empty: the file beside the model
    std::string    gates;
    float          floor;
    std::string    archive;
    laprox::budget archive_limit;
    int32_t        recall;
    int32_t        recall_tokens;
};

using option_field = std::variant<std::string option_values::*, laprox::budget option_values::*, int32_t option_values::*, float option_values::*,
        position_ranges option_values::*>;

struct option {
    const char * name;    // "min_tokens"; --kv-min-tokens and LLAMA_ARG_KV_MIN_TOKENS to llama-server
    const char * kind;    // "policy", "budget", "integer", "number", "positions", "choice", "path", "folder" or "space"
    option_field field;
    const char * initial; // where none is given, as text; of a path "": the file beside the model
    double       low;     // of integers and numbers
    double       high;
    const char * choices; // of a choice: "dense, chunked"; of positions, a folder and a space: what is accepted, in words
    const char * value;   // stands for the value in `help` and in usage lines
    const char * help;
};

inline constexpr option options[] = {
    { "budget", "budget", &option_values::budget, "20%", 0, 0, "", "N",
      "what the KV cache may keep: a share of the entries seen (5%), tokens per KV head on average (2048), or bytes of cache, "
      "tail and padding included (512MiB)" },
    { "policy", "policy", &option_values::policy_name, "laprox", 0, 0, "", "NAME",
      "how the entries that stay are chosen: a policy, a scorer, or <scorer>:<allocator>; full evicts nothing, off is stock "
      "llama.cpp" },
    { "window", "integer", &option_values::window, "32", 1, max_window, "", "N",
      "the queries of the last N tokens of a prompt score the entries" },
    { "sink", "integer", &option_values::sink, "4", 0, 1 << 20, "", "N",
      "the first N tokens are never evicted" },
    { "recent", "integer", &option_values::recent, "32", 1, 1 << 20, "", "N", // the last token anchors the sequence's position
      "the last N tokens of a prompt are never evicted" },
    { "protect", "positions", &option_values::protect, "", 0, 0, "positions FIRST-END, such as 0-300 or 0-20,80-300", "FIRST-END",
      "the tokens at positions from FIRST to before END are never evicted, and a budget that isn't in bytes is of the others; "
      "descriptions of functions in a chat are protected without it" },
    { "min_tokens", "integer", &option_values::min_tokens, "512", 0, 1 << 30, "", "N",
      "nothing is evicted from a sequence of at most N tokens, and what follows a compression stays exact until it is longer" },
    { "prefill", "choice", &option_values::prefill, "dense", 0, 0, "dense, chunked", "MODE",
      "dense: the whole prompt is cached before entries are evicted; chunked: they are evicted whenever a small cache is full, "
      "which bounds its memory, but what goes early never met the question" },
    { "profile", "path", &option_values::profile, "", 0, 0, "", "FNAME",
      "table of `laprox profile` (.gguf) for the policy lukv and the allocator profile; by default MODEL.kv-profile.gguf beside "
      "the model" },
    { "gates", "path", &option_values::gates, "", 0, 0, "", "FNAME",
      "retention gates of `laprox train-gates` or `laprox convert-gates` (.gguf) for the scorer retention; by default "
      "MODEL.kv-gates.gguf beside the model" },
    { "floor", "number", &option_values::floor, "0.0", 0, 1, "", "P",
      "the share of the average budget that every KV head keeps with the allocators global and global-raw" },
    { "archive", "folder", &option_values::archive, "auto", 0, 0, "auto, ram, off, or a folder", "WHERE",
      "where evicted entries stay, to come back when a later prompt needs them: ram, unnamed files in a folder, or nowhere (off); "
      "auto is ram for a cache on a GPU, and files in the folder for temporary files for a cache in ram" },
    { "archive_limit", "space", &option_values::archive_limit, "50%", 0, 0, "a share of what is free (50%) or bytes (16GiB)", "N",
      "the most that all archives of a context may take: a share of the memory or disk that is free when it is made (50%), or "
      "bytes (16GiB)" },
    { "recall", "integer", &option_values::recall, "2", 0, 8, "", "N",
      "how often a later prompt chooses anew from all that was seen, and is evaluated again on what it chose; 0 is as without an "
      "archive" },
    { "recall_tokens", "integer", &option_values::recall_tokens, "512", 0, 1 << 20, "", "N",
      "the last N tokens of a later prompt, at most, are evaluated again" },
};

// Settings as they were given: a text for each row. Rows are those that find_option() gives.
class option_texts {
public:
    // before_names: stands before a setting's name in refusals, "--kv-" or "kv " say; ending with a -, in the name, too.
    explicit option_texts(const std::string & before_names);
    option_texts() : option_texts("") {}

    // Throws std::invalid_argument, naming the setting, the text and what would be accepted. Which policies there are, only
    // the engine knows.
    void set(const option & row, const std::string & text);

    const std::string & get(const option & row) const;

    // What the texts mean.
    option_values values() const;

    // As the user writes a setting's name.
    std::string spell(const option & row) const;

    // The one way in which a value is refused: `--kv-window is "0" (why); accepted: an integer from 1 to 1024`.
    [[noreturn]] void refuse(const option & row, const std::string & text, const std::string & why, const std::string & accepted) const;

private:
    std::string before_names;
    std::vector<std::string> texts;
};

// Throws std::invalid_argument, naming all there are.
const option & find_option(const std::string & name);

// What can be given, in words; of a policy, the engine knows.
std::string accepted_values(const option & row);

}
