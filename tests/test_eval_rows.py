"""Results files: nothing that was measured is lost, and nothing of another run is mixed in."""

import json
import os
from pathlib import Path

import pytest

from laprox.eval.rows import Rows, make_header, make_model
from laprox.files import sha256_of

HEADER = {"kind": "test", "settings": {"seed": 1, "budgets": ["5%"]}, "command": ["a"], "machine": "here"}


def test_rows_come_back(tmp_path):
    rows = Rows(tmp_path / "r.jsonl", HEADER)
    rows.add(["laprox", 1], {"x": 0.1, "text": "ü\u2028\n"})
    rows.add(["laprox", None], {"x": [1, 2]})
    again = Rows(tmp_path / "r.jsonl", {**HEADER, "command": ["b"], "machine": "there"})
    assert list(again) == list(rows) == [(("laprox", 1), {"x": 0.1, "text": "ü\u2028\n"}), (("laprox", None), {"x": [1, 2]})]
    assert ["laprox", 1] in again and ("laprox", 2) not in again and again["laprox", 1]["x"] == 0.1 and len(again) == 2
    assert again.header["command"] == ["a"]
    with pytest.raises(KeyError, match="laprox"):
        again.add(["laprox", 1], {})
    lines = (tmp_path / "r.jsonl").read_text().split("\n")
    assert json.loads(lines[0]) == {"header": HEADER} and json.loads(lines[1])["key"] == ["laprox", 1]


@pytest.mark.parametrize("lost", [1, 5, 40])
def test_a_cut_off_line_is_dropped(tmp_path, lost):
    path = tmp_path / "r.jsonl"
    rows = Rows(path, HEADER)
    rows.add(["first"], {"x": "ü" * 20})
    whole = path.read_bytes()
    rows.add(["second"], {"x": "ü" * 20})
    path.write_bytes(cut := path.read_bytes()[:-lost])  # also in the middle of a character
    assert len(Rows.load(path)) == 1 and path.read_bytes() == cut
    again = Rows(path, HEADER)
    assert [key for key, _ in again] == [("first",)] and path.read_bytes() == whole
    again.add(["second"], {"x": 2})
    assert [key for key, _ in Rows.load(path)] == [("first",), ("second",)]


def test_a_file_that_was_only_begun(tmp_path):
    path = tmp_path / "r.jsonl"
    for begun in (b"", b'{"header": {"ki'):
        path.write_bytes(begun)
        Rows(path, HEADER).add(["a"], {})
        assert len(Rows(path, HEADER)) == 1


def test_another_run(tmp_path):
    path = tmp_path / "r.jsonl"
    Rows(path, HEADER).add(["a"], {})
    before = path.read_bytes()
    for settings, words in (
        ({"seed": 2, "budgets": ["5%"]}, "settings.seed is 1, now it is 2"),
        ({"seed": 1}, "settings.budgets"),
    ):
        with pytest.raises(ValueError, match=words):
            Rows(path, {**HEADER, "settings": settings})
    assert path.read_bytes() == before
    assert len(Rows(path, {**HEADER, "settings": {}}, restart=True)) == 0


def test_no_results_file(tmp_path):
    path = tmp_path / "r.jsonl"
    for text in ("hello\n", '{"a": 1}\n', "[]\n", '{"header": {}}\n{"no": "key"}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="no results file"):
            Rows(path, HEADER)
        assert path.read_text() == text


def test_header(tmp_path):
    model, text = tmp_path / "m.gguf", tmp_path / "a.txt"
    model.write_bytes(b"12345")
    text.write_bytes(b"abc")
    header = make_header("compare", ["compare", "m"], {"seed": 1}, [text], make_model(model, "f" * 16))
    assert header["inputs"] == [{"name": "a.txt", "sha256": sha256_of(text)}]
    assert sha256_of(text) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert header["model"] == {"name": "m.gguf", "bytes": 5, "fingerprint": "f" * 16}
    assert header["versions"]["laprox"] and header["versions"]["llama_cpp_python"]


def test_a_header_refuses_what_can_not_be_read_again():
    end, other = os.pipe()
    os.close(other)
    with pytest.raises(ValueError, match="accepted: files"):
        make_header("eval", [], {}, [Path(f"/dev/fd/{end}")], {})
    os.close(end)


def test_a_header_tells_no_folders_of_the_machine(tmp_path):
    (tmp_path / "books.json").write_text("{}")
    header = make_header("eval", ["laprox", "eval", "m", "-o", str(tmp_path / "out.jsonl")], {}, [tmp_path / "books.json"], {})
    assert header["command"] == ["laprox", "eval", "m", "-o", "out.jsonl"]
    assert str(tmp_path) not in json.dumps(header)
