#include "server/kv_slots.h"

#include "server-common.h"
#include "server-queue.h"

#include "log.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

//
// requests
//

// What of a cache can be another one for each request: the others are of the context, or of its files.
static const std::array<const char *, 2> of_a_request = { "budget", "policy" };

// A number as the text that options take: 2048 are tokens, and so are 2048.0; 0.05 is a share.
static std::string to_text(const json & value, const char * name) {
    if (value.is_string()) {
        return value.get<std::string>();
    }
    if (value.is_number()) {
        const double number = value.get<double>();
        const bool   whole  = number >= 1.0 && number <= 1e15 && number == std::floor(number);
        return whole ? std::to_string((int64_t) number) : value.dump();
    }
    throw std::invalid_argument(std::string("\"") + name + "\" is " + value.dump() + "; accepted: a string" +
            (std::string(name) == "budget" ? " such as \"5%\", \"2048\" (tokens) or \"512MiB\", or a number" : ""));
}

// The server's settings with those of a request, whose policy "off" leaves the layout as it is and evicts nothing. Where neither says
// what is kept, a document with what was evicted from it is asked as it was made: each question chooses anew.
static common_params_kv merge(const common_kv_request & request) {
    common_params_kv merged = common_kv();
    auto said = request.given;
    if (said.empty() && request.document && merged.only_documents) {
        said = request.document->chooses_by;
    }
    if (const auto policy = said.find("policy"); policy != said.end() && policy->second == "off") {
        policy->second = "full";
    }
    if (merged.only_documents && !said.empty() && (said.count("policy") == 0 || said.at("policy") != "full")) {
        merged.given.erase("policy"); // what isn't said is as on a server of no documents
        merged.given.erase("budget");
    }
    for (const auto & [name, value] : said) {
        merged.given[name] = value;
    }
    return merged;
}

common_kv_request server_kv_parse_request(const json & request) {
    if (!request.is_object()) {
        throw std::invalid_argument("must be an object with \"budget\", \"policy\" or both, for example {\"budget\": \"10%\"}");
    }
    common_kv_request result;
    for (const auto & item : request.items()) {
        const auto name = std::find(of_a_request.begin(), of_a_request.end(), item.key());
        if (item.value().is_null()) {
            continue;
        }
        if (name == of_a_request.end()) {
            throw std::invalid_argument("unknown name \"" + item.key() + "\"; accepted: " + string_join({ of_a_request.begin(), of_a_request.end() }, ", "));
        }
        result.given[*name] = to_text(item.value(), *name);
    }
    common_params_kv alone;
    alone.given = result.given;
    alone.resolve("");
    if (alone.on() && !common_kv().on()) {
        throw std::invalid_argument("this server doesn't compress its KV cache. Start it with `--kv-budget` or `--kv-policy`");
    }
    return result;
}

json server_kv_props() {
    const common_params_kv & params = common_kv();
    json props = {
        { "version", laprox_api_version() },
        { "policy",  params.policy_name() },
        { "capabilities", {
            { "policies",         common_kv_policies() },
            { "scorers",          common_kv_scorers() },
            { "allocators",       common_kv_allocators() },
            { "request_override", params.on() },
            { "documents",        server_kv_docs().on() },
        } },
    };
    for (int32_t i = 0; params.on() && i < laprox_option_count(); i++) {
        const laprox_option row  = laprox_option_at(i);
        const std::string   kind = row.kind;
        const std::string   text = params.text(row.name);
        if (kind == "integer") {
            props[row.name] = std::stoll(text);
        } else if (kind == "number") {
            props[row.name] = std::stod(text);
        } else if (kind == "folder") { // where it is, is nobody's business but the server's
            props[row.name] = text == "auto" || text == "ram" || text == "off" ? text : kind;
        } else if (kind != "path") {
            props[row.name] = text;
        }
    }
    return props;
}

