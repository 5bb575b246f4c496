#include "engine/gates.h"
#include "engine/error.h"
#include "engine/settings.h"

#include "ggml-cpp.h"
#include "gguf.h"
#include "llama-model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <map>
#include <stdexcept>

namespace laprox {

// CRC-32 as in zlib.
static uint32_t crc32(uint32_t crc, const uint8_t * data, size_t n) {
    static const std::array<uint32_t, 256> table = [] {
        std::array<uint32_t, 256> t {};
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t c = i;
            for (int bit = 0; bit < 8; bit++) {
                c = c & 1 ? 0xedb88320u ^ (c >> 1) : c >> 1;
            }
            t[i] = c;
        }
        return t;
    }();
    crc = ~crc;
    for (size_t i = 0; i < n; i++) {
        crc = table[(crc ^ data[i]) & 0xff] ^ (crc >> 8);
    }
    return ~crc;
}

static std::string shape_of(const std::vector<int64_t> & ne) {
    std::string text;
    for (int64_t n : ne) {
        text += (text.empty() ? "[" : ", ") + std::to_string(n);
    }
    return text + "]";
}

namespace {

// A gates file on the host, read with checks.
class gate_file {
public:
    explicit gate_file(const std::string & path) : path(path) {
        ggml_context * data = nullptr;
        gguf.reset(gguf_init_from_file(path.c_str(), { /*.no_alloc =*/ false, /*.ctx =*/ &data }));
        ctx.reset(data);
        if (!gguf) {
            refuse("is absent, truncated or not a GGUF file");
        }
        if (text("general.architecture") != "laprox-gates") {
            refuse("holds " + (text("general.architecture").empty() ? "no gates" : "a model (" + text("general.architecture") + "), no gates"));
        }
        if (number("laprox.gates.version") != 1) {
            refuse("has format version " + std::to_string(number("laprox.gates.version")) + "; accepted: 1");
        }
        uint32_t crc = 0;
        for (int64_t i = 0; i < gguf_get_n_tensors(gguf.get()); i++) {
            const ggml_tensor * t = ggml_get_tensor(ctx.get(), gguf_get_tensor_name(gguf.get(), i));
            crc = crc32(crc, (const uint8_t *) t->data, ggml_nbytes(t));
        }
        if (crc != number("laprox.gates.crc32")) {
            refuse("is damaged: the CRC-32 of its tensors' data is not laprox.gates.crc32");
        }
    }

    [[noreturn]] void refuse(const std::string & why) const {
        throw std::runtime_error("gates " + path + " " + why);
    }

    std::string text(const char * key) const {
        const int64_t id = gguf_find_key(gguf.get(), key);
        return id >= 0 && gguf_get_kv_type(gguf.get(), id) == GGUF_TYPE_STRING ? gguf_get_val_str(gguf.get(), id) : "";
    }

    uint32_t number(const char * key) const {
        const int64_t id = gguf_find_key(gguf.get(), key);
        if (id < 0 || gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_UINT32) {
            refuse(std::string("has no ") + key);
        }
        return gguf_get_val_u32(gguf.get(), id);
    }

