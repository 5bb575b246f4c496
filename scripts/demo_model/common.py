"""What the steps share: the folder they work in, the document generator, the tokenizer."""
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(os.environ.get("LAPROX_DEMO_MODEL_DIR", ROOT / "build" / "demo_model"))
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 3072
TEMPLATE = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")


def _documents():
    """laprox.documents without the package around it, which needs the built libraries."""
    path = ROOT / "python" / "laprox" / "documents.py"
    spec = importlib.util.spec_from_file_location("laprox_documents", path)
    module = sys.modules["laprox_documents"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


documents = _documents()


def tokenizer():
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(OUT / "tokenizer.json"))


def chat(user: str) -> str:
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"
