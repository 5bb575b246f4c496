#include "engine/profile_file.h"
#include "engine/companion.h"

#include "llama-model.h"

#include <algorithm>
#include <stdexcept>

namespace laprox {

static const char * const kind        = "profile";
static const char * const tensor_name = "evicted";

static budget_profile sized_for(const llama_model & model) {
    budget_profile table { (int32_t) model.hparams.n_layer(), 0, {} };
    for (int32_t il = 0; il < table.n_layer; il++) {
        table.n_head_kv = std::max(table.n_head_kv, (int32_t) model.hparams.n_head_kv(il));
    }
    return table;
}

static void check_shares(const std::vector<double> & evicted) {
    for (double share : evicted) {
        if (!(share >= 0.0 && share <= 1.0)) {
            throw std::invalid_argument("evicts the share " + std::to_string(share) + " of a head; accepted: 0 to 1");
        }
    }
}

profile_file::profile_file(const llama_model & model, const std::string & path) : path(path), table(sized_for(model)) {
    const companion file(model, path, kind);
    table.evicted = values_of(file.tensor({ tensor_name }, { table.n_head_kv, table.n_layer, profile_rows }, { GGML_TYPE_F64, GGML_TYPE_F32 }));
    scorer        = file.text("scorer");
    try {
        check_shares(table.evicted);
    } catch (const std::invalid_argument & e) {
        file.refuse(e.what());
    }
}

void write_profile(const llama_model & model, const std::string & path, const budget_profile & table,
                   const std::map<std::string, std::string> & texts) {
    const budget_profile wanted = sized_for(model);
    if (table.n_layer != wanted.n_layer || table.n_head_kv != wanted.n_head_kv) {
        const auto sizes = [](const budget_profile & t) { return std::to_string(t.n_layer) + " layers with " + std::to_string(t.n_head_kv) + " KV heads"; };
        throw std::invalid_argument("the table is of " + sizes(table) + "; accepted: " + sizes(wanted) + ", as the model has");
    }
    check_shares(table.evicted);
    const ggml_context_ptr ctx { ggml_init({ ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true }) };
    ggml_tensor * evicted = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F64, table.n_head_kv, table.n_layer, profile_rows);
    ggml_set_name(evicted, tensor_name);
    evicted->data = const_cast<double *>(table.evicted.data());
    write_companion(model, path, kind, texts, evicted);
}

}
