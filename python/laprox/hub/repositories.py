"""A GGUF of a Hugging Face repository, chosen as `llama-server -hf` chooses it, in huggingface_hub's own cache."""

from __future__ import annotations

import errno
import fnmatch
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laprox import extras
from laprox.files import Progress, sha256_of
from laprox.hub.cache import DiskFull, DownloadError, check_space, largest_file, watched
from laprox.hub.fetching import Note
from laprox.hub.transfer import TIMEOUT, host

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")
"""Of what is taken where none is asked for; then the first GGUF."""
NOT_MODELS = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""In the names of GGUFs that go with a model."""

_PART = re.compile(r"(?P<prefix>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_UNREACHABLE = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")


class BadRepository(ValueError):
    """What was asked for isn't USER/MODEL[:QUANT]."""


@dataclass(frozen=True)
class Listed:
    """A file of a repository. Size and hash are None where the list comes from the cache."""

    path: str
    n_bytes: int | None = None
    sha256: str | None = None


def fetch_from_repository(
    repo: str,
    file: str | None = None,
    progress: Progress | None = None,
    note: Note | None = None,
    offline: bool = False,
) -> Path:
    """A GGUF of a repository, downloaded if it isn't in huggingface_hub's cache; the first of its parts if it is split.

    Args:
        repo: "user/model", or "user/model:QUANT", in capitals or not. Without a quant Q4_K_M, else Q8_0, else the first GGUF.
        file: A path in the repository; overrides the quant.
        progress: Is called with bytes done and bytes in all while something is downloaded.
        note: Is told in a line what is downloaded; without it, the logger "laprox.hub" is.
        offline: Take what is in the cache, as with HF_HUB_OFFLINE=1.

    HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HOME and the like work as everywhere.

    Raises:
        BadRepository: `repo` has another form.
        DownloadError: The repository or file isn't there, or can't be reached.
        MissingExtra: huggingface_hub is not installed.
        OSError: The disk is full, or the cache can't be written.
    """
    name, quant = split_repository(repo)
    extras.need("hub", "a model from Hugging Face")
    note = note or logging.getLogger("laprox.hub").info
    listed, offline = _list(name, note, offline or _is_offline())
    chosen = find_file(listed, file, name) if file else choose(listed, quant, name)
    return _download(name, parts_of(listed, chosen, name), progress or (lambda done, total: None), note, offline)