std::string server_kv_filename(const std::string & body) {
    const json request = json::parse_no_throw(body);
    const std::string accepted = "; accepted: {\"filename\": \"document.bin\"}, a name without a folder";
    if (!request.is_object()) {
        throw std::invalid_argument("the body must be a JSON object" + accepted);
    }
    if (!request.contains("filename")) {
        throw std::invalid_argument("\"filename\" is missing" + accepted);
    }
    if (!request.at("filename").is_string()) {
        throw std::invalid_argument("\"filename\" is " + request.at("filename").dump() + accepted);
    }
    return request.at("filename").get<std::string>();
}

bool server_kv_archive(const std::string & body) {
    const json request = json::parse_no_throw(body);
    const json archive = request.is_object() ? request.value("archive", json(false)) : json(false);
    if (!archive.is_boolean()) {
        throw std::invalid_argument("\"archive\" is " + archive.dump() + "; accepted: true, false");
    }
    return archive.get<bool>();
}

//
// slots
//

llama_pos server_kv_compressed_for(llama_context * ctx, int id_slot) {
    return common_kv().on() ? laprox_compressed_for(ctx, id_slot) : 0;
}

size_t server_kv_common(const server_prompt & cached, const server_tokens & tokens) {
    const size_t n_common = cached.tokens.get_common_prefix(tokens);
    return cached.tokens.pos_next(n_common) >= cached.compressed_for ? n_common : 0;
}

void server_kv::init(llama_context * ctx_new, size_t n_slots) {
    const common_params_kv & params = common_kv();
    ctx = params.on() ? ctx_new : nullptr;
    slot empty;
    empty.policy = params.policy_name();
    empty.budget = params.text("budget");
    slots.assign(n_slots, empty);
    if (on()) {
        server_kv_docs().init(ctx);
    }
    metrics.on = on();
    archive_in_states(true); // slots that are swapped to RAM keep it
}

laprox_stats server_kv::get_stats(int id_slot) const {
    laprox_stats stats {};
    laprox_get_stats(ctx, id_slot, &stats);
    return stats;
}

void server_kv::archive_in_states(bool carried) const {
    if (on()) {
        laprox_set_archive_in_states(ctx, carried);
    }
}

llama_pos server_kv::cut_from(int id_slot) const {
    return laprox_tail_begin(ctx, id_slot);
}

double server_kv::bytes_of_request(const common_params_kv & merged) const {
    const std::string text = merged.text("budget");
    const laprox::budget budget = laprox::parse_budget(text);
    if (budget.unit != laprox::budget_unit::bytes) {
        return 0.0;
    }
    return text != common_kv().text("budget") ? budget.value : budget.value/slots.size();
}

void server_kv::protect_functions(const common_kv_request & request, double bytes, common_params_kv & merged) const {
    if (request.functions.empty() || merged.policy_name() == "full") {
        return;
    }
    std::string text = merged.text("protect");
    int64_t n_tokens = 0;
    for (const laprox::position_range & r : request.functions) {
        text += (text.empty() ? "" : ",") + std::to_string(r.first) + "-" + std::to_string(r.end);
        n_tokens += r.end - r.first;
    }
    if (bytes > 0.0 && !laprox_may_protect(ctx, n_tokens, bytes)) { // a limit for what is protected, too
        SRV_WRN("%lld tokens say what functions there are, more than a third of the budget, so they may be evicted\n", (long long) n_tokens);
        return;
    }
    merged.given["protect"] = text;
}

std::string server_kv::begin(int id_slot, const common_kv_request & request) {
    if (!on()) {
        return "";
    }
    common_params_kv merged = merge(request);
    slot & s = slots[id_slot];
    s.budget = merged.text("budget");
    const double bytes = bytes_of_request(merged);
    protect_functions(request, bytes, merged);
    const bool as_others = merged.given == common_kv().given;
    if (!as_others && bytes > 0.0) { // settings of its own have a budget of their own
        merged.given["budget"] = std::to_string(std::max((int64_t) (bytes/1024), (int64_t) 1)) + "KiB";
    }
    const common_kv_settings settings = merged.resolve("");
    if (!laprox_seq_set_params(ctx, id_slot, as_others ? nullptr : settings.get())) {
        return std::string("Field 'kv': ") + laprox_last_error();
    }
    s.policy         = merged.policy_name();
    s.compress_ms    = 0;
    s.n_reread       = 0;
    s.n_recalled_before = get_stats(id_slot).entries_recalled;
    s.document = request.document;
    s.again   = -1;
    s.n_again = 0;
    s.goes_on = s.stale = false;
    s.refused.clear();
    return "";
}

