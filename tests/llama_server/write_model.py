"""write_model.py VOCABULARY OUT: a random llama with the tokenizer of a vocabulary-only GGUF."""

import sys
from pathlib import Path

from gguf import GGUFReader, GGUFValueType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gguf_factory  # noqa: E402


def copy_tokenizer(reader):
    def add(gguf, _shape):
        for field in reader.fields.values():
            if field.name.startswith("tokenizer."):
                value = field.contents()
                kind = field.types[0]
                gguf.add_key_value(field.name, value, kind, field.types[-1] if kind == GGUFValueType.ARRAY else None)

    return add


vocabulary, out = sys.argv[1:]
reader = GGUFReader(vocabulary)
gguf_factory._tokenizer = copy_tokenizer(reader)
n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
gguf_factory.write_llama(
    out, n_layer=2, n_embd=64, n_head=8, n_head_kv=4, head_dim=8, n_ff=128, n_vocab=n_vocab, n_ctx_train=2048, weights=gguf_factory.QType.F16
)
