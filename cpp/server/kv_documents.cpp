#include "server/kv_documents.h"

#include "server/kv_params.h"

#include "common.h"

#include <algorithm>
#include <cctype>
#include <fstream>
#include <random>
#include <stdexcept>
#include <system_error>

namespace fs = std::filesystem;

static const char * const extension = ".kv";

//
// the folder
//

server_kv_documents & server_kv_docs() {
    static server_kv_documents documents;
    return documents;
}

void server_kv_documents::init(const llama_context * ctx) {
    const std::lock_guard lock(mutex);
    entries.clear();
    latest = nullptr;
    const llama_model * model = llama_get_model(ctx);
    char name[17];
    fingerprint = laprox_model_fingerprint(model, name) ? name : "";
    vocab = llama_model_get_vocab(model);
    n_ctx = llama_n_ctx_seq(ctx);
}

bool server_kv_documents::on() const {
    return !common_kv().documents.empty();
}

fs::path server_kv_documents::path_of(const std::string & name) {
    return fs::u8path(common_kv().documents)/fs::u8path(name + extension);
}

std::optional<server_kv_documents::state_of_file> server_kv_documents::find(const std::string & name) {
    if (!fs_validate_filename(name)) {
        return std::nullopt;
    }
    const fs::path path = path_of(name);
    std::error_code error; // a file may go while we look
    if (!fs::is_regular_file(path, error)) {
        return std::nullopt;
    }
    state_of_file state;
    state.time = fs::last_write_time(path, error);
    if (!error) {
        state.size = fs::file_size(path, error);
    }
    return error ? std::nullopt : std::optional(state);
}

std::vector<std::string> server_kv_documents::names_there() {
    std::vector<std::string> result;
    std::error_code error;
    for (fs::directory_iterator it(fs::u8path(common_kv().documents), error), end; !error && it != end; it.increment(error)) {
        std::error_code gone;
        if (it->path().extension() == extension && it->is_regular_file(gone)) {
            result.push_back(it->path().stem().u8string());
        }
    }
    if (error) {
        throw std::runtime_error("the folder of --kv-documents can't be read: " + error.message());
    }
    std::sort(result.begin(), result.end());
    return result;
}

json server_kv_documents::list() {
    const std::lock_guard lock(mutex);
    json documents = json::array();
    json refused   = json::array();
    for (const std::string & name : names_there()) {
        try {
            if (!fs_validate_filename(name)) {
                throw std::runtime_error("no request can name it; accepted: a file whose name has no control characters, none of / \\ : * ? \" < > | "
                        "and no \"..\", and neither begins nor ends with a space");
            }
            const auto state = find(name);
            if (!state) {
                continue; // it went while we looked
            }
            const auto known = entries.find(name);
            if (known == entries.end() || !(known->second.state == *state) || known->second.id == 0) {
                open(name, *state);
            }
            documents.push_back(entries.at(name).listed);
        } catch (const std::exception & e) {
            refused.push_back({{ "name", name }, { "reason", e.what() }});
        }
    }
    return {{ "documents", documents }, { "refused", refused }};
}

static std::string quoted(const json & value) {
    return value.dump_safe();
}

std::shared_ptr<const server_kv_document> server_kv_documents::named(const json & request) {
    if (!request.contains("documents") || request.at("documents").is_null()) {
        return nullptr;
    }
    const json & names = request.at("documents");
    if (!on()) {
        if (names.is_array() && !names.empty() && names.at((size_t) 0).is_string()) {
            throw std::invalid_argument("Field 'documents': this server offers none. Start it with `--kv-documents`");
        }
        return nullptr; // what other programs mean by it, llama-server ignores
    }
    if (!names.is_array() || names.empty() || !names.at((size_t) 0).is_string()) {
        throw std::invalid_argument("Field 'documents' is " + quoted(names) + "; accepted: a list with a name, such as [\"report\"]");
    }
    if (names.size() > 1) {
        throw std::invalid_argument("Field 'documents' has " + std::to_string(names.size()) + " names; accepted: one. What is held of a document "
                "was computed without the others, at the same positions; `laprox read` reads several files as one document");
    }
    const json & given = names.at((size_t) 0);
    const std::string name = given.get<std::string>();

    const std::lock_guard lock(mutex);
    const auto state = find(name);
    if (!state) {
        std::vector<std::string> accepted = names_there();
        accepted.erase(std::remove_if(accepted.begin(), accepted.end(), [](const std::string & other) { return !fs_validate_filename(other); }), accepted.end());
        const size_t n_said = std::min<size_t>(accepted.size(), 20); // GET /documents has them all
        const std::string list = accepted.empty() ? "none, as the folder has no *.kv file" :
                string_join({ accepted.begin(), accepted.begin() + n_said }, ", ") + (n_said < accepted.size() ? ", ..." : "");
        throw std::invalid_argument("Field 'documents': there is no document " + quoted(given) + "; accepted: the name of a file of the server's folder, "
                "without folder and .kv: " + list);
    }
    try {
        latest = open(name, *state);
    } catch (const std::exception & e) {
        throw std::invalid_argument("Field 'documents': the document " + quoted(given) + " can't be asked about: " + e.what());
    }
    return latest;
}

