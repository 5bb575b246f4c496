"""Write the demo model as a Hugging Face folder, which `laprox train-gates` reads: weights, configuration, tokenizer.

Reads the GGUF, so that what is trained on is what ships. Needs gguf, safetensors, tokenizers and transformers."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from gguf import GGUFReader, TokenType, quants

NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in Hugging Face's order: rotary pairs are (i, i + d/2); in the GGUF they are neighbours."""
    rows, width = w.shape
    return w.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def write(source: Path, folder: Path) -> None:
    """A `llama` GGUF with tied embeddings and a GPT-2 tokenizer as a folder of float32 weights."""
    from safetensors.numpy import save_file
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(source)
    about = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    heads, kv_heads = about["llama.attention.head_count"], about["llama.attention.head_count_kv"]
    weights = {}
    for t in reader.tensors:
        w = quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1]).astype(np.float32)
        block, _, name = t.name.removesuffix(".weight").removeprefix("blk.").partition(".")
        if t.name.startswith("blk."):
            w = halves(w, heads) if name == "attn_q" else halves(w, kv_heads) if name == "attn_k" else w
            weights[f"model.layers.{block}.{NAMES[name]}.weight"] = np.ascontiguousarray(w)
        else:
            weights[{"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[t.name]] = w

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {name: about.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding")}
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float32", "hidden_act": "silu",
        "vocab_size": weights["model.embed_tokens.weight"].shape[0], "tie_word_embeddings": True,
        "hidden_size": about["llama.embedding_length"], "intermediate_size": about["llama.feed_forward_length"],
        "num_hidden_layers": about["llama.block_count"], "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": about["llama.attention.key_length"], "rms_norm_eps": about["llama.attention.layer_norm_rms_epsilon"],
        "rope_theta": about["llama.rope.freq_base"], "max_position_embeddings": about["llama.context_length"],
        "bos_token_id": ids["bos"], "eos_token_id": ids["eos"], "pad_token_id": ids["padding"]}, indent=1) + "\n")

    tokens, kinds = about["tokenizer.ggml.tokens"], about["tokenizer.ggml.token_type"]
    tok = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)},
                               merges=[tuple(m.split(" ")) for m in about["tokenizer.ggml.merges"]]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds) if kind == TokenType.CONTROL])
    named = {f"{name}_token": tokens[i] for name, i in (("bos", ids["bos"]), ("eos", ids["eos"])) if i is not None}
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=about["tokenizer.chat_template"], **named)
    fast.save_pretrained(folder)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("model", type=Path, help="the GGUF")
    p.add_argument("folder", type=Path)
    a = p.parse_args()
    write(a.model, a.folder)
    print(a.folder)


if __name__ == "__main__":
    main()
