"""laprox: llama.cpp with a KV cache that keeps, per layer and KV head, only the entries that matter.

    from laprox import KVConfig, Llama

    llm = Llama("model.gguf", n_ctx=32768, kv=KVConfig(budget="20%"))
    llm.create_chat_completion([{"role": "user", "content": document + question}])
    print(llm.kv.stats())
"""

from laprox import _libraries

_libraries.load()

from laprox._core import LaproxError  # noqa: E402
from laprox.config import KVConfig, allocators, policies, scorers  # noqa: E402
from laprox.kv import KV, KVStats  # noqa: E402
from laprox.llama import Llama  # noqa: E402
from laprox.policy import Head, Policy  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "Head",
    "KV",
    "KVConfig",
    "KVStats",
    "LaproxError",
    "Llama",
    "Policy",
    "__version__",
    "allocators",
    "policies",
    "scorers",
]
