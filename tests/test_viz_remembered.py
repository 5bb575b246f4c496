"""What is shown as remembered is what llm.kv holds."""

import base64
import io
import json
import random
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
from bs4 import BeautifulSoup
from contrast import contrast
from gguf_factory import CHATML
from rich.console import Console

import laprox.viz
from laprox import KVConfig, LaproxError, Llama
from laprox.kv import KVStats
from laprox.viz import terminal
from laprox.viz.remembered import SHADES, Remembered, cells, held_by, legend, look, score_all, shade
from laprox.viz.remembered_page import charts_of, heading, page

TEXT = (
    "the quick brown fox jumps over the lazy dog. " * 8
    + '</div><script>alert("1")</script> &amp; <!-- \x1b[2J \x07 \u202eevil\u202c '
    + "עברית مرحبا 🦊👩🏽\u200d🚀 e\u0301 日本語\r\nline\ttab\n"
) * 3


@pytest.fixture(scope="module")
def model(toy):
    return str(toy(chat_template=CHATML, n_ctx_train=4096))


@pytest.fixture(scope="module")
def llm(model):
    llm = Llama(model, kv=KVConfig(budget="20%", min_tokens=64), n_ctx=2048, n_threads=1, verbose=False)
    llm.eval([1, *llm.tokenize(TEXT.encode(), add_bos=False)])
    return llm


@pytest.fixture(scope="module")
def remembered(llm):
    scores = score_all(llm)
    llm.kv.compress()
    return look(llm, scores, {"question": llm.n_tokens - 40})


def synthetic(pieces, layers=2, heads=3, share=0.3, seed=0, control=()):
    """A Remembered without a model."""
    rng = np.random.default_rng(seed)
    held = {layer: rng.random((heads, len(pieces))) < share for layer in range(layers)}
    n = len(pieces)
    flags = np.isin(np.arange(n), control)
    n_held = int(sum(h.sum() for h in held.values()))
    return Remembered(
        list(pieces), flags, held, {}, KVConfig(), KVStats(n, n_held, layers * heads * n, 1000, 9000, 0, 1, 0, 0, 0), n
    )


# --- llm.kv.held() -----------------------------------------------------------------------------------------------------


def test_held_is_the_positions(llm, remembered):
    held = llm.kv.held()
    assert {layer: len(heads) for layer, heads in held.items()} == llm.kv.layers
    for layer, heads in held.items():
        assert heads.shape == (llm.kv.layers[layer], llm.n_tokens) and heads.dtype == bool
        for head, row in enumerate(heads):
            assert np.flatnonzero(row).tolist() == llm.kv.positions(layer, head).tolist()
    assert sum(int(heads.sum()) for heads in held.values()) == llm.kv.stats().entries_held < llm.kv.stats().entries_full


def test_held_before_anything_is_evicted(model):
    llm = Llama(model, kv=KVConfig(), n_ctx=256, n_threads=1, verbose=False)
    assert all(heads.shape[1] == 0 for heads in llm.kv.held().values())
    with pytest.raises(ValueError, match="nothing was read yet"):
        look(llm)
    llm.eval(list(range(1, 50)))
    assert all(heads.all() and heads.shape[1] == 49 for heads in llm.kv.held().values())


def test_only_a_compressed_cache_can_be_looked_at(model):
    with pytest.raises(LaproxError, match="not compressed"):
        look(Llama(model, kv=None, n_ctx=256, n_threads=1, verbose=False))


def test_scores_by_token(llm, remembered):
    assert all(np.isfinite(scores).all() for scores in remembered.scores.values())  # taken while all was there
    now = score_all(llm)
    for layer, heads in now.items():
        assert (np.isfinite(heads) == remembered.held[layer]).all()
    layer = list(now)[0]
    assert np.array_equal(now[layer][1][remembered.held[layer][1]], llm.kv.scores(layer, 1))


@pytest.mark.parametrize("policy", ["full", "streaming", "random", "keydiff:uniform", "expected"])
def test_any_policy_can_be_looked_at(model, policy):
    llm = Llama(model, kv=KVConfig(budget="20%", min_tokens=64, policy=policy), n_ctx=512, n_threads=1, verbose=False)
    llm.eval(list(range(1, 200)))
    scores = score_all(llm)
    llm.kv.compress()
    seen = look(llm, scores)
    assert (seen.rows.sum() < seen.rows.size) == (policy != "full")
    assert ("scores" in charts_of(seen)) == (policy != "full")
    assert heading(seen, "toy.gguf", "notes.txt")[1].endswith(f"chosen by {policy} before any question.")


# --- the text ------------------------------------------------------------------------------------------------------------


def test_pieces_are_the_text(llm, remembered):
    assert b"".join(remembered.pieces[1:]).strip() == TEXT.encode().strip()
    assert remembered.control.tolist() == [True] + [False] * (llm.n_tokens - 1)