bool server_kv::can_reuse(int id_slot, const server_tokens & cached, const server_tokens & prompt) const {
    return !on() || cached.pos_next(cached.get_common_prefix(prompt)) >= laprox_compressed_for(ctx, id_slot);
}

std::string server_kv::start_from_document(int id_slot, const server_task & task, server_prompt & cached, int & n_past, llama_context * draft) {
    const auto & document = task.params.kv.document;
    if (!document || (n_past >= (int) document->tokens.size() && n_past == (int) cached.tokens.size())) {
        return "";
    }
    const int64_t t0 = ggml_time_us();
    cached.clear();
    n_past = 0;
    if (draft) { // which hasn't read it, and drafts from what follows
        llama_memory_seq_rm(llama_get_memory(draft), id_slot, -1, -1);
    }
    if (!laprox_document_load(ctx, id_slot, document->file.get())) {
        const std::string reason = laprox_last_error();
        llama_memory_seq_rm(llama_get_memory(ctx), id_slot, -1, -1);
        return "Field 'documents': the document \"" + document->name + "\" can't be asked about: " + reason;
    }
    cached.tokens = server_tokens(document->tokens, /*has_mtmd =*/ false);
    cached.tokens.kv_document = document->id;
    n_past = document->tokens.size();
    slots[id_slot].n_recalled_before = get_stats(id_slot).entries_recalled;
    SRV_INF("slot %d, task %d: starts from the document \"%s\", %d tokens, in %.1f ms\n", id_slot, task.id, document->name.c_str(), n_past,
            (ggml_time_us() - t0)/1e3);
    return "";
}

int server_kv::reuse(int id_slot, const server_task & task, const server_tokens & cached, int n_past, const server_prompt_cache * ram) {
    if (!on()) {
        return n_past;
    }
    // llama.cpp may have gone back further, to a checkpoint of layers that can't be cut
    if (!can_reuse(id_slot, cached, task.tokens) || cached.pos_next(n_past) < cut_from(id_slot)) {
        n_past = 0;
    }
    slot & s = slots[id_slot];
    const laprox_stats found = get_stats(id_slot);
    const bool evicted = found.entries_held < found.entries_full;

    const llama_model * model = llama_get_model(ctx);
    llama_memory_t memory = llama_get_memory(ctx);
    const auto is_cut = [&](int n) { return cached.pos_next(n) <= llama_memory_seq_pos_max(memory, id_slot); };
    const auto cut    = [&](int n) { return llama_memory_seq_rm(memory, id_slot, cached.pos_next(n), -1); };
    if (n_past > 0 && is_cut(n_past)) {
        // Where entries come back by the queries of the prompt's last tokens, what is cut off may have taken the place of theirs:
        // so a whole window of tokens is evaluated, but not where a sliding window lacks what is before.
        const bool goes_back = evicted && cut_from(id_slot) == 0 && laprox_policy_probes(s.policy.c_str()) &&
                llama_model_n_swa(model) == 0;
        const auto is_text   = [&](int first) { // so that no image is cut in two
            for (int i = first - 1; i < n_past; i++) {
                if (task.tokens[i] == LLAMA_TOKEN_NULL) {
                    return false;
                }
            }
            return true;
        };
        const int  n_early   = goes_back ? std::max(1, (int) task.tokens.size() - std::stoi(common_kv().text("window"))) : n_past;
        n_past = n_early < n_past && is_text(n_early) && cut(n_early) ? n_early : n_past;
        // where there is no room for what a cut leaves, llama-server reads the prompt again; later it would give up altogether
        if (is_cut(n_past) && !cut(n_past)) {
            n_past = 0;
        }
    }
    s.goes_on = n_past > 0 && evicted;
    // recurrent layers can't take back by themselves what is to be evaluated again
    if (s.goes_on && llama_model_is_hybrid(model) && laprox_compressed_for(ctx, id_slot) == 0 &&
            (int) task.tokens.size() - n_past <= std::stoi(common_kv().text("recall_tokens"))) {
        laprox_mark(ctx, id_slot);
    }
    s.n_recalled_before = n_past > 0 ? s.n_recalled_before : 0;

    size_t n_cached = 0;
    if (task.params.cache_prompt) {
        if (n_past == 0 && evicted) {
            n_cached = cached.get_common_prefix(task.tokens);
        }
        if (ram) {
            for (const server_prompt_cache_state & state : ram->states) {
                if (server_kv_common(state.prompt, task.tokens) == 0) {
                    n_cached = std::max(n_cached, state.prompt.tokens.get_common_prefix(task.tokens));
                }
            }
        }
    }
    s.n_document_read = s.document ? std::max(0, (int) s.document->tokens.size() - n_past) : 0;
    s.n_reread = std::max(0, (int) n_cached - n_past);
    if (s.n_reread > 0) {
        SRV_INF("slot %d, task %d: %d cached tokens are evaluated again: what was kept of them was chosen for a prompt that this one doesn't begin with\n",
                id_slot, task.id, s.n_reread);
        metrics.n_reread += s.n_reread;
    }
    return n_past;
}

