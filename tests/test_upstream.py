"""What is taken of llama-cpp-python without a public name, and its version: each in one place, which scripts/bump_audit checks."""

import ast
import importlib.machinery
import importlib.util
import subprocess
import sys
from pathlib import Path

import llama_cpp
import pytest

import laprox
from laprox import _upstream

ROOT = Path(__file__).parent.parent
PACKAGE = Path(laprox.__file__).parent
PRIVATE = {owner: names.split() for owner, names in _upstream.PRIVATE.items()}
NAMES = {name for names in PRIVATE.values() for name in names if name.startswith("_")}


@pytest.fixture
def audit():
    """scripts/bump_audit as a module."""
    loader = importlib.machinery.SourceFileLoader("bump_audit", str(ROOT / "scripts/bump_audit"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


def attributes_of(file):
    """Each `a.b` in a file's code, and the modules it imports from."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
        elif isinstance(node, ast.ImportFrom):
            yield "import", node.module


def test_no_other_file_uses_private_names():
    ours = {"_ctx"}  # KV and Head have one of their own
    for file in PACKAGE.rglob("*.py"):
        if file.name != "_upstream.py":
            found = {(of, name) for of, name in attributes_of(file) if name in NAMES and not (of == "self" and name in ours)}
            assert not found and ("import", "llama_cpp._internals") not in attributes_of(file), (file, found)


def test_all_private_names_are_known_to_the_audit():
    own = {"_name", "_check_usable", "_before_context", "_loaded_model"}
    used = {name for _, name in attributes_of(PACKAGE / "_upstream.py") if name.startswith("_") and not name.startswith("__")}
    assert used - own <= NAMES


def test_the_installed_release_has_them():
    done = subprocess.run([sys.executable, ROOT / "scripts/bump_audit"], capture_output=True, text=True)
    assert done.returncode == 0 and "all are there" in done.stdout, done.stdout + done.stderr


def test_a_name_that_is_gone_is_told(audit, tmp_path, capsys):
    for owner in PRIVATE:
        source = Path(llama_cpp.__file__).parent / f"{owner.partition('.')[0]}.py"
        text = source.read_text().replace("_requires_eval", "_dirty").replace("def detokenize", "def text_of")
        (tmp_path / source.name).write_text(text)
    assert audit.audit_private_names(tmp_path) == 2
    said = capsys.readouterr().out
    assert "GONE    llama.Llama._requires_eval" in said and "GONE    _internals.LlamaModel.detokenize" in said
    (tmp_path / "llama_grammar.py").unlink()
    assert audit.audit_private_names(tmp_path) == 4


def test_another_version_is_told(audit, monkeypatch, capsys):
    assert audit.audit_versions() == 0
    monkeypatch.setattr(audit, "PINNED", "0.0.1")
    assert audit.audit_versions() == len(audit.AGAIN) and "DIFFERS docs/python.md: 0.3." in capsys.readouterr().out
