"""What `import laprox` says when it can't work."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import laprox
from laprox._libraries import LLAMA_CPP_VERSION


def run(code, **env):
    """A fresh interpreter's stdout, or its last line on stderr."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}, timeout=120)
    return done.stdout.strip() if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


def copy_of_package(folder, *names):
    """laprox without what a build adds, except for `names`."""
    package = Path(laprox.__file__).parent
    built = lambda _, found: [f for f in found if f.startswith("_core") and f != "_core.pyi" or f in ("lib", "bin")]  # noqa: E731
    shutil.copytree(package, folder / "laprox", ignore=built)
    for path in Path(laprox._core.__file__).parent.glob("_core.*"):
        if "extension" in names and path.suffix != ".pyi":
            shutil.copy(path, folder / "laprox")
    return str(folder)


def test_our_libraries_are_loaded_and_the_environment_is_left_alone():
    code = "import os, laprox, llama_cpp.llama_cpp as l; print(l._lib._name, 'LLAMA_CPP_LIB_PATH' in os.environ)"
    name, leaked = run(code).rsplit(" ", 1)
    assert Path(name).parent == Path(laprox._core.__file__).parent / "lib"
    assert leaked == "False"


def test_a_variable_of_the_users_survives():
    assert run("import os, laprox; print(os.environ['LLAMA_CPP_LIB_PATH'])", LLAMA_CPP_LIB_PATH="/elsewhere") == "/elsewhere"


def test_llama_cpp_may_come_first_if_it_has_our_libraries():
    lib = str(Path(laprox._core.__file__).parent / "lib")
    assert run("import llama_cpp, laprox; print('fine')", LLAMA_CPP_LIB_PATH=lib) == "fine"


def test_foreign_llama_cpp_came_first(stock_lib_dir):
    said = run("import llama_cpp, laprox", LLAMA_CPP_LIB_PATH=stock_lib_dir)
    assert said.startswith("ImportError: llama_cpp was imported before laprox and has loaded " + stock_lib_dir)
    assert said.endswith("import laprox before llama_cpp")


def test_wrong_version():
    said = run("import importlib.metadata as m; m.version = lambda name: '0.0.1'; import laprox")
    assert said.startswith(f"ImportError: laprox is built for llama-cpp-python {LLAMA_CPP_VERSION}, but 0.0.1 is installed")
    assert f"pip install --no-cache-dir llama-cpp-python=={LLAMA_CPP_VERSION}" in said


def test_llama_cpp_missing():
    code = """
import importlib.metadata as m
def version(name): raise m.PackageNotFoundError(name)
m.version = version
import laprox"""
    assert run(code).startswith(f"ImportError: laprox needs llama-cpp-python {LLAMA_CPP_VERSION}: run `")


def import_from(folder):
    """Import laprox from there, though an editable install may know another place."""
    return f"""
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if isinstance(finder, type)]
sys.path.insert(0, {folder!r})
import laprox"""


def test_not_built(tmp_path):
    said = run(import_from(copy_of_package(tmp_path)))
    assert said == "ImportError: laprox is not built: run `pip install .` in its repository"


def test_libraries_missing(tmp_path):
    said = run(import_from(copy_of_package(tmp_path, "extension")))
    assert said.startswith("ImportError: laprox has no libllama in ")


def test_typed():
    folder = Path(laprox.__file__).parent
    assert (folder / "py.typed").exists() and (folder / "_core.pyi").exists()