void server_kv::before_decode() {
    if (on()) {
        stats_before = get_stats(-1);
    }
}

void server_kv::after_decode(int ret) {
    if (on()) {
        reason = ret == 0 ? "" : laprox_last_error();
        metrics.add(stats_before, get_stats(-1));
    }
}

std::string server_kv::explain(const std::string & error) const {
    return error.empty() || reason.empty() ? error : error + " KV cache: " + reason;
}

size_t server_kv::prompt_done(int id_slot, const server_tokens & prompt, server_queue & queue) {
    if (!on()) {
        return prompt.size();
    }
    int32_t n_text = 0; // tokens after the last image: it isn't evaluated again
    while (n_text < (int32_t) prompt.size() && prompt[prompt.size() - 1 - n_text] != LLAMA_TOKEN_NULL) {
        n_text++;
    }
    slot & s = slots[id_slot];
    const laprox_stats before = get_stats(id_slot);
    const int64_t      t0     = ggml_time_us();

    queue.yield_to_queue([&]() {
        laprox_prompt_done(ctx, id_slot, n_text, &s.again);
        s.refused = laprox_last_error(); // also where it succeeded, but nothing could come back
    });

    s.stats = get_stats(id_slot);
    metrics.add(before, s.stats);
    if (!s.refused.empty()) {
        SRV_WRN("slot %d: the KV cache was not compressed: %s\n", id_slot, s.refused.c_str());
        metrics.n_refused++;
    } else if (s.stats.compressions > before.compressions) {
        const double seconds = (ggml_time_us() - t0)/1e6;
        s.compress_ms += seconds*1e3;
        metrics.compression_seconds.add(seconds);
        metrics.compression_kept.add((double) s.stats.entries_held/s.stats.entries_full);
        SRV_INF("slot %d: %lld tokens, %.1f%% of the entries kept, %.1f MiB instead of %.1f MiB, took %.1f ms\n", id_slot,
                (long long) s.stats.tokens_seen, 100.0*s.stats.entries_held/s.stats.entries_full,
                s.stats.kv_bytes/1048576.0, before.kv_bytes/1048576.0, s.compress_ms);
    }
    s.stale = s.goes_on && !s.document && (s.stats.archived_entries == 0 || !s.refused.empty());
    if (s.again < 0) {
        return prompt.size();
    }
    SRV_INF("slot %d: %lld entries came back for this prompt; its tokens from position %d on are evaluated again\n", id_slot,
            (long long) (s.stats.entries_recalled - before.entries_recalled), s.again);
    const size_t n_done = prompt.size_up_to_pos(s.again);
    s.n_again += prompt.size() - n_done;
    return n_done;
}

