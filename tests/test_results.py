"""scripts/results: the page is a function of the result files."""

import importlib.machinery
import importlib.util
from pathlib import Path

import pytest
import typer.main

from laprox.cli.app import app
from laprox.eval.rows import Rows
from laprox.eval.summary import key

FACTS = ["facts-single", "facts-several"]
SCRIPT = Path(__file__).parent.parent / "scripts" / "results"
HEADER = {
    "kind": "eval",
    "versions": {"laprox": "1"},
    "settings": {"seed": 1, "threads": 1},
    "inputs": [],
    "model": {"fingerprint": "f"},
}


@pytest.fixture
def results():
    loader = importlib.machinery.SourceFileLoader("results_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("results_script", loader))
    loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, rng, results):
    """Result files with random scores."""
    for name, tasks in [("facts-1000", FACTS), ("facts-2000", FACTS), ("needles", ["niah-single"]), ("ruler", ["common-words"])]:
        rows = Rows(tmp_path / f"{name}.jsonl", HEADER)
        length = 2000 if name in ("facts-2000", "needles") else 1000
        cells = [("aware", "laprox", "5%"), ("agnostic", "laprox", "5%")]
        if name == "facts-1000":
            cells.append(("aware", "rkv", "5%"))
        for number in range(2):
            for i, task in enumerate(tasks):
                row = {"task": task, "bytes": 10_000, "entries": 9, "score": float(rng.integers(2))}
                rows.add(key(name, length, number, i), row | {"read_ms": 1.0})
                for cell in cells:
                    rows.add(
                        key(name, length, number, i, *cell),
                        row | {"kl": float(rng.random()), "score_ms": 1.0, "rest_ms": 2.0, "bytes": 1000},
                    )
    return tmp_path


def test_the_page_is_a_function_of_the_files(results, folder, monkeypatch):
    page = folder / "page.md"
    before = f"prose\n{results.BEGIN}OUTDATED\n{results.END}more prose\n"
    pages = []
    for _ in range(2):
        page.write_text(before)
        monkeypatch.setattr("sys.argv", ["results", "--folder", str(folder), "--page", str(page)])
        results.main()
        pages.append((page.read_bytes(), [p.read_bytes() for p in sorted((folder / "images").iterdir())]))
    assert pages[0] == pages[1] and len(pages[0][1]) == 3
    text = page.read_text()
    assert text.startswith("prose\n") and text.endswith("more prose\n") and "OUTDATED" not in text
    for image in (folder / "images").iterdir():
        assert f"images/{image.name}" in text and image.stat().st_size < 200_000
    assert "common-words" in text and "takes too long: rkv" in text and "laprox (laprox:global)" in text


def test_files_of_different_models_are_refused(results, folder):
    Rows(folder / "needles.jsonl", HEADER | {"model": {"fingerprint": "another"}}, restart=True)
    with pytest.raises(SystemExit, match="measured with another model or other settings"):
        results.load(folder)
    with pytest.raises(SystemExit, match="nothing was measured yet"):
        results.load(folder / "none")


def test_the_commands_are_commands(results, tmp_path):
    """Of the `laprox` that there is: no option was renamed."""
    command = typer.main.get_command(app).commands["eval"]
    for name in results.RUNS:
        args = results.command(name, Path("m.gguf"), tmp_path)[4:]
        context = command.make_context("eval", args, resilient_parsing=False)
        assert context.params["output"] == tmp_path / f"{name}.jsonl" and context.params["seed"] == 1
