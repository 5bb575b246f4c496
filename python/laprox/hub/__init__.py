"""Models by name or by Hugging Face repository: downloaded once, checked, kept in a cache folder.

    from laprox import Llama, hub

    llm = Llama(str(hub.fetch("qwen2.5-coder-0.5b")))
"""

from laprox.files import Progress
from laprox.hub.cache import DownloadError, cache_folder
from laprox.hub.fetching import Note, NotKnown, fetch, find, is_known, path_of, remove, verify
from laprox.hub.known import MODELS, KnownModel
from laprox.hub.repositories import BadRepository, fetch_from_repository, fetch_matching, split_repository

__all__ = [
    "MODELS",
    "BadRepository",
    "DownloadError",
    "KnownModel",
    "NotKnown",
    "Note",
    "Progress",
    "cache_folder",
    "fetch",
    "fetch_from_repository",
    "fetch_matching",
    "find",
    "is_known",
    "path_of",
    "remove",
    "split_repository",
    "verify",
]
