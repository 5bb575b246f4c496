"""One file over HTTP, continued where it stopped. Standard library only."""

from __future__ import annotations

import http.client
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import BinaryIO

from laprox.files import CHUNK, Progress
from laprox.hub.cache import DownloadError
from laprox.hub.known import Repository

TIMEOUT = 15.0  # seconds without a byte
TRIES = 3  # in a row that brought nothing


def endpoint() -> str:
    """Of the Hugging Face hub, or of HF_ENDPOINT."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def host() -> str:
    """The hub's name in messages."""
    return urllib.parse.urlsplit(endpoint()).netloc or endpoint()


def download(source: Repository, partial: Path, n_bytes: int, progress: Progress) -> None:
    """Append to `partial` until it has `n_bytes`, trying again where a transfer breaks.

    Raises:
        DownloadError: It isn't there, has another size, or the transfer broke too often. What came stays in `partial`.
        OSError: It can't be written.
    """
    path = urllib.parse.quote(f"{source.repo}/resolve/{source.revision}/{source.file}")
    url = f"{endpoint()}/{path}"
    failures = 0
    with open(partial, "ab") as out:
        while out.tell() < n_bytes:
            before = out.tell()
            try:
                _transfer(url, out, n_bytes, progress)
            except _Broken as error:
                failures = 0 if out.tell() > before else failures + 1
                if failures >= TRIES or not before and not out.tell():  # never reached: don't keep anybody waiting
                    raise DownloadError(str(error)) from None
                time.sleep(min(failures, 2))


class _Broken(Exception):
    """May go better when tried again."""


def _transfer(url: str, out: BinaryIO, n_bytes: int, progress: Progress) -> None:
    start = out.tell()
    headers = {"User-Agent": "laprox", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as reply:
            if start and not _continues(reply, start):
                out.truncate(0)
                out.seek(0)
                start = 0
            length = reply.headers.get("Content-Length", "")
            if length.isdigit() and start + int(length) != n_bytes:
                raise DownloadError(f"{host()} has another file there: {start + int(length):,} bytes, expected {n_bytes:,}")
            while chunk := _read(reply, min(CHUNK, n_bytes - out.tell() + 1)):
                if out.tell() + len(chunk) > n_bytes:
                    raise DownloadError(f"{host()} has another file there: more than {n_bytes:,} bytes")
                out.write(chunk)
                progress(out.tell(), n_bytes)
    except urllib.error.HTTPError as error:
        if error.code in (408, 429) or error.code >= 500:
            raise _Broken(f"{host()} answers {error.code} {error.reason}") from None
        if error.code == 416:  # more is here than there is
            out.truncate(0)
            out.seek(0)
        raise DownloadError(_refusal(url, error)) from None
    except urllib.error.URLError as error:
        raise _Broken(f"{host()} can't be reached ({_plain(error.reason)})") from None
    finally:
        out.flush()
    if out.tell() < n_bytes:
        raise _Broken(f"{host()} broke off after {out.tell():,} of {n_bytes:,} bytes")


def _read(reply: http.client.HTTPResponse, n: int) -> bytes:
    try:
        return reply.read(n)
    except (http.client.HTTPException, OSError) as error:
        raise _Broken(f"{host()} broke off ({_plain(error)})") from None


def _continues(reply: http.client.HTTPResponse, start: int) -> bool:
    """Whether it sends what was asked for, not the whole file again."""
    sent = re.match(r"bytes (\d+)-", reply.headers.get("Content-Range", ""))
    return reply.status == 206 and sent is not None and int(sent[1]) == start


def _refusal(url: str, error: urllib.error.HTTPError) -> str:
    if error.code in (401, 403, 404):
        return f"{url} isn't there or not for everybody ({error.code})"
    return f"{host()} answers {error.code} {error.reason}"


def _plain(error: object) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
