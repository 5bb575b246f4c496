"""Gates as PyTorch modules, and their place in a Hugging Face model.

Works with models whose attention modules go through transformers' attention interface and read the normed input of
their block: Llama, Qwen2, Qwen3 and their like.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from laprox.gates.attention import CHUNK, retention_attention
from laprox.gates.sidecar import ACTIVATIONS, KINDS, Gates, Layer

IMPLEMENTATION = "laprox_retention"


class GateStack(nn.Module):
    """The gates of all layers.

    rg (TRIM-KV): in -> activation -> out. rg10 (DBTrimKV): in -> activation -> mid -> activation -> out, where `out` and
    its bias are shared by all layers, which makes log beta comparable between them.
    """

    def __init__(self, kind: str, n_layer: int, n_embd: int, hidden: int, n_head_kv: int, activation: str, bias: float):
        super().__init__()
        if kind not in KINDS or activation not in ACTIVATIONS:
            raise ValueError(f"gates of type {kind!r} with activation {activation!r}; accepted: {KINDS}, {ACTIVATIONS}")
        self.kind, self.activation = kind, activation
        self.gate_in = nn.ModuleList(nn.Linear(n_embd, hidden) for _ in range(n_layer))
        self.gate_mid = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(n_layer if kind == "rg10" else 0))
        self.gate_out = nn.ModuleList(nn.Linear(hidden, n_head_kv) for _ in range(1 if kind == "rg10" else n_layer))
        for linear in (*self.gate_in, *self.gate_mid, *self.gate_out):
            nn.init.normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)
        for linear in self.gate_out:
            nn.init.constant_(linear.bias, bias)

    def forward(self, layer: int, x: Tensor) -> Tensor:
        """log beta of a layer's new entries: [batch, n, n_embd] -> [batch, KV heads, n], float32."""
        act = F.silu if self.activation == "silu" else F.gelu
        h = act(self.gate_in[layer](x.float()))
        if self.gate_mid:
            h = act(self.gate_mid[layer](h))
        z = self.gate_out[layer if len(self.gate_out) > 1 else 0](h)
        return F.logsigmoid(z).transpose(1, 2)

    def start_from(self, gates: Gates) -> None:
        """Take over trained gates. Raises ValueError if they are of other sizes."""
        ours, theirs = self.arrays(), gates
        for name in ("kind", "activation", "n_embd", "hidden", "n_head_kv"):
            if getattr(ours, name) != getattr(theirs, name):
                raise ValueError(f"the gates to start from have {name} {getattr(theirs, name)}, and these {getattr(ours, name)}")
        if len(ours.layers) != len(theirs.layers):
            raise ValueError(f"the gates to start from have {len(theirs.layers)} layers, and these {len(ours.layers)}")
        if len(self.gate_out) == 1 and not (theirs.shared("gate_out.weight") and theirs.shared("gate_out.bias")):
            raise ValueError("the gates to start from have a last projection per layer, and these share one")
        with torch.no_grad():
            for i, layer in enumerate(theirs.layers):
                for linears, part in ((self.gate_in, "gate_in"), (self.gate_mid, "gate_mid"), (self.gate_out, "gate_out")):
                    if i < len(linears):
                        linears[i].weight.copy_(torch.tensor(layer.tensors()[f"{part}.weight"]))
                        linears[i].bias.copy_(torch.tensor(layer.tensors()[f"{part}.bias"]))

    def arrays(self, **about: Any) -> Gates:
        """The same as NumPy arrays, for the file."""

        def pair(linears: nn.ModuleList, i: int) -> tuple[Any, Any]:
            if not linears:
                return None, None
            linear = linears[i if len(linears) > 1 else 0]
            return linear.weight.detach().cpu().float().numpy(), linear.bias.detach().cpu().float().numpy()

        layers = [Layer(*pair(self.gate_in, i), *pair(self.gate_mid, i), *pair(self.gate_out, i)) for i in range(len(self.gate_in))]
        return Gates(kind=self.kind, activation=self.activation, layers=layers, **about)


class Gated:
    """A frozen model with gates beside its attention. Within `off()` it is the model as it was.

    Gates are on by default, because the backward pass may compute layers again, long after the forward pass.
    """

    def __init__(self, model: PreTrainedModel, gates: GateStack, chunk: int = CHUNK, strictness: float = 1.0):
        self.model, self.gates, self.chunk, self.strictness = model, gates, chunk, strictness
        self._on = True
        self._retained: dict[int, Tensor] = {}
        model.requires_grad_(False)
        model.set_attn_implementation(IMPLEMENTATION)
        for layer in decoder(model).layers:
            layer.self_attn.register_forward_pre_hook(self._before_attention, with_kwargs=True)

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within, attention is the full cache's."""
        self._on = False
        try:
            yield
        finally:
            self._on = True

    def hidden(self, ids: Tensor) -> Tensor:
        """The last hidden states, after the last norm: [batch, n] -> [batch, n, n_embd]."""
        return decoder(self.model)(input_ids=ids, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        return self.model.get_output_embeddings()(hidden).float()

    def retained(self) -> Tensor:
        """S_t of the last pass with gates: [layers, batch, KV heads, n]."""
        return torch.stack([self._retained[i] for i in sorted(self._retained)])

    def _before_attention(self, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The attention module hands what it doesn't know on to the attention function below."""
        if not self._on:
            return None
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        layer = attention.layer_idx
        return args, kwargs | {"retention": (self.gates(layer, x), self.chunk, self.strictness, self._retained)}


def _attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _mask: Tensor | None, scaling: float, retention: Any = None, **_: Any):
    """transformers' attention interface: returns [batch, n, heads, d] and no weights. Always causal, never padded."""
    if retention is None:
        group = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
    else:
        log_beta, chunk, strictness, retained = retention
        output, retained[module.layer_idx] = retention_attention(q, k, v, log_beta, scaling, chunk, strictness)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _attention)


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model without its head."""
    inner = model.get_decoder()
    if not hasattr(inner, "layers") or not all(hasattr(layer, "self_attn") for layer in inner.layers):
        raise ValueError(f"{type(model).__name__} is not built like Llama or Qwen: its layers have no self_attn")
    return inner


def fresh_gates(model: PreTrainedModel, kind: str, hidden: int, bias: float) -> GateStack:
    """Untrained gates that fit a model."""
    c = model.config
    if any("attention" not in kind or "sliding" in kind for kind in getattr(c, "layer_types", None) or ()):
        raise ValueError(f"{type(model).__name__} has layers without full attention ({', '.join(sorted(set(c.layer_types)))})")
    activation = {"silu": "silu", "swish": "silu", "gelu": "gelu"}.get(c.hidden_act)
    if activation is None:
        raise ValueError(f"hidden_act is {c.hidden_act!r}; accepted: silu, gelu")
    n_head_kv = getattr(c, "num_key_value_heads", None) or c.num_attention_heads
    return GateStack(kind, c.num_hidden_layers, c.hidden_size, hidden, n_head_kv, activation, bias)
