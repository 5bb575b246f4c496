"""scripts/results: the page is a function of the result files."""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import typer.main

from laprox.cache_types import Table, Types
from laprox.cli.app import app
from laprox.eval.reader import REGIMES
from laprox.eval.rows import Rows
from laprox.eval.summary import Summary, key
from laprox.profile.types import BUDGETS, SEEN, TYPES, UNSEEN, named, table

SCRIPT = Path(__file__).parent.parent / "scripts" / "results"
HEADER = {"kind": "eval", "versions": {}, "settings": {}, "inputs": [], "model": {"fingerprint": "f"}}
ASKED = 4
COLUMNS = [(length, budget) for length in (2500, 6700) for budget in ("10%", "20%")]


@pytest.fixture(scope="module")
def results():
    loader = importlib.machinery.SourceFileLoader("results_script", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("results_script", loader))
    sys.modules["results_script"] = module  # where its dataclasses look themselves up
    loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, rng):
    """Result files with random scores, of two documents each."""
    for name, task, length in [
        ("0.5b-books-2500", "books", 2500),
        ("1.5b-books-2500", "books", 2500),
        ("0.5b-books-2500-q8_0", "books", 2500),
        ("0.5b-ruler-2000", "niah-single", 2000),
    ]:
        rows = Rows(tmp_path / f"{name}.jsonl", HEADER)
        regimes = REGIMES if length == 2500 and "q8_0" not in name else ["aware"]
        for number in range(2):
            for i in range(ASKED):
                row = {"task": task, "bytes": 10_000_000, "entries": 9, "score": float(rng.integers(2)), "answer": "x"}
                rows.add(key(task, length, number, i), row | {"read_ms": 1.0})
                for regime in regimes:
                    if regime == "follow-up" and i == 0:
                        continue
                    if regime == "follow-up":
                        rows.add(key(task, length, number, i, regime, "full", ""), row)
                    for policy in ("laprox", "snapkv"):
                        measured = {"kl": float(rng.random()), "score_ms": 1.0, "rest_ms": 2.0, "bytes": 1_000_000}
                        rows.add(key(task, length, number, i, regime, policy, "10%"), row | measured)
    rows = Rows(tmp_path / "0.5b-types-2500.jsonl", HEADER | {"model": {"name": "m.gguf", "fingerprint": "f"}})
    for i in range(ASKED):
        for types in TYPES:
            row = {"task": "books", "bytes": 10_000_000, "score": 1.0}
            whole = {} if types == Types() else {"kl": 0.05 * float(rng.random())}
            rows.add(key("books", 2500, 0, i, "", named("full", types), ""), row | whole)
            for policy, regime in ((SEEN, "aware"), (UNSEEN, "agnostic")):
                for budget in BUDGETS:
                    rows.add(key("books", 2500, 0, i, regime, named(policy, types), budget), row | {"kl": 0.1 + float(rng.random())})
    return tmp_path


def test_a_type_that_destroys_the_model_is_no_choice():
    """Its full cache is worse than the fewest entries in f16 that were tried."""
    f16, q8_0, q4_0 = Types(), Types("q8_0", "q8_0"), Types("q4_0", "q4_0")
    rows = []
    for types, loss in ((f16, 0.0), (q8_0, 0.01), (q4_0, 1.4)):
        rows.append((key("books", 2500, 0, 0, "", named("full", types), ""), {"task": "books", "score": 1.0, "kl": loss}))
        for policy, regime in ((SEEN, "aware"), (UNSEEN, "agnostic")):
            for budget, more in zip(BUDGETS, (0.9, 0.4, 0.2, 0.1)):
                cell = key("books", 2500, 0, 0, regime, named(policy, types), budget)
                rows.append((cell, {"task": "books", "score": 1.0, "kl": loss + more * (types != q4_0)}))
    found = table(Summary(rows), "m.gguf", "f")
    assert list(found.seen) == list(found.unseen) == [f16, q8_0] and found.seen[q8_0][1.0] == 0.01


def test_the_page_is_a_function_of_the_files(results, folder, monkeypatch):
    page = folder / "page.md"
    pages = []
    for _ in range(2):
        page.write_text(f"prose\n{results.BEGIN}OUTDATED\n{results.END}more prose\n")
        others = {option: folder / name for option, name in (("readme", "readme.md"), ("unseen", "unseen.md"), ("types", "types.json"))}
        for path in others.values():
            path.write_text(page.read_text())
        argv = ["results", "--folder", str(folder), "--page", str(page)]
        monkeypatch.setattr("sys.argv", argv + [arg for option, path in others.items() for arg in (f"--{option}", str(path))])
        results.main()
        written = [page, *others.values(), *sorted((folder / "images").iterdir())]
        pages.append([path.read_bytes() for path in written])
    assert pages[0] == pages[1] and len(pages[0]) == 4 + len(REGIMES)
    text = others["unseen"].read_text()
    assert "OUTDATED" not in text and text.count("| q8_0/q4_0 |") == 5 and "energy@refit, 1 passage of 2,500 tokens, 4 questions" in text
    made = Table.load(others["types"])
    assert (made.model, made.fingerprint) == ("m.gguf", "f") and list(made.seen) == list(made.unseen) == list(TYPES)
    measured = Summary(Rows.load(folder / "0.5b-types-2500.jsonl"))
    q8_0 = Types("q8_0", "q8_0")
    assert made.unseen[q8_0][0.2] == pytest.approx(measured.mean("kl", "agnostic", "energy@refit@q8_0", "20%").mean, abs=1e-4)
    assert made.seen[q8_0][1.0] == made.unseen[q8_0][1.0] == pytest.approx(measured.mean("kl", "", "full@q8_0", "").mean, abs=1e-4)
    assert "**laprox 10%**" in (folder / "readme.md").read_text()
    text = page.read_text()
    assert text.startswith("prose\n") and text.endswith("more prose\n") and "OUTDATED" not in text
    for image in (folder / "images").iterdir():
        assert f"images/{image.name}" in text and image.stat().st_size < 200_000
    for heading in ("Qwen2.5-Coder-0.5B, books of 2,500", "Qwen2.5-Coder-1.5B, books of 2,500", "laprox over q8_0", "niah-single"):
        assert heading in text