def test_what_came_back_is_what_is_held_now_and_was_not(model):
    """Of the text that both questions are about; what is new since is not counted."""
    llm = Llama(model, kv=KVConfig(budget="30%", min_tokens=0, window=8, recent=8), n_ctx=1024, n_threads=1, verbose=False)
    document, (one, other) = llm.tokenize(TEXT.encode())[:600], ([5, 6, 7, 8] * 4, [9, 10, 11, 12] * 5)
    llm.eval([*document, *one])
    llm.kv.compress()
    before = look(llm)
    assert np.array_equal(before.came, before.rows) and not before.rows_before.any()
    next(llm.generate([*document, *other], temp=0.0))
    held, now = llm.kv.held(), look(llm, {}, before=before)
    n = len(document)
    for i, (layer, head) in enumerate(now.pairs):
        was, is_ = before.held[layer][head], held[layer][head]
        assert np.array_equal(now.came[i, :n], is_[:n] & ~was[:n])
        assert not now.came[i, n:].any() and now.rows_before[i, n:].all()
    assert 0 < now.came.sum() <= llm.kv.stats().entries_recalled  # of several passes


def test_cells_cut_the_text_at_characters(remembered):
    parts = cells(remembered)
    assert [c.start for c in parts] == [0, *(c.stop for c in parts[:-1])] and parts[-1].stop == len(remembered.pieces)
    text = "".join(c.text for c in parts)
    assert "\ufffd\ufffd" not in text and text.count("🦊") == 3
    assert "\x1b" not in text and "␛[2J" in text and "\u202e" not in text and "\r" not in text


@pytest.mark.parametrize("seed", range(30))
def test_cells_of_bytes_in_any_pieces(seed):
    rng = random.Random(seed)
    data = "a 🦊é日\u0301\u200dש\n \x00\t".encode() * 3
    if seed % 3 == 0:
        data = rng.randbytes(60)
    cuts = sorted(rng.sample(range(len(data)), 15))
    pieces = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)])]
    pieces.insert(5, b"")
    control = (3, 4) if seed % 2 else ()
    remembered = synthetic(pieces, seed=seed, control=control)
    parts = cells(remembered)
    assert [c.start for c in parts] == [0, *(c.stop for c in parts[:-1])] and parts[-1].stop == len(pieces)
    assert all(c.stop == c.start + 1 for c in parts if c.control)
    if seed % 3 and not control:
        shown = "".join(c.text for c in parts)
        assert shown == data.decode().replace("\x00", "␀")
    held = held_by(remembered, parts)
    for cell, column in zip(parts, held.T):
        assert (column == remembered.rows[:, cell.start : cell.stop].any(1)).all()


def test_accents_and_emoji_stay_with_their_letters():
    parts = cells(synthetic([b"e", "\u0301".encode(), "👩".encode(), "🏽".encode(), "\u200d".encode(), "🚀".encode(), b"x"]))
    assert [c.text for c in parts] == ["e\u0301", "👩🏽\u200d🚀", "x"]


def test_shades():
    assert shade(0, 24) == 0 and shade(24, 24) == len(SHADES) and shade(23, 24) == len(SHADES) - 1
    assert shade(1, 1) == len(SHADES)
    for n in (1, 7, 24, 256, 2048):
        levels = [shade(count, n) for count in range(n + 1)]
        assert levels == sorted(levels) and levels[0] < levels[1] and levels[-2] < levels[-1]
        shown = legend(n)
        assert [level for level, _ in shown] == sorted(set(levels))
        assert shown[-1] == (len(SHADES), str(n))


@pytest.mark.parametrize("scheme, paper", [(0, "#ffffff"), (1, "#14161b")])
def test_every_shade_can_be_read_and_told_from_the_next_in_grey(scheme, paper):
    css = (Path(laprox.viz.__file__).parent / "templates" / "remembered.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--(\w+): (#\w{6})", blocks[scheme]))
    levels = [colours[f"l{i}"] for i in range(1, len(SHADES) + 1)]
    assert contrast(colours["gone"], paper) >= 4.5
    for i, level in enumerate(levels):
        assert contrast(level, colours["t1" if i < 4 else "t5"]) >= 4.5, level
    away = [contrast(paper, level) for level in levels]
    assert away == sorted(away) and away[0] > 1.04 and min(b / a for a, b in zip(away, away[1:])) > 1.05


# --- the page --------------------------------------------------------------------------------------------------------------


def unpack(box, n_pairs):
    """What the page's script reads: [pairs, cells that something holds]."""
    stride = int(box["data-stride"])
    bits = np.frombuffer(zlib.decompress(base64.b64decode(box["data-held"])), np.uint8).reshape(n_pairs, stride)
    return np.unpackbits(bits, axis=1)[:, : len(box["data-starts"].split())].astype(bool)