    // The first of these tensors that there is; null if none.
    const ggml_tensor * tensor(const std::vector<std::string> & names, const std::vector<int64_t> & ne) const {
        for (const std::string & name : names) {
            const ggml_tensor * t = ggml_get_tensor(ctx.get(), name.c_str());
            if (!t) {
                continue;
            }
            std::vector<int64_t> has(t->ne, t->ne + ggml_n_dims(t));
            has.resize(std::max(has.size(), ne.size()), 1);
            if (has != ne) {
                refuse("has " + name + " of " + shape_of(has) + "; accepted: " + shape_of(ne));
            }
            if (ne.size() == 1 && t->type != GGML_TYPE_F32) {
                refuse("has " + name + " of type " + ggml_type_name(t->type) + "; accepted: f32");
            }
            check_finite(t);
            return t;
        }
        return nullptr;
    }

private:
    void check_finite(const ggml_tensor * t) const {
        const auto to_float = ggml_get_type_traits(t->type)->to_float;
        if (t->type != GGML_TYPE_F32 && !to_float) {
            refuse(std::string("has ") + t->name + " of type " + ggml_type_name(t->type) + "; accepted: f32, f16, q8_0, q4_0");
        }
        std::vector<float> row(t->ne[0]);
        for (int64_t i = 0; i < ggml_nrows(t); i++) {
            const char * data = (const char *) t->data + i*t->nb[1];
            if (t->type == GGML_TYPE_F32) {
                std::memcpy(row.data(), data, row.size()*sizeof(float));
            } else {
                to_float(data, row.data(), (int64_t) row.size());
            }
            for (float x : row) {
                if (!std::isfinite(x)) {
                    refuse(std::string("has a value in ") + t->name + " that isn't a number");
                }
            }
        }
    }

    const std::string path;
    gguf_context_ptr gguf;
    ggml_context_ptr ctx;
};

}

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
    const gate_file file(path);
    const auto & hparams = model.hparams;

    const std::string made_for = file.text("laprox.gates.model_fingerprint");
    if (!made_for.empty() && made_for != fingerprint(model)) {
        file.refuse("were trained for " + file.text("laprox.gates.model") + " (" + made_for + "), this model is another one (" + fingerprint(model) + ")");
    }
    const std::string type = file.text("laprox.gates.type");
    if (type != "rg" && type != "rg10") {
        file.refuse("have the unknown type \"" + type + "\"; accepted: rg, rg10");
    }
    const std::string activation = file.text("laprox.gates.activation");
    if (activation != "silu" && activation != "gelu") {
        file.refuse("have the unknown activation \"" + activation + "\"; accepted: silu, gelu");
    }
    gelu = activation == "gelu";

    const auto same = [&](const char * what, const char * key, uint32_t here) {
        if (file.number(key) != here) {
            file.refuse(std::string("are for ") + std::to_string(file.number(key)) + " " + what + ", the model has " + std::to_string(here));
        }
    };
    same("layers", "laprox.gates.block_count", hparams.n_layer());
    same("dimensions", "laprox.gates.embedding_length", hparams.n_embd);
    const int64_t hidden = file.number("laprox.gates.hidden_length");

    // every tensor goes to the device of its layer; one that layers share to that of each
    std::map<ggml_backend_buffer_type_t, std::pair<ggml_context_ptr, std::map<const ggml_tensor *, ggml_tensor *>>> places;
    layers.resize(hparams.n_layer());
    for (uint32_t il = 0; il < hparams.n_layer(); il++) {
        if (!hparams.has_kv(il) || hparams.is_recr(il) || hparams.n_head_kv(il) == 0) {
            continue;
        }
        same("KV heads", "laprox.gates.head_count_kv", hparams.n_head_kv(il));
        const auto place = [&](const char * name, const std::vector<int64_t> & ne, bool needed) -> ggml_tensor * {
            const std::string own = "blk." + std::to_string(il) + "." + name;
            const ggml_tensor * t = file.tensor({ own, name }, ne);
            if (!t) {
                if (needed) {
                    file.refuse("have no " + own);
                }
                return nullptr;
            }
            auto & [ctx, copies] = places[ne.size() > 1 ? place_for(model, il, t) : ggml_backend_dev_buffer_type(model.dev_layer(il))];
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
        gate.in    = place("gate_in.weight",  { n_embd, hidden }, true);
        gate.in_b  = place("gate_in.bias",    { hidden }, true);
        gate.mid   = place("gate_mid.weight", { hidden, hidden }, type == "rg10");
        gate.mid_b = place("gate_mid.bias",   { hidden }, type == "rg10");
        gate.out   = place("gate_out.weight", { hidden, n_head_kv }, true);
        gate.out_b = place("gate_out.bias",   { n_head_kv }, true);
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