std::shared_ptr<const server_kv_document> server_kv_documents::open(const std::string & name, const state_of_file & state) {
    entry & known = entries[name];
    const bool same = known.state == state && known.id > 0;
    if (const auto opened = known.opened.lock(); same && opened) {
        return opened;
    }
    if (known.state == state && !known.refused.empty()) {
        throw std::runtime_error(known.refused);
    }
    const auto id = same ? known.id : ++n_opened;
    known = {}; // nothing else is known of it where it is refused now
    std::shared_ptr<server_kv_document> document;
    try {
        document = read(name);
    } catch (const std::exception & e) {
        if (std::ifstream(path_of(name), std::ios::binary)) { // what can't be opened may be permitted later, and is cheap to ask for again
            known.state   = state;
            known.refused = e.what();
        }
        throw;
    }
    document->id      = id;
    document->n_bytes = state.size;
    known.state  = state;
    known.id     = id;
    known.opened = document;
    known.listed = {
        { "name",    document->name },
        { "title",   document->title },
        { "tokens",  document->tokens.size() },
        { "bytes",   document->n_bytes },
        { "archive", document->archive },
    };
    return document;
}

//
// a file
//

// Its settings as JSON, of which these are used.
struct document_settings {
    std::string policy, budget, type_k, type_v;
    bool archive;
    bool lora; // whether an adapter was set

    explicit document_settings(const std::string & text) {
        try {
            const json settings = json::parse(text);
            policy  = settings.at("policy").get<std::string>();
            budget  = settings.at("budget").get<std::string>();
            type_k  = settings.at("cache_type_k").get<std::string>();
            type_v  = settings.at("cache_type_v").get<std::string>();
            archive = settings.at("archive").get<bool>();
            lora    = settings.contains("lora") && !settings.at("lora").is_null();
        } catch (const std::exception &) {
            throw std::runtime_error("its settings can't be read, so another program wrote it");
        }
    }
};

// Entries that retention gates have marked are of another layout.
static bool has_marks(const std::string & policy) {
    return policy.substr(0, policy.find(':')) == "retention";
}

std::shared_ptr<server_kv_document> server_kv_documents::read(const std::string & name) const {
    laprox_document * opened = laprox_document_open(path_of(name).u8string().c_str());
    if (!opened) {
        throw std::runtime_error(laprox_last_error());
    }
    const auto document = std::make_shared<server_kv_document>();
    document->file.reset(opened, laprox_document_free);
    const auto text = [&](const char * key) {
        const char * value = laprox_document_get(opened, key);
        if (!value) {
            throw std::runtime_error(std::string("it has no ") + key + ", so another program wrote it");
        }
        return std::string(value);
    };
    const document_settings settings(text("settings"));
    document->name    = name;
    document->title   = text("title");
    document->archive = settings.archive;
    if (settings.archive) {
        common_params_kv made_with;
        made_with.given["budget"] = settings.budget;
        if (settings.policy.rfind("custom", 0) != 0) { // of one's own, which isn't here
            made_with.given["policy"] = settings.policy;
        }
        made_with.resolve(""); // throws what isn't accepted
        document->chooses_by = made_with.given;
    }
    llama_tokens & tokens = document->tokens;
    tokens.resize(laprox_document_tokens(opened, nullptr, 0));
    laprox_document_tokens(opened, tokens.data(), tokens.size());

    // The engine refuses these, too, when it loads one; who asks for the list wants to know before.
    const common_params_kv & here = common_kv();
    if (const std::string made_for = text("fingerprint"); made_for != fingerprint) {
        throw std::runtime_error("it was made with another model (fingerprint " + made_for + " there, " + fingerprint + " here)");
    }
    if (settings.type_k != here.type_k || settings.type_v != here.type_v) {
        throw std::runtime_error("it was made with a cache of other types: start the server with -ctk " + settings.type_k + " -ctv " + settings.type_v +
                " (here: " + here.type_k + ", " + here.type_v + ")");
    }
    if (settings.lora) { // which one, only Python knows
        throw std::runtime_error("it was made with a LoRA adapter; accepted here: documents that were made without");
    }
    if (has_marks(settings.policy) != has_marks(here.policy_name())) {
        throw std::runtime_error("it was made with --kv-policy " + settings.policy + ", and entries that gates have marked only go with policies of gates "
                "(here: " + here.policy_name() + ")");
    }
    if (tokens.size() >= n_ctx) {
        throw std::runtime_error("it has " + std::to_string(tokens.size()) + " tokens, a slot has room for " + std::to_string(n_ctx) +
                "; accepted: a -c that holds a question, too");
    }
    const llama_tokens of_text = common_tokenize(vocab, text("text"), /*add_special =*/ false, /*parse_special =*/ false);
    if (of_text.empty() || of_text.size() > tokens.size() || !std::equal(of_text.rbegin(), of_text.rend(), tokens.rbegin())) {
        throw std::runtime_error("it was made with another tokenizer: its tokens are not those of its text");
    }
    document->n_before = tokens.size() - of_text.size();
    return document;
}

