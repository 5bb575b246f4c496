"""Write the trained model as GGUF: `llama` architecture, F16 unless told otherwise, tokenizer and chat template inside."""
from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType

from common import OUT, ROOT, SPECIAL, TEMPLATE
from model import Config, Model

SHIPPED = ROOT / "python" / "laprox" / "models" / "demo.gguf"
MATRICES = {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
            "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
FILE_TYPES = {GGMLQuantizationType.F16: LlamaFileType.MOSTLY_F16, GGMLQuantizationType.Q8_0: LlamaFileType.MOSTLY_Q8_0,
              GGMLQuantizationType.F32: LlamaFileType.ALL_F32}


def load(path) -> Model:
    model = Model(Config())
    model.load_state_dict(torch.load(path)["model"])
    return model.eval()


def write(model: Model, path: Path, kind=GGMLQuantizationType.F16):
    c = model.c
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("laprox demo")
    w.add_description("Answers questions about facts in a long document; see docs/demo-model.md of laprox")
    w.add_context_length(c.context)
    w.add_embedding_length(c.width)
    w.add_block_count(c.layers)
    w.add_feed_forward_length(c.ff)
    w.add_head_count(c.heads)
    w.add_head_count_kv(c.kv_heads)
    w.add_key_length(c.head_size)
    w.add_value_length(c.head_size)
    w.add_rope_dimension_count(c.head_size)
    w.add_rope_freq_base(c.rope_base)
    w.add_layer_norm_rms_eps(c.eps)
    w.add_vocab_size(c.vocab)
    w.add_file_type(FILE_TYPES[kind])

    bpe = json.loads((OUT / "tokenizer.json").read_text())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].get)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("gpt-2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    w.add_eos_token_id(tokens.index("<|im_end|>"))
    w.add_bos_token_id(tokens.index("<|im_start|>"))
    w.add_pad_token_id(tokens.index("<|endoftext|>"))
    w.add_add_bos_token(False)
    w.add_chat_template(TEMPLATE)

    def matrix(name, t):
        w.add_tensor(name, gguf.quants.quantize(t.detach().numpy(), kind), raw_dtype=kind)

    def vector(name, t):
        w.add_tensor(name, t.detach().numpy().astype(np.float32))

    matrix("token_embd.weight", model.emb)
    vector("output_norm.weight", model.output_norm())
    for i in range(c.layers):
        for ours, theirs in MATRICES.items():
            matrix(f"blk.{i}.{theirs}.weight", getattr(model, ours)[i])
        vector(f"blk.{i}.attn_norm.weight", model.attn_norm[i])
        vector(f"blk.{i}.ffn_norm.weight", model.ffn_norm[i])
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--checkpoint", type=Path, default=OUT / "checkpoint.pt")
    p.add_argument("--out", type=Path, default=SHIPPED)
    p.add_argument("--type", choices=[t.name for t in FILE_TYPES], default="F16")
    a = p.parse_args()
    write(load(a.checkpoint), a.out, GGMLQuantizationType[a.type])
    print(a.out, a.out.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