def fetch_matching(
    repo: str,
    pattern: str,
    additional: Sequence[str] = (),
    local_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """The one file of a repository whose path matches a pattern (as in a shell); `additional` ones are put beside it.

    Of a split GGUF all parts come, and the first is returned.

    Raises:
        ValueError: No file matches one of the patterns, or several do; says which files there are.
        DownloadError, MissingExtra: As `fetch_from_repository`.
        OSError: The disk is full, or it can't be written.
    """
    extras.need("hub", "Llama.from_pretrained")
    note = logging.getLogger("laprox.hub").info
    listed, offline = _list(repo, note, _is_offline(), cache_dir)
    files = parts_of(listed, _match(listed, pattern, repo), repo)
    files += [file for file in (_match(listed, one, repo) for one in additional) if file not in files]
    return _download(repo, files, lambda done, total: None, note, offline, local_dir, cache_dir)


def split_repository(repo: str) -> tuple[str, str]:
    """("user/model", "QUANT" or ""). Raises BadRepository."""
    name, _, quant = repo.partition(":")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or not re.fullmatch(r"[\w.-]*", quant) or repo.endswith(":"):
        raise BadRepository(f"{repo!r} is no Hugging Face repository; accepted: USER/MODEL or USER/MODEL:QUANT")
    return name, quant


def choose(listed: Sequence[Listed], quant: str, repo: str) -> Listed:
    """The GGUF of a quant, or the default one. Raises DownloadError with those that there are."""
    models = [file for file in listed if _is_model(file.path) and _index(file.path) == 1]
    for wanted in [quant] if quant else DEFAULT_QUANTS:
        # A name that has it as a word comes before one that merely has it: F16 is not BF16.
        for before in (r"(?:^|[-._/])", ""):
            pattern = re.compile(before + re.escape(wanted) + r"[.-]", re.IGNORECASE)
            for file in models:
                if pattern.search(file.path):
                    return file
    if models and not quant:
        return models[0]
    what = f"no GGUF of {quant}" if quant else "no GGUF"
    there = f"; there are {_names(models)}" if models else ""
    raise DownloadError(f"{repo} has {what}{there}")


def find_file(listed: Sequence[Listed], path: str, repo: str) -> Listed:
    """The file with this path. Raises DownloadError with the GGUFs that there are."""
    for file in listed:
        if file.path == path:
            return file
    ggufs = [file for file in listed if file.path.lower().endswith(".gguf")]
    raise DownloadError(f"{repo} has no file {path}" + (f"; there are {_names(ggufs)}" if ggufs else ""))


def parts_of(listed: Sequence[Listed], file: Listed, repo: str) -> list[Listed]:
    """All parts of a split GGUF, in order; otherwise the file. Raises DownloadError if one is missing."""
    if not (split := _PART.fullmatch(file.path)):
        return [file]
    found = {}
    for other in listed:
        part = _PART.fullmatch(other.path)
        if part and (part["prefix"], part["count"]) == (split["prefix"], split["count"]):
            found[int(part["index"])] = other
    if missing := [index for index in range(1, int(split["count"]) + 1) if index not in found]:
        raise DownloadError(f"{repo} has no part {missing[0]} of {int(split['count'])} of {file.path}")
    return [found[index] for index in range(1, int(split["count"]) + 1)]


def _match(listed: Sequence[Listed], pattern: str, repo: str) -> Listed:
    matching = [file for file in listed if fnmatch.fnmatch(file.path, pattern)]
    whole = [file for file in matching if _index(file.path) == 1]  # a split GGUF is one
    if len(matching) > 1 and len(whole) == 1 and len({_PART.sub(r"\g<prefix>", file.path) for file in matching}) == 1:
        matching = whole
    if not matching:
        raise ValueError(f"{repo} has no file that matches {pattern}; there are {_names(listed)}")
    if len(matching) > 1:
        raise ValueError(f"several files of {repo} match {pattern}: {_names(matching)}")
    return matching[0]


def _is_model(path: str) -> bool:
    name = path.rpartition("/")[2]
    return name.endswith(".gguf") and not any(word in name for word in NOT_MODELS)


def _index(path: str) -> int:
    split = _PART.fullmatch(path)
    return int(split["index"]) if split else 1


def _names(files: Sequence[Listed]) -> str:
    return ", ".join(file.path for file in files[:12]) + (", ..." if len(files) > 12 else "")


def _is_offline() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _list(
    repo: str, note: Note, offline: bool, cache_dir: str | os.PathLike[str] | None = None
) -> tuple[list[Listed], bool]:
    """The repository's files, and whether they are those in the cache, since the hub can't be reached or may not be asked."""
    from huggingface_hub import HfApi

    unreachable = ""
    if not offline:
        try:
            with _explained(repo):
                info = HfApi().model_info(repo, files_metadata=True, timeout=TIMEOUT)
            return [Listed(s.rfilename, s.size, _sha256(s.lfs)) for s in info.siblings or []], False
        except _Unreachable as error:
            unreachable = str(error)
    if not (cached := _cached(repo, cache_dir)):
        why = unreachable or f"{repo} isn't in the cache, and HF_HUB_OFFLINE is set: nothing is downloaded"
        raise DownloadError(why)
    if unreachable:
        note(f"{unreachable}: taking what is in the cache.")
    return cached, True


def _sha256(lfs: Any) -> str | None:
    return lfs["sha256"] if isinstance(lfs, dict) else getattr(lfs, "sha256", None)


def _cached(repo: str, cache_dir: str | os.PathLike[str] | None) -> list[Listed]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        folder: str | None = snapshot_download(repo, local_files_only=True, cache_dir=None if cache_dir is None else Path(cache_dir))
    except LocalEntryNotFoundError as error:
        folder = getattr(error, "snapshot_path", None)  # only some of its files are there, and they will do
    if not folder:
        return []
    return [Listed(path.relative_to(folder).as_posix()) for path in sorted(Path(folder).rglob("*")) if path.is_file()]


def _download(
    repo: str,
    files: Sequence[Listed],
    progress: Progress,
    note: Note,
    offline: bool,
    local_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(cache_dir or constants.HF_HUB_CACHE)
    if local_dir is None:
        folder, unfinished = cache, cache / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
        wanted = [file for file in files if not isinstance(try_to_load_from_cache(repo, file.path, cache_dir=cache), str)]
    else:
        local_dir = Path(local_dir)
        folder, unfinished = local_dir, local_dir / ".cache"
        wanted = [file for file in files if not (folder / file.path).is_file()]
    total = sum(file.n_bytes or 0 for file in wanted)
    if wanted and not offline:
        folder.mkdir(parents=True, exist_ok=True)
        check_space(folder, total, "HF_HOME")
        note(f"Downloading {_names(wanted)} ({total / 1e6:,.0f} MB) from {host()}/{repo}")
    paths, done = [], 0
    for file in files:
        with _explained(repo), _quiet(), watched(lambda: largest_file(unfinished, ".incomplete"), _after(done, total, progress)):
            path = Path(hf_hub_download(repo, file.path, local_dir=local_dir, cache_dir=cache, local_files_only=offline))
        if file in wanted:
            _check(path, file, repo)
            done += file.n_bytes or 0
            progress(done, total)
        paths.append(path)
    return paths[0]


def _after(done: int, total: int, progress: Progress) -> Callable[[int], None]:
    return lambda n: progress(min(done + n, total), total)


def _check(path: Path, file: Listed, repo: str) -> None:
    if file.sha256 is None or (found := sha256_of(path)) == file.sha256:
        return
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    raise DownloadError(f"what {host()} sent as {repo}/{file.path} is another file: its sha256 is {found}, expected {file.sha256}")


class _Unreachable(DownloadError):
    """The hub can't be reached, so what is in the cache will do."""


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Raises DownloadError with a line instead of huggingface_hub's paragraphs."""
    from huggingface_hub import utils

    try:
        yield
    except utils.GatedRepoError:
        raise DownloadError(f"{repo} is gated: accept its terms at {host()}/{repo} and set HF_TOKEN") from None
    except utils.RepositoryNotFoundError:
        raise DownloadError(f"{host()} has no repository {repo}, or it is private: set HF_TOKEN") from None
    except utils.OfflineModeIsEnabled:
        raise DownloadError(f"{repo}: HF_HUB_OFFLINE is set, and it isn't in the cache") from None
    except utils.LocalEntryNotFoundError as error:
        cause = error.__cause__
        raise _Unreachable(f"{host()} can't be reached" + (f" ({_plain(cause)})" if cause else "")) from None
    except utils.EntryNotFoundError:
        raise DownloadError(f"{host()}/{repo} doesn't have the file any more") from None
    except utils.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        kind = _Unreachable if status >= 500 or status == 429 else DownloadError
        raise kind(f"{host()} answers {status} to {repo}") from None
    except Exception as error:
        if getattr(error, "errno", None) == errno.ENOSPC:
            from huggingface_hub import constants

            raise DiskFull(Path(constants.HF_HUB_CACHE), f"{repo} doesn't fit", "HF_HOME") from None
        if type(error).__module__.partition(".")[0] in _UNREACHABLE or isinstance(error, (ConnectionError, TimeoutError)):
            raise _Unreachable(f"{host()} can't be reached ({_plain(error)})") from None
        raise DownloadError(f"{repo}: {_plain(error)}") from error


def _plain(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without huggingface_hub's own progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled() or "HF_HUB_DISABLE_PROGRESS_BARS" in os.environ:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
