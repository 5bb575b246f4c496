"""Wheels: what their scripts refuse, and backends that are modules. scripts/wheel cpu --check tries a wheel itself."""

import os
import subprocess
from pathlib import Path

import pytest

import laprox
from laprox import _libraries

ROOT = Path(__file__).parent.parent
PROGRAMS = {"glslc": "#!/bin/sh\n", "old": "#!/bin/sh\necho 239\n", "none": "#!/bin/sh\nexit 1\n"}


@pytest.fixture
def said(tmp_path):
    """said(command): the last line that a script which refuses something prints."""
    for name, text in PROGRAMS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(command, **env):
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", **env}
        done = subprocess.run([ROOT / "scripts" / command[0], *command[1:]], capture_output=True, text=True, env=env, timeout=60)
        assert done.returncode == 1, done
        return done.stderr.strip().splitlines()[-1]

    return run


def test_a_wheel_is_of_a_kind(said):
    assert said(["wheel"]) == "scripts/wheel: say which: cpu or vulkan"
    assert said(["wheel", "cuda"]) == "scripts/wheel: 'cuda' is neither cpu nor vulkan, nor an option"
    assert said(["wheel", "cpu"], PYTHON="none").startswith("PYTHON=none is not Python 3.10 or newer with")


def test_vulkans_headers_may_be_too_old(said):
    assert said(["wheel", "vulkan"], CXX="old").startswith("Vulkan's headers are of 1.3.239; 1.3.272 or newer are needed")
    assert said(["wheel", "vulkan"], CXX="none") == "Vulkan's headers are needed: apt install libvulkan-dev"


def test_what_is_tried_must_be_there(said, tmp_path):
    assert said(["try_wheel", "a.whl"]) == "There is no wheel 'a.whl'."
    assert said(["try_wheel", "--model", "a.gguf"]) == "--model needs a GGUF file; 'a.gguf' is none."
    assert said(["try_wheel", "--processor", "i387"], PATH="/nowhere:/bin:/usr/bin").startswith(
        ("qemu-x86_64 is needed", "--processor i387: qemu-x86_64 knows none of this name")
    )
    assert said(["fresh", "demo", "wheel"]).startswith("scripts/fresh wheel goes by itself: demo wheel need a compiler")


def test_backends_that_are_built_in_are_left_alone():
    before = laprox._core.backends()
    assert laprox._core.load_backends("/nowhere") == len(before) > 0
    assert laprox._core.backends() == before


def test_a_package_without_backends_says_so(monkeypatch):
    asked = []
    monkeypatch.setattr(laprox._core, "load_backends", lambda folder: asked.append(folder) or 0)
    with pytest.raises(ImportError, match=r"laprox finds no backend of ggml in .*/package/bin: install laprox again"):
        _libraries._load_backends(Path("/package/lib"))
    assert asked == [str(Path("/package/bin"))]