bool server_kv::counts(int id_slot) {
    if (!on() || slots[id_slot].n_again == 0) {
        return true;
    }
    slots[id_slot].n_again--;
    return false;
}

bool server_kv::is_again(int id_slot) const {
    return on() && slots[id_slot].again >= 0;
}

void server_kv::clear_reason() const {
    if (on()) {
        get_stats(-1); // every call that succeeds clears it
    }
}

std::string server_kv::reason_or(const std::string & otherwise) const {
    const std::string last = on() ? laprox_last_error() : "";
    return last.empty() ? otherwise : last;
}

//
// numbers
//

void server_kv::refresh() {
    if (!on()) {
        return;
    }
    for (size_t id = 0; id < slots.size(); id++) {
        slots[id].stats = get_stats(id);
    }
    metrics.held = get_stats(-1);
}

json server_kv::slot_json(int id_slot) const {
    const slot & s = slots[id_slot];
    return {
        { "policy",        s.policy },
        { "budget",        s.budget },
        { "tokens_seen",   s.stats.tokens_seen },
        { "entries_held",  s.stats.entries_held },
        { "entries_full",  s.stats.entries_full },
        { "kv_bytes",      s.stats.kv_bytes },
        { "kv_bytes_full", s.stats.kv_bytes_full },
        { "window_bytes",  s.stats.window_bytes },
        { "compressions",  s.stats.compressions },
        { "recalls",       s.stats.recalls },
        { "archived_entries", s.stats.archived_entries },
        { "archived_bytes",   s.stats.archived_bytes },
        { "tokens_lost",      s.stats.tokens_lost },
    };
}

// llama-server's own reply, and "kv" where it has its timings; for formats without them, at the top or with the usage.
struct server_task_result_cmpl_final_kv : server_task_result_cmpl_final {
    json kv;

    json to_json() override {
        json reply = server_task_result_cmpl_final::to_json();
        if (reply.is_array()) { // events of a stream
            for (json & event : reply) {
                json & data = event.contains("data") ? event.at("data") : event;
                if (data.contains("timings") || json_value(data, "type", std::string()) == "message_delta") {
                    data["kv"] = kv;
                }
            }
        } else if (response_fields.empty() || res_type != TASK_RESPONSE_TYPE_NONE) {
            reply["kv"] = kv;
        } else {
            const json chosen = json_get_nested_values(response_fields, {{ "kv", kv }});
            for (const auto & item : chosen.items()) {
                reply[item.key()] = item.value();
            }
        }
        return reply;
    }
};

std::unique_ptr<server_task_result_cmpl_final> server_kv::make_final_result(int id_slot) {
    if (!on()) {
        return std::make_unique<server_task_result_cmpl_final>();
    }
    slots[id_slot].stats = get_stats(id_slot);
    auto result = std::make_unique<server_task_result_cmpl_final_kv>();
    result->kv = slot_json(id_slot);
    result->kv["compress_ms"]   = slots[id_slot].compress_ms;
    result->kv["entries_recalled"] = std::max<int64_t>(0, slots[id_slot].stats.entries_recalled - slots[id_slot].n_recalled_before);
    result->kv["tokens_reread"] = slots[id_slot].n_reread;
    if (const auto & document = slots[id_slot].document) {
        result->kv["document"] = {
            { "name",        document->name },
            { "title",       document->title },
            { "tokens",      document->tokens.size() },
            { "tokens_read", slots[id_slot].n_document_read },
        };
    }
    if (slots[id_slot].stale) {
        result->kv["stale"] = true;
    }
    if (!slots[id_slot].refused.empty()) {
        result->kv["refused"] = slots[id_slot].refused;
    }
    return result;
}
