#include "engine/gates.h"
#include "engine/companion.h"
#include "engine/error.h"

#include "llama-model.h"

#include <map>

namespace laprox {

static const std::vector<ggml_type> matrices = { GGML_TYPE_F32, GGML_TYPE_F16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0 };
static const std::vector<ggml_type> biases   = { GGML_TYPE_F32 };

// The memory of the layer's device. On a CPU, the one that the layer's own matrices are in if a matrix of a gate can be
// multiplied there too: it may rearrange them, which is faster.
static ggml_backend_buffer_type_t place_for(const llama_model & model, uint32_t il, const ggml_tensor * matrix) {
    const ggml_backend_dev_t         dev     = model.dev_layer(il);
    const ggml_backend_buffer_type_t generic = ggml_backend_dev_buffer_type(dev);
    if (ggml_backend_dev_type(dev) != GGML_BACKEND_DEVICE_TYPE_CPU) {
        return generic;
    }
    const llama_layer & layer = model.layers[il];
    for (const ggml_tensor * own : { layer.wq, layer.wqkv, layer.wo, layer.ffn_down }) {
        ggml_backend_buffer_type_t buft = own && own->buffer ? ggml_backend_buffer_get_type(own->buffer) : generic;
        if (buft == generic || ggml_backend_buft_get_device(buft) != dev) {
            continue;
        }
        const ggml_context_ptr ctx { ggml_init({ 4*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true }) };
        ggml_tensor * w  = ggml_dup_tensor(ctx.get(), matrix);
        ggml_tensor * op = ggml_mul_mat(ctx.get(), w, ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, w->ne[0], 512));
        const ggml_backend_buffer_ptr empty { ggml_backend_buft_alloc_buffer(buft, 0) };
        w->buffer = empty.get();
        if (ggml_backend_dev_supports_op(dev, op)) {
            return buft;
        }
    }
    return generic;
}

gate_set::gate_set(const llama_model & model, const std::string & path) : path(path) {
    const companion file(model, path, "gates");
    const auto & hparams = model.hparams;

    const std::string type = file.text("type");
    if (type != "rg" && type != "rg10") {
        file.refuse("have the unknown type \"" + type + "\"; accepted: rg, rg10");
    }
    const std::string activation = file.text("activation");
    if (activation != "silu" && activation != "gelu") {
        file.refuse("have the unknown activation \"" + activation + "\"; accepted: silu, gelu");
    }
    gelu = activation == "gelu";

    const auto same = [&](const char * what, const char * key, uint32_t here) {
        if (file.number(key) != here) {
            file.refuse(std::string("are for ") + std::to_string(file.number(key)) + " " + what + ", the model has " + std::to_string(here));
        }
    };
    same("layers", "block_count", hparams.n_layer());
    same("dimensions", "embedding_length", hparams.n_embd);
    const int64_t hidden = file.number("hidden_length");

    // every tensor goes to the device of its layer; one that layers share to that of each
    std::map<ggml_backend_buffer_type_t, std::pair<ggml_context_ptr, std::map<const ggml_tensor *, ggml_tensor *>>> places;
    layers.resize(hparams.n_layer());
    for (uint32_t il = 0; il < hparams.n_layer(); il++) {
        if (!hparams.has_kv(il) || hparams.is_recr(il) || hparams.n_head_kv(il) == 0) {
            continue;
        }
        same("KV heads", "head_count_kv", hparams.n_head_kv(il));
        const auto place = [&](const char * name, const std::vector<int64_t> & ne) {
            const bool matrix = ne.size() > 1;
            const ggml_tensor * t = file.tensor({ "blk." + std::to_string(il) + "." + name, name }, ne, matrix ? matrices : biases);
            auto & [ctx, copies] = places[matrix ? place_for(model, il, t) : ggml_backend_dev_buffer_type(model.dev_layer(il))];
            if (!ctx) {
                ctx.reset(ggml_init({ (6*(size_t) hparams.n_layer() + 2)*ggml_tensor_overhead(), nullptr, /*.no_alloc =*/ true }));
            }
            ggml_tensor *& copy = copies[t];
            if (!copy) {
                copy = ggml_dup_tensor(ctx.get(), t);
                ggml_set_name(copy, t->name);
            }
            return copy;
        };
        layer_gate & gate = layers[il];
        const int64_t n_embd = hparams.n_embd, n_head_kv = hparams.n_head_kv(il);
        gate.in    = place("gate_in.weight",  { n_embd, hidden });
        gate.in_b  = place("gate_in.bias",    { hidden });
        if (type == "rg10") {
            gate.mid   = place("gate_mid.weight", { hidden, hidden });
            gate.mid_b = place("gate_mid.bias",   { hidden });
        }
        gate.out   = place("gate_out.weight", { hidden, n_head_kv });
        gate.out_b = place("gate_out.bias",   { n_head_kv });
    }
    for (auto & [buft, entry] : places) {
        auto & [ctx, copies] = entry;
        ggml_backend_buffer_ptr buffer { ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), buft) };
        if (!buffer) {
            file.refuse(std::string("find no room on ") + ggml_backend_buft_name(buft));
        }
        ggml_backend_buffer_set_usage(buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        for (const auto & [from, to] : copies) {
            ggml_backend_tensor_set(to, from->data, 0, ggml_nbytes(from));
        }
        buffers.emplace_back(std::move(ctx), std::move(buffer));
    }
}

ggml_tensor * gate_set::activate(ggml_context * ctx, ggml_tensor * t) const {
    return gelu ? ggml_gelu_erf(ctx, t) : ggml_silu(ctx, t); // PyTorch's gelu is the exact one
}

ggml_tensor * gate_set::build(ggml_context * ctx, ggml_cgraph * gf, uint32_t il) const {
    const std::string name = "attn_norm-" + std::to_string(il);
    ggml_tensor * x = nullptr;
    for (int i = ggml_graph_n_nodes(gf) - 1; i >= 0 && !x; i--) {
        if (name == ggml_graph_node(gf, i)->name) {
            x = ggml_graph_node(gf, i);
        }
    }
    if (!x || il >= layers.size() || !layers[il].in) {
        refuse("gates " + path + " read the attention block's normed input, and layer " + std::to_string(il) +
                " of this architecture has none by that name or no gate");
    }
    const layer_gate & gate = layers[il];
    const auto linear = [&](ggml_tensor * w, ggml_tensor * b, ggml_tensor * t) { return ggml_add(ctx, ggml_mul_mat(ctx, w, t), b); };

    ggml_tensor * h = activate(ctx, linear(gate.in, gate.in_b, x));
    if (gate.mid) {
        h = activate(ctx, linear(gate.mid, gate.mid_b, h));
    }
    ggml_tensor * z = linear(gate.out, gate.out_b, h); // [n_head_kv, n_tokens]
    return ggml_reshape_3d(ctx, z, 1, z->ne[0], z->ne[1]);
}

}
