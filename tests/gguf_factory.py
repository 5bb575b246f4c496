"""Small random GGUFs that llama.cpp loads and that are worth attending over.

Every weight comes from a seeded generator, so a test (or a person) can make the same file again:

    path = write_llama(tmp_path / "toy.gguf", n_layer=3, n_head=8, n_head_kv=2)

Queries and keys are scaled so that attention has a few clear winners per head, and the output so that logits
have a standard deviation of about 2: flat attention would hide what an eviction does.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as QType
from gguf import GGUFWriter, LlamaFileType, RopeScalingType, TokenType, quants
from gguf.constants import GGML_QUANT_SIZES

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """What a model looks like. `head_dim` is free of n_embd / n_head, as in real models."""

    n_layer: int = 3
    n_embd: int = 256
    n_head: int = 8
    n_head_kv: int = 2
    head_dim: int = 64
    n_ff: int = 384
    n_vocab: int = 512
    n_ctx_train: int = 8192
    rope_base: float = 10000.0
    weights: QType = QType.F32
    tied: bool = False
    chat_template: str | None = None
    seed: int = 0
    qk_scale: float = 1.7  # standard deviation of an element of q and of k: attention logits have its square
    name: str = "toy"
    swa: int = 0  # sliding window of the architectures that have one
    longrope: int = 0  # tokens of a context beyond which keys rotate by other factors (write_llama)
    recurrent: tuple[int, ...] = field(default=())  # layers without attention, for hybrid models


# --- weights ---------------------------------------------------------------------------------------------------------


def random_blocks(rng: np.random.Generator, qtype: QType, rows: int, cols: int, std: float) -> np.ndarray:
    """Random quantised weights, straight as blocks: fast enough for gigabytes, and K-quants need no quantiser."""
    block, size = GGML_QUANT_SIZES[qtype]
    if cols % block:
        raise ValueError(f"{qtype.name} needs rows of a multiple of {block} weights, not {cols}")
    n = rows * cols // block
    scale = _UNIT_STD.get(qtype)
    if scale is None:
        scale = _UNIT_STD[qtype] = float(quants.dequantize(_blocks(np.random.default_rng(0), qtype, 512, 1.0), qtype).std())
    return _blocks(rng, qtype, n, std / scale).reshape(rows, cols // block * size)


_UNIT_STD: dict[QType, float] = {}


def _blocks(rng: np.random.Generator, qtype: QType, n: int, d: float) -> np.ndarray:
    size = GGML_QUANT_SIZES[qtype][1]
    raw = np.frombuffer(rng.bytes(n * size), dtype=np.uint8).reshape(n, size).copy()

    def put(offset: int, value: float) -> None:
        raw[:, offset : offset + 2] = np.frombuffer(np.float16(value).tobytes(), dtype=np.uint8)

    if qtype in (QType.Q4_0, QType.Q8_0):
        put(0, d)
    elif qtype in (QType.Q4_K, QType.Q5_K):
        put(0, d)
        put(2, d * (7.5 if qtype == QType.Q4_K else 15.5))  # the minimum that centres the weights
        raw[:, 4:12] |= 0b10100000  # no sub-block has a scale or a minimum below half the largest
    elif qtype == QType.Q6_K:
        put(size - 2, d)
    else:
        raise ValueError(f"no random blocks for {qtype.name}")
    return raw


K_QUANTS = (QType.Q4_K, QType.Q5_K, QType.Q6_K)


class _Writer:
    """A GGUFWriter with random tensors."""

    def __init__(self, path: Path, arch: str, shape: Shape):
        self.gguf = GGUFWriter(path, arch)
        self.shape = shape
        self.rng = np.random.default_rng(shape.seed)
        self.gguf.add_name(shape.name)
        self.gguf.add_context_length(shape.n_ctx_train)
        self.gguf.add_embedding_length(shape.n_embd)
        self.gguf.add_block_count(shape.n_layer)
        self.gguf.add_feed_forward_length(shape.n_ff)
        self.gguf.add_head_count(shape.n_head)
        if not shape.recurrent:
            self.gguf.add_head_count_kv(shape.n_head_kv)
        self.gguf.add_key_length(shape.head_dim)
        self.gguf.add_value_length(shape.head_dim)
        self.gguf.add_rope_dimension_count(shape.head_dim)
        self.gguf.add_rope_freq_base(shape.rope_base)
        self.gguf.add_layer_norm_rms_eps(1e-5)
        self.gguf.add_vocab_size(shape.n_vocab)
        self.gguf.add_file_type(LlamaFileType.ALL_F32 if shape.weights == QType.F32 else LlamaFileType.GUESSED)
        _tokenizer(self.gguf, shape)

    def matrix(self, name: str, rows: int, cols: int, std: float) -> None:
        """A weight llama.cpp multiplies with: [rows, cols] maps cols -> rows."""
        qtype = self.shape.weights
        if qtype in K_QUANTS or rows * cols > 1 << 22 and qtype in (QType.Q4_0, QType.Q8_0):
            self.gguf.add_tensor(name, random_blocks(self.rng, qtype, rows, cols, std), raw_dtype=qtype)
            return
        data = self.rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(std)
        self.gguf.add_tensor(name, quants.quantize(data, qtype), raw_dtype=qtype)

    def vector(self, name: str, n: int, mean: float = 1.0, std: float = 0.1) -> None:
        self.gguf.add_tensor(name, (mean + std * self.rng.standard_normal(n)).astype(np.float32))

    def embeddings(self, output: bool = True) -> None:
        s = self.shape
        self.matrix("token_embd.weight", s.n_vocab, s.n_embd, 2 * s.n_embd**-0.5 if s.tied else 1.0)
        if output and not s.tied:
            self.matrix("output.weight", s.n_vocab, s.n_embd, 2 * s.n_embd**-0.5)

    def attention(self, il: int) -> None:
        s = self.shape
        n_q, n_kv = s.n_head * s.head_dim, s.n_head_kv * s.head_dim
        self.matrix(f"blk.{il}.attn_q.weight", n_q, s.n_embd, s.qk_scale * s.n_embd**-0.5)
        self.matrix(f"blk.{il}.attn_k.weight", n_kv, s.n_embd, s.qk_scale * s.n_embd**-0.5)
        self.matrix(f"blk.{il}.attn_v.weight", n_kv, s.n_embd, s.n_embd**-0.5)
        self.matrix(f"blk.{il}.attn_output.weight", s.n_embd, n_q, n_q**-0.5)

    def ffn(self, il: int) -> None:
        s = self.shape
        self.matrix(f"blk.{il}.ffn_gate.weight", s.n_ff, s.n_embd, s.n_embd**-0.5)
        self.matrix(f"blk.{il}.ffn_up.weight", s.n_ff, s.n_embd, s.n_embd**-0.5)
        self.matrix(f"blk.{il}.ffn_down.weight", s.n_embd, s.n_ff, s.n_ff**-0.5)

    def gemma4_base(self) -> None:
        """What a gemma4 and its assistant have in common."""
        s = self.shape
        self.gguf.add_sliding_window(s.swa)
        self.gguf.add_sliding_window_pattern([il % 2 == 0 for il in range(s.n_layer)])
        self.gguf.add_key_length_swa(s.head_dim)
        self.gguf.add_value_length_swa(s.head_dim)
        self.gguf.add_rope_dimension_count_swa(s.head_dim)
        self.embeddings(output=False)
        self.vector("output_norm.weight", s.n_embd)
        self.vector("rope_freqs.weight", s.head_dim // 2, std=0)

    def close(self) -> None:
        self.gguf.write_header_to_file()
        self.gguf.write_kv_data_to_file()
        self.gguf.write_tensors_to_file()
        self.gguf.close()


def _tokenizer(gguf: GGUFWriter, shape: Shape) -> None:
    """A byte-complete SentencePiece vocabulary: specials, 256 bytes, ASCII characters, fillers."""
    tokens = [("<unk>", TokenType.UNKNOWN), ("<s>", TokenType.CONTROL), ("</s>", TokenType.CONTROL)]
    tokens += [(f"<0x{b:02X}>", TokenType.BYTE) for b in range(256)]
    tokens += [("<|im_start|>", TokenType.CONTROL), ("<|im_end|>", TokenType.CONTROL), ("\u2581", TokenType.NORMAL)]
    tokens += [(chr(c), TokenType.NORMAL) for c in range(33, 127)]
    if shape.n_vocab < len(tokens):
        raise ValueError(f"a vocabulary needs at least {len(tokens)} tokens")
    tokens += [(f"\u2581w{i}", TokenType.NORMAL) for i in range(shape.n_vocab - len(tokens))]
    gguf.add_tokenizer_model("llama")
    gguf.add_tokenizer_pre("default")
    gguf.add_token_list([text.encode() for text, _ in tokens])
    gguf.add_token_scores([-float(i) for i in range(len(tokens))])
    gguf.add_token_types([int(kind) for _, kind in tokens])
    gguf.add_bos_token_id(1)
    gguf.add_eos_token_id(2)
    gguf.add_unk_token_id(0)
    gguf.add_add_bos_token(True)
    if shape.chat_template:
        gguf.add_chat_template(shape.chat_template)


# --- models ----------------------------------------------------------------------------------------------------------


def write_llama(path: str | Path, shape: Shape = Shape(), writer: type[_Writer] = _Writer, arch: str = "llama", **changes) -> Path:
    """The llama architecture: RMS norm, adjacent-pair RoPE, SiLU gate."""
    shape = replace(shape, **changes)
    w = writer(Path(path), arch, shape)
    if shape.longrope:
        w.gguf.add_rope_scaling_type(RopeScalingType.LONGROPE)
        w.gguf.add_rope_scaling_orig_ctx_len(shape.longrope)
        for which, mean in ("short", 1.0), ("long", 4.0):
            w.vector(f"rope_factors_{which}.weight", shape.head_dim // 2, mean)
    w.embeddings()
    w.vector("output_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.attention(il)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
    w.close()
    return Path(path)


def write_smollm3(path: str | Path, shape: Shape = Shape(n_layer=4), **changes) -> Path:
    """llama, but that every fourth layer has no RoPE."""
    return write_llama(path, shape, arch="smollm3", **changes)


def write_gemma2(path: str | Path, shape: Shape = Shape(n_layer=4, swa=64, tied=True), **changes) -> Path:
    """Every other layer looks back over a sliding window only; attention logits are soft-capped."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "gemma2", shape)
    w.gguf.add_sliding_window(shape.swa)
    w.gguf.add_attn_logit_softcapping(8.0)
    w.gguf.add_final_logit_softcapping(30.0)
    w.embeddings(output=False)
    w.vector("output_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.attention(il)
        w.vector(f"blk.{il}.post_attention_norm.weight", shape.n_embd)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
        w.vector(f"blk.{il}.post_ffw_norm.weight", shape.n_embd)
    w.close()
    return Path(path)


def write_gemma4(path: str | Path, shape: Shape = Shape(n_layer=6, swa=64, tied=True), **changes) -> Path:
    """As in gemma2 every other layer has a sliding window; the last two layers read the cache of the two before them."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "gemma4", shape)
    w.gguf.add_shared_kv_layers(2)
    w.gguf.add_embedding_length_per_layer_input(0)
    w.gemma4_base()
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.attention(il)
        for name in ("attn_q_norm", "attn_k_norm"):  # its logits aren't divided by the root of the head size
            w.vector(f"blk.{il}.{name}.weight", shape.head_dim, mean=shape.qk_scale * shape.head_dim**-0.25)
        w.vector(f"blk.{il}.post_attention_norm.weight", shape.n_embd)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
        w.vector(f"blk.{il}.post_ffw_norm.weight", shape.n_embd)
    w.close()
    return Path(path)


def write_gemma4_assistant(path: str | Path, shape: Shape = Shape(n_layer=2, n_embd=128, swa=64, tied=True), target: int = 256, **changes) -> Path:
    """Drafts for a gemma4 of width `target`: it has no keys and values, and reads those of the target's last two layers."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "gemma4-assistant", shape)
    w.gguf.add_nextn_predict_layers(shape.n_layer)
    w.gguf.add_embedding_length_out(target)
    w.gemma4_base()
    w.matrix("nextn.pre_projection.weight", shape.n_embd, 2 * target, (2 * target) ** -0.5)
    w.matrix("nextn.post_projection.weight", target, shape.n_embd, shape.n_embd**-0.5)
    for il in range(shape.n_layer):
        n_q = shape.n_head * shape.head_dim
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.matrix(f"blk.{il}.attn_q.weight", n_q, shape.n_embd, shape.qk_scale * shape.n_embd**-0.5)
        w.matrix(f"blk.{il}.attn_output.weight", shape.n_embd, n_q, n_q**-0.5)
        w.vector(f"blk.{il}.attn_q_norm.weight", shape.head_dim)
        w.vector(f"blk.{il}.post_attention_norm.weight", shape.n_embd)
        w.vector(f"blk.{il}.layer_output_scale.weight", 1)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
        w.vector(f"blk.{il}.post_ffw_norm.weight", shape.n_embd)
    w.close()
    return Path(path)


def write_gated(path: str | Path, shape: Shape = Shape(n_layer=8, swa=64), **changes) -> Path:
    """The muse-glimmer architecture: what attention gives is multiplied by gates before the output projection, as in Qwen3-Next
    and Qwen3.5. Three layers of four have a sliding window."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "muse-glimmer", shape)
    w.gguf.add_sliding_window(shape.swa)
    w.gguf.add_logit_scale(1.0)
    w.embeddings()
    w.vector("output_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.attention(il)
        w.vector(f"blk.{il}.attn_q_norm.weight", shape.head_dim, mean=shape.qk_scale)
        w.vector(f"blk.{il}.attn_k_norm.weight", shape.head_dim, mean=shape.qk_scale)
        w.matrix(f"blk.{il}.attn_gate.weight", shape.n_head * shape.head_dim, shape.n_embd, 2 * shape.n_embd**-0.5)
        w.vector(f"blk.{il}.post_attention_norm.weight", shape.n_embd)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
        w.vector(f"blk.{il}.post_ffw_norm.weight", shape.n_embd)
    w.close()
    return Path(path)


def write_lfm2(path: str | Path, shape: Shape = Shape(n_layer=4, recurrent=(0, 2)), **changes) -> Path:
    """A hybrid: short convolutions with a state of two tokens in some layers, attention in the others."""
    shape = replace(shape, **changes)
    if shape.n_head * shape.head_dim != shape.n_embd:
        shape = replace(shape, n_head=shape.n_embd // shape.head_dim)
    w = _Writer(Path(path), "lfm2", shape)
    w.gguf.add_head_count_kv([0 if il in shape.recurrent else shape.n_head_kv for il in range(shape.n_layer)])
    w.gguf.add_shortconv_l_cache(3)
    if shape.swa:
        w.gguf.add_sliding_window(shape.swa)
    w.embeddings()
    w.vector("token_embd_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        if il in shape.recurrent:
            w.gguf.add_tensor(f"blk.{il}.shortconv.conv.weight", w.rng.standard_normal((shape.n_embd, 3), dtype=np.float32))
            w.matrix(f"blk.{il}.shortconv.in_proj.weight", 3 * shape.n_embd, shape.n_embd, shape.n_embd**-0.5)
            w.matrix(f"blk.{il}.shortconv.out_proj.weight", shape.n_embd, shape.n_embd, 0.5 * shape.n_embd**-0.5)
        else:
            w.attention(il)
            w.vector(f"blk.{il}.attn_q_norm.weight", shape.head_dim, mean=shape.qk_scale)
            w.vector(f"blk.{il}.attn_k_norm.weight", shape.head_dim, mean=shape.qk_scale)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
    w.close()
    return Path(path)


def write_deci(path: str | Path, shape: Shape = Shape(n_layer=4, recurrent=(1,)), **changes) -> Path:
    """Llama 3.x Nemotron: some layers have no attention at all (`recurrent`, for want of a better name)."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "deci", shape)
    for keys in w.gguf.kv_data:
        keys.pop("deci.attention.head_count", None)
    for add, n in ((w.gguf.add_head_count, shape.n_head), (w.gguf.add_head_count_kv, shape.n_head_kv)):
        add([0 if il in shape.recurrent else n for il in range(shape.n_layer)])
    w.embeddings()
    w.vector("output_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        if il not in shape.recurrent:
            w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
            w.attention(il)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
    w.close()
    return Path(path)


def write_alibi(path: str | Path, shape: Shape = Shape(n_layer=2), **changes) -> Path:
    """The refact architecture: like llama, but positions enter as a slope per query head (ALiBi)."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "refact", shape)
    w.embeddings()
    w.vector("output_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.attention(il)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
    w.close()
    return Path(path)


def write_sinks(path: str | Path, shape: Shape = Shape(n_layer=2, swa=64), **changes) -> Path:
    """The granite_swa architecture: every query head has a learned sink beside its keys."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "granite_swa", shape)
    w.gguf.add_logit_scale(1.0)
    w.gguf.add_sliding_window(shape.swa)
    w.gguf.add_sliding_window_pattern([il % 2 == 0 for il in range(shape.n_layer)])
    w.embeddings()
    w.vector("output_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.attention(il)
        w.vector(f"blk.{il}.attn_sinks.weight", shape.n_head)
        w.vector(f"blk.{il}.ffn_norm.weight", shape.n_embd)
        w.ffn(il)
    w.close()
    return Path(path)


def write_embedder(path: str | Path, shape: Shape = Shape(n_layer=2, n_head=4, n_head_kv=4), **changes) -> Path:
    """A BERT: no causal attention and no cache."""
    shape = replace(shape, **changes)
    w = _Writer(Path(path), "bert", shape)
    w.gguf.add_layer_norm_eps(1e-5)
    w.gguf.add_causal_attention(False)
    w.gguf.add_token_type_count(2)
    w.embeddings(output=False)
    w.matrix("token_types.weight", 2, shape.n_embd, 1.0)
    w.matrix("position_embd.weight", shape.n_ctx_train, shape.n_embd, 1.0)
    for name in ("token_embd_norm", *(f"blk.{il}.{n}" for il in range(shape.n_layer) for n in ("attn_output_norm", "layer_output_norm"))):
        w.vector(f"{name}.weight", shape.n_embd)
        w.vector(f"{name}.bias", shape.n_embd, mean=0.0)
    for il in range(shape.n_layer):
        w.attention(il)
        w.matrix(f"blk.{il}.ffn_up.weight", shape.n_ff, shape.n_embd, shape.n_embd**-0.5)
        w.matrix(f"blk.{il}.ffn_down.weight", shape.n_embd, shape.n_ff, shape.n_ff**-0.5)
    w.close()
    return Path(path)


def write_mamba(path: str | Path, shape: Shape = Shape(n_layer=2), **changes) -> Path:
    """Nothing but recurrent state."""
    shape = replace(shape, **changes)
    inner, state, rank = 2 * shape.n_embd, 16, 16
    w = _Writer(Path(path), "mamba", shape)
    w.gguf.add_ssm_conv_kernel(4)
    w.gguf.add_ssm_inner_size(inner)
    w.gguf.add_ssm_state_size(state)
    w.gguf.add_ssm_time_step_rank(rank)
    w.embeddings()
    w.vector("output_norm.weight", shape.n_embd)
    for il in range(shape.n_layer):
        w.vector(f"blk.{il}.attn_norm.weight", shape.n_embd)
        w.matrix(f"blk.{il}.ssm_in.weight", 2 * inner, shape.n_embd, shape.n_embd**-0.5)
        w.gguf.add_tensor(f"blk.{il}.ssm_conv1d.weight", w.rng.standard_normal((inner, 4), dtype=np.float32))
        w.vector(f"blk.{il}.ssm_conv1d.bias", inner, mean=0.0)
        w.matrix(f"blk.{il}.ssm_x.weight", rank + 2 * state, inner, inner**-0.5)
        w.matrix(f"blk.{il}.ssm_dt.weight", inner, rank, rank**-0.5)
        w.vector(f"blk.{il}.ssm_dt.bias", inner, mean=0.0)
        w.gguf.add_tensor(f"blk.{il}.ssm_a", -np.exp(w.rng.standard_normal((inner, state), dtype=np.float32)))
        w.vector(f"blk.{il}.ssm_d", inner)
        w.matrix(f"blk.{il}.ssm_out.weight", shape.n_embd, inner, inner**-0.5)
    w.close()
    return Path(path)


def truncate(source: str | Path, path: str | Path, fraction: float = 0.5) -> Path:
    """The first part of a file, as an interrupted download leaves it."""
    data = Path(source).read_bytes()
    Path(path).write_bytes(data[: int(len(data) * fraction)])
    return Path(path)


def write_lora(path: str | Path, shape: Shape = Shape(), rank: int = 4, seed: int = 0) -> Path:
    """A LoRA adapter for write_llama's model, on the values of its layers."""
    rng = np.random.default_rng(seed)
    gguf = GGUFWriter(path, "llama")
    gguf.add_type("adapter")
    gguf.add_string("adapter.type", "lora")
    gguf.add_float32("adapter.lora.alpha", rank)
    for il in range(shape.n_layer):
        name = f"blk.{il}.attn_v.weight"
        gguf.add_tensor(f"{name}.lora_a", rng.normal(0, 1 / 16, (rank, shape.n_embd)).astype(np.float32))
        gguf.add_tensor(f"{name}.lora_b", rng.normal(0, 1, (shape.n_head_kv * shape.head_dim, rank)).astype(np.float32))
    gguf.write_header_to_file()
    gguf.write_kv_data_to_file()
    gguf.write_tensors_to_file()
    gguf.close()
    return Path(path)