def test_many_documents_by_length(results, tmp_path, rng):
    scores, untouched = {}, {}
    for name, lengths, cells in [
        ("0.5b-books-20", (2500, 6700), [("", "full"), ("aware", "laprox"), ("follow-up", "full"), ("follow-up", "laprox"), ("follow-up", "laprox@recall")]),
        ("0.5b-unseen-20", (2500,), [("", "full"), ("agnostic", "laprox"), ("agnostic", "energy@refit")]),
    ]:
        rows = Rows(tmp_path / f"{name}.jsonl", HEADER)
        for length in lengths:
            for regime, policy in cells:
                for budget in [""] if policy == "full" else ["10%", "20%"]:
                    for number, i in ((n, i) for n in ((0, results.LOOKED_AT) if "unseen" in name else (0,)) for i in range(regime == "follow-up", ASKED)):
                        score = float(rng.integers(2))
                        scores.setdefault((length, regime, policy, budget), []).append(score)
                        if number:
                            untouched.setdefault((regime, policy, budget), []).append(score)
                        rows.add(key("books", length, number, i, regime, policy, budget), {"task": "books", "score": score})
    summaries = results.load(tmp_path)
    text = "\n".join(results.of_many(summaries))
    percent = lambda *cell: f"{100 * np.mean(scores[cell]):.0f} ±"
    for line, cell in (("laprox@recall", ("follow-up", "laprox@recall")), ("laprox, no archive", ("follow-up", "laprox"))):
        (found,) = [row for row in text.splitlines() if row.startswith(f"|  | {line} |")]
        assert [c.strip()[: len(percent(n, *cell, b))] for c, (n, b) in zip(found.split("|")[3:], COLUMNS)] == [percent(n, *cell, b) for n, b in COLUMNS]
    assert f"| energy@refit | {percent(2500, 'agnostic', 'energy@refit', '10%')}" in text and text.rstrip().endswith("| - | - |")
    said = results.later_questions(summaries)
    for words, *cell in (("cache ", "follow-up", "full", ""), ("20% ", "follow-up", "laprox@recall", "20%")):
        both = [score for length in (2500, 6700) for score in scores[(length, *cell)]]
        assert f"{words}{100 * np.mean(both):.0f} ±" in said
    said = results.before_any_question(summaries)
    for words, *cell in (("cache ", "", "full", ""), ("10% ", "agnostic", "energy@refit", "10%"), ("20% ", "agnostic", "energy@refit", "20%")):
        assert f"{words}{100 * np.mean(untouched[tuple(cell)]):.0f} ±" in said
    assert f"over 1 passages of 2,500 tokens (Qwen2.5-Coder-0.5B, {ASKED} questions)" in said
    assert f"Qwen2.5-Coder-0.5B: {ASKED} questions about 1 passages of 2,500 tokens" in text
    (alone,) = [row.split("|")[3:] for row in text.splitlines() if row.startswith("|  | laprox, each alone |")]
    for cell, (length, budget) in zip(alone, COLUMNS):  # of the questions that have one before them
        later = scores[length, "aware", "laprox", budget][1:]
        assert cell.strip().startswith(f"{100 * np.mean(later):.0f} ±")


def test_follow_ups_are_compared_with_the_full_cache_that_was_asked_before_too(folder):
    summary = Summary(Rows.load(folder / "0.5b-books-2500.jsonl"))
    assert summary.complete and summary.policies == ["laprox", "snapkv"] and summary.budgets == ["10%"]
    (_, (full,)), *_ = summary.table("score", "follow-up")
    assert full == summary.mean("score", "follow-up", "full", "") and full.n == 2 * (ASKED - 1)
    assert summary.mean("score").n == 2 * ASKED


def test_pairs_are_of_one_question(folder):
    summary = Summary(Rows.load(folder / "0.5b-books-2500.jsonl"))
    one, other = ("aware", "laprox", "10%"), ("aware", "snapkv", "10%")
    pairs = summary.pairs(one, other)
    assert len(pairs) == 2 * ASKED and [a for a, _ in pairs] == [b for _, b in summary.pairs(other, one)]
    rows = Rows.load(folder / "0.5b-books-2500.jsonl")
    assert pairs[1] == tuple(rows[key("books", 2500, 0, 1, *cell)]["score"] for cell in (one, other))


def test_nothing_measured_is_said(results, tmp_path):
    with pytest.raises(SystemExit, match="nothing was measured yet"):
        results.load(tmp_path)


def test_the_commands_are_commands(results, tmp_path):
    """Of the `laprox` that there is: no option was renamed."""
    commands = typer.main.get_command(app).commands
    for run in results.RUNS:
        for command in results._commands(run, Path("books"), tmp_path, restart=False):
            name, *args = command[3:]
            context = commands[name].make_context(name, args, resilient_parsing=False)
            assert context.params["output"].parent == tmp_path