//
// requests
//

// As laprox.chat.conversation puts them together.
static const char * const between = "\n\n"; // the document and the first question

server_kv_chat::server_kv_chat(json & request) : document(server_kv_docs().named(request)) {
    if (!document) {
        return;
    }
    std::random_device random;
    mark = "document"; // letters and digits, as a template may write JSON
    for (int i = 0; i < 4; i++) {
        mark += string_format("%08x", random());
    }
    for (json & message : request.at("messages")) {
        if (json_value(message, "role", std::string()) != "user") {
            continue;
        }
        const std::string opening = mark + between;
        json & content = message.at("content");
        if (!content.is_array()) {
            content = opening + (content.is_string() ? content.get<std::string>() : "");
        } else if (!content.empty() && json_value(content.at((size_t) 0), "type", std::string()) == "text") {
            json & first = content.at((size_t) 0).at("text");
            first = opening + first.get<std::string>();
        } else {
            json parts = json::array();
            parts.push_back({{ "type", "text" }, { "text", opening }});
            parts.insert(content);
            content = parts;
        }
        return;
    }
    throw std::invalid_argument("Field 'documents': there is no message of the role user, which the document would open");
}

// Tokens from `first` on, behind what is there.
static void append(json & prompt, const llama_tokens & tokens, size_t first = 0) {
    prompt.insert(json(std::vector<llama_token>(tokens.begin() + first, tokens.end())));
}

json server_kv_chat::prompt(const std::string & rendered) const {
    if (!document) {
        return rendered;
    }
    // a template may change the case of letters
    std::string lower = rendered;
    std::transform(lower.begin(), lower.end(), lower.begin(), [](unsigned char c) { return (char) std::tolower(c); });
    size_t at = lower.find(mark);
    if (at == std::string::npos) {
        throw std::invalid_argument("Field 'documents': the chat template leaves out where the document begins");
    }
    // Where a template doesn't write the beginning-of-text token, `laprox read` does without, and llama-server adds it.
    const auto begins = [&](bool add_special) {
        const llama_tokens before = common_tokenize(server_kv_docs().vocabulary(), rendered.substr(0, at), add_special, /*parse_special =*/ true);
        return before.size() == document->n_before && std::equal(before.begin(), before.end(), document->tokens.begin());
    };
    if (!begins(true) && !begins(false)) {
        throw std::invalid_argument("Field 'documents': the document \"" + document->name + "\" was made with another chat template, or the request "
                "has something before it, such as a system message or tools; accepted: what the template writes before a first message of the user");
    }
    json prompt = json::array();
    append(prompt, document->tokens);
    while (true) {
        const size_t begin = at + mark.size();
        at = lower.find(mark, begin);
        prompt.push_back(rendered.substr(begin, at == std::string::npos ? at : at - begin));
        if (at == std::string::npos) {
            return prompt;
        }
        append(prompt, document->tokens, document->n_before); // a template that says it twice
    }
}

json server_kv_prompt(const json & request, server_task_type type, task_response_type reply) {
    const json & prompt = request.at("prompt");
    const bool is_chat = reply != TASK_RESPONSE_TYPE_NONE && reply != TASK_RESPONSE_TYPE_OAI_CMPL;
    const auto document = is_chat ? nullptr : server_kv_docs().named(request);
    if (!document) {
        return prompt;
    }
    if (type == SERVER_TASK_TYPE_INFILL) {
        server_kv_refuse_document(request, "/infill");
    }
    json behind = json::array();
    append(behind, document->tokens);
    if (prompt.is_string()) {
        behind.push_back(prompt);
    } else if (json_is_array_of_mixed_numbers_strings(prompt) || json_is_array_of_numbers(prompt)) {
        behind.insert(prompt);
    } else {
        throw std::invalid_argument("Field 'documents': the prompt is neither text nor tokens; accepted: one prompt, which goes on behind the document");
    }
    return behind;
}

void server_kv_refuse_document(const json & request, const char * path) {
    if (server_kv_docs().named(request)) {
        throw std::invalid_argument(std::string("Field 'documents': ") + path + " has no place for a document; accepted: in chats and /completion");
    }
}

void server_kv_take_document(const json & request, server_task & task) {
    const auto document = server_kv_docs().named(request);
    if (!document) {
        return;
    }
    const llama_tokens & tokens = document->tokens;
    const auto begins = [&]() {
        for (size_t i = 0; i < tokens.size(); i++) {
            if (task.tokens[i] != tokens[i]) {
                return false;
            }
        }
        return true;
    };
    if (task.tokens.size() <= tokens.size() || !begins()) { // the file may have been replaced meanwhile
        throw std::invalid_argument("Field 'documents': the prompt has nothing behind the document \"" + document->name + "\"; accepted: a question, say");
    }
    task.tokens.kv_document = document->id;
    task.params.kv.document = document;
}
