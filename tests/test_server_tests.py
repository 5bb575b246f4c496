"""scripts/server_tests: what counts as a difference between servers, and that what differs is run again."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "server_tests"
P, F = "passed", "failure"


@pytest.fixture
def script():
    loader = importlib.machinery.SourceFileLoader("server_tests_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("server_tests_script", loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("stock", "off", "differs"),
    [
        ([P, P, P, P, P], [F, F, F, F, F], True),
        ([F, F, F, F, F], [P, P, P, P, P], True),
        ([P, P, P, P, P], [F, P, P, P, P], False),  # once
        ([P, P, P, P, P], [F, P, F, P, F], True),
        ([P, P, F, P, P], [F, F, F, F, F], False),  # shows nothing
        ([P], [F], True),
    ],
)
def test_what_is_a_difference(script, stock, off, differs):
    assert script.is_difference({"stock": stock, "off": off}) == differs
    assert script.is_difference({"stock": stock, "same": stock, "off": off}) == differs


def test_what_differs_is_run_again(script, monkeypatch, tmp_path, capsys):
    """By the path that pytest takes, from the folder of the tests."""
    monkeypatch.setattr(script, "ROOT", tmp_path)
    (tmp_path / "build/llama.cpp/stock-1/tools/server/tests").mkdir(parents=True)
    monkeypatch.setattr(script, "environment", lambda tests: None)
    monkeypatch.setattr(script, "write_model", lambda vocabulary: None)
    asked = []

    def run(name, chosen, *_):
        asked.append((name, chosen))
        return {"test_a.py::test_x[1-2]": F if name == "off" else P, "test_a.py::test_y": P}

    monkeypatch.setattr(script, "run", run)
    monkeypatch.setattr("sys.argv", ["server_tests", "--no-build", "--servers", "stock,off", "--repeat", "2", "unit/test_a.py"])
    assert script.main() == 1
    again = ["unit/test_a.py::test_x"]
    assert asked == [("stock", ["unit/test_a.py"]), ("off", ["unit/test_a.py"])] + [("stock", again), ("off", again)] * 2
    assert "differs: test_a.py::test_x[1-2]: stock 3x passed; off 3x failure" in capsys.readouterr().out
