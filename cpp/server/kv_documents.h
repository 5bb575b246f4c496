// Documents that `laprox read` wrote, in the folder of --kv-documents: a request names one, and is answered from its state.

#pragma once

#include "server-common.h"
#include "server-task.h"

#include "laprox.h"

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

struct server_kv_document {
    uint64_t    id = 0; // of what is in its file, which may be replaced: then it is another one
    std::string name;
    std::string title;
    size_t      n_bytes = 0;

    llama_tokens tokens;       // of a prompt up to the end of the text
    size_t       n_before = 0; // of them: what the chat template writes before the text

    bool archive = false; // with what was evicted
    std::map<std::string, std::string> chooses_by; // "policy" and "budget" by which a question then chooses anew

    std::shared_ptr<const laprox_document> file;
};

class server_kv_documents {
public:
    // The context was made, or made again after sleeping.
    void init(const llama_context * ctx);

    bool on() const;

    // Of GET /documents: those that can be asked about, and why the others can't.
    json list();

    // The document that a request names, null if it names none. Throws std::invalid_argument with the reason.
    std::shared_ptr<const server_kv_document> named(const json & request);

    const llama_vocab * vocabulary() const { return vocab; }

private:
    struct state_of_file {
        std::filesystem::file_time_type time;
        uintmax_t size = 0;

        bool operator==(const state_of_file & other) const { return time == other.time && size == other.size; }
    };
    struct entry {
        state_of_file state;
        uint64_t      id = 0;
        json          listed;
        std::string   refused; // why it can't be asked about: then id is 0
        std::weak_ptr<const server_kv_document> opened; // slots that hold it keep it
    };

    static std::filesystem::path path_of(const std::string & name);
    static std::optional<state_of_file> find(const std::string & name); // nothing where there is none of this name
    static std::vector<std::string>     names_there(); // of all in the folder. Throws std::runtime_error where it can't be read

    std::shared_ptr<const server_kv_document> open(const std::string & name, const state_of_file & state);
    std::shared_ptr<server_kv_document> read(const std::string & name) const;

    std::mutex mutex; // requests come from many threads
    std::map<std::string, entry> entries;
    std::shared_ptr<const server_kv_document> latest; // between the steps of a request, and its next one, nothing is read again
    uint64_t n_opened = 0;

    const llama_vocab * vocab = nullptr;
    std::string fingerprint; // of the model
    size_t n_ctx = 0; // of a slot
};

// Of this process, as the options are.
server_kv_documents & server_kv_docs();

// A chat about a document, which opens the first message of the user. While the messages are rendered, a mark stands for it, so
// that nothing in it is read as template or control tokens.
class server_kv_chat {
public:
    // Puts the mark where the request names a document. Throws std::invalid_argument.
    explicit server_kv_chat(json & request);

    // What was rendered, as a prompt: with the document's tokens in place of the mark.
    json prompt(const std::string & rendered) const;

private:
    std::shared_ptr<const server_kv_document> document;
    std::string mark;
};

// The prompt of a request, which goes on behind the document that it names. A chat's was made by server_kv_chat, and has it already.
json server_kv_prompt(const json & request, server_task_type type, task_response_type reply);

// Requests at this path can't be about one. Throws std::invalid_argument.
void server_kv_refuse_document(const json & request, const char * path);

// The task is about the document that the request names, if it names one.
void server_kv_take_document(const json & request, server_task & task);
