"""Models by name or by Hugging Face repository: downloaded once, checked, kept in a cache folder.

    from laprox import Llama, hub

    llm = Llama(str(hub.fetch("qwen2.5-coder-0.5b")))
"""

from laprox.hub.cache import DownloadError, cache_folder
from laprox.hub.fetching import NotKnown, fetch, find, remove, verify
from laprox.hub.known import MODELS, KnownModel

__all__ = ["MODELS", "DownloadError", "KnownModel", "NotKnown", "cache_folder", "fetch", "find", "remove", "verify"]