def test_the_page_shows_what_is_held(remembered):
    soup = BeautifulSoup(page(remembered, "toy.gguf", "notes.txt", "<b>why?</b>").render(), "html.parser")
    box = soup.find(id="text")
    parts, n_pairs = cells(remembered), len(remembered.pairs)
    counts = held_by(remembered, parts).sum(0)
    for mark in box.find_all("em"):
        assert mark.get_text() == "question"
        mark.decompose()
    assert box.get_text().split() == "".join(cell.text for cell in parts).split()
    some = [(cell, count) for cell, count in zip(parts, counts) if count]
    assert [(i.get_text().strip(), i["class"]) for i in box.find_all("i")] == [
        (c.text.strip(), [f"l{shade(n, n_pairs)}"]) for c, n in some
    ]
    assert [int(s) for s in box["data-starts"].split()] == [cell.start for cell, _ in some]
    assert json.loads(box["data-layers"]) == [[layer, len(heads)] for layer, heads in remembered.held.items()]
    held = unpack(box, n_pairs)
    for pair, (layer, head) in enumerate(remembered.pairs):
        for column, (cell, _) in enumerate(some):
            assert held[pair, column] == remembered.held[layer][head, cell.start : cell.stop].any()
    assert len(soup.find_all("script")) == 1 and "alert" not in soup.script.string
    assert [o.get_text() for o in soup.find_all("option")][1] == f"layer 0, head 0 ({int(remembered.held[0][0].sum()):,})"


def test_a_page_of_nothing_evicted_and_of_little():
    for share, pieces in ((1.0, [b"all ", b"of it"]), (0.0, [b"none"]), (0.5, [b"x"])):
        html = page(synthetic(pieces, share=share), "toy.gguf").render()
        assert BeautifulSoup(html, "html.parser").find(id="text").get_text() == b"".join(pieces).decode()


def test_a_long_document_of_a_large_model_is_a_small_page():
    made = synthetic([b" word"] * 32768, layers=32, heads=8, share=0.05)
    assert len(page(made, "large.gguf").render()) < 6e6  # with nothing for the compression of the bits to find


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (400, "dark")])
def test_the_page_in_a_browser(browser, remembered, tmp_path, width, scheme):
    page(remembered, "toy.gguf", "notes.txt", "why?").save(tmp_path / "view.html")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab, said = context.new_page(), []
    for event in ("console", "pageerror", "dialog", "requestfailed"):
        tab.on(event, lambda what: said.append(str(what)))
    tab.goto((tmp_path / "view.html").as_uri())
    tab.wait_for_selector("html[data-ready]")
    assert tab.evaluate("document.documentElement.scrollWidth") == width

    parts = cells(remembered)
    counts = held_by(remembered, parts).sum(0)
    some = np.flatnonzero(counts)
    at = 20
    tab.locator("#text i").nth(at).hover()
    assert f"held by {counts[some[at]]} of {len(remembered.pairs)}" in tab.inner_text("#tip")
    tab.focus("#text")
    tab.keyboard.press("ArrowRight")
    assert f"token {parts[some[at + 1]].start:,}" in tab.inner_text("#tip")
    tab.keyboard.press("Escape")
    assert tab.locator("#tip").is_hidden()

    tab.select_option("#pairs", "3")
    layer, head = remembered.pairs[3]
    shaded = tab.eval_on_selector_all("#text i", "all => all.map((i) => i.className !== '')")
    assert shaded == [bool(remembered.held[layer][head, parts[i].start : parts[i].stop].any()) for i in some]
    assert said == []
    context.close()


# --- pictures and terminals --------------------------------------------------------------------------------------------------


def test_picture(remembered, tmp_path):
    for name in "ab":
        terminal.save(remembered, tmp_path / f"{name}.svg", "What <toy> remembers")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    picture = BeautifulSoup((tmp_path / "a.svg").read_text(), "xml")
    shown = picture.get_text().replace("\xa0", " ")
    assert "What <toy> remembers" in shown and '<script>alert("1")' in shown and "Where in the text" in shown
    assert not picture.find_all("script") and "\u202e" not in shown
    assert "url(" not in picture.style.get_text() and picture.style.get_text().count("monospace")  # without a network


@pytest.mark.parametrize("colours", [True, False])
def test_in_a_terminal(remembered, colours):
    console = Console(
        width=80, force_terminal=colours, color_system="truecolor" if colours else None, record=True, file=io.StringIO()
    )
    terminal.show(remembered, console)
    shown = console.export_text(styles=colours)
    assert "\x1b[2J" not in shown and "\x07" not in shown and "\u202e" not in shown
    assert ("\x1b[" in shown) == colours
    assert (f"of {len(remembered.pairs)} (layer, KV head) pairs" if colours else " ⋯ ") in shown
    assert "Where in the text" in shown and "head 1" in shown


def test_the_strip_is_as_wide_as_the_terminal(remembered):
    assert len(terminal.strip(remembered.rows, 60).plain) == 60
    assert len(terminal.strip(synthetic([b"a"] * 5).rows, 60).plain) == 5
