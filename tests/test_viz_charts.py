"""Charts: one look for all, whatever is in them."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from contrast import contrast, luminance
from PIL import Image

import laprox
from laprox.viz import chart, charts, marks
from laprox.viz.charts import Line
from laprox.viz.text import size

HOSTILE = 'a<script>alert("1")</script>&\' $x$ \x1b[31m \u202eevil\u05d0 🦊'
SIZES = [2**18, 2**20, 2**19]


def accuracy(**changes):
    lines = [
        Line("laprox", SIZES, [0.4, 0.8, 0.6], [0.05, 0.02, float("nan")]),
        Line(HOSTILE, SIZES[:2], [0.1, 0.9]),
        Line("q8_0", [2**22], [0.8], [0.01]),
    ]
    return charts.against_bytes(lines, Line("full", [2**23], [0.85], [0.02]), **changes)


def every_chart():
    rng = np.random.default_rng(0)
    heads = rng.integers(0, 900, (5, 3)).astype(float)
    heads[2, 2] = np.nan
    scores = {layer: rng.lognormal(-5, 2, (2, 300)) for layer in (0, 3)}
    return {
        "accuracy": accuracy(),
        "kl": charts.against_bytes([Line("laprox", SIZES, [0.0, 0.02, 0.5])], log_y=True, percent=False, y="KL"),
        "share": charts.against_bytes([Line("laprox", [0.02, 0.5], [0.1, 0.2])], share=True, title=HOSTILE),
        "heads": charts.heat_map(heads, title="Entries", layers=[1, 2, 5, 6, 7]),
        "many heads": charts.heat_map(np.zeros((64, 40))),
        "along": charts.along(rng.random((2, 1000)), marks={HOSTILE: 900, "start": 0}),
        "exchange": charts.exchange(rng.random((6, 1000)) < 0.2, rng.random((6, 1000)) < 0.2, marks={HOSTILE: 900}, title="Exchange"),
        "nothing exchanged": charts.exchange(np.ones((2, 3)), np.ones((2, 3))),
        "short": charts.along(np.ones((1, 3))),
        "scores": charts.distributions(scores, {layer: s > 0.01 for layer, s in scores.items()}),
        "negative": charts.distributions({0: [-1.0, -2.0, np.nan, -np.inf]}),
        "constant": charts.distributions({0: np.zeros(9), 1: np.zeros(9)}),
    }


@pytest.mark.parametrize("name", every_chart())
def test_charts_are_svg_elements_for_a_page(name):
    svg = every_chart()[name].svg(chart.NARROW)
    root = ET.fromstring(
        re.sub(r"\bxlink:href", "href", svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1) if "xmlns:xlink" not in svg else svg)
    )
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(i.startswith(ids[0][:10]) for i in ids)  # other charts of the page have others
    refs = re.findall(r'href="([^"]*)"', svg) + re.findall(r"url\(([^)]*)\)", svg)
    assert all(ref.startswith(("data:image/png", "#")) and (ref[0] != "#" or ref[1:] in ids) for ref in refs)
    assert "<script" not in svg and "\x1b" not in svg and "\u202e" not in svg
    assert root.get("width") is None and root.get("aria-label")
    assert float(root.get("viewBox").split()[2]) == chart.NARROW
    for variable in re.findall(r"var\((.*?)\)", svg):
        assert variable in ("--ink", "--muted", "--rule", "--paper", "--font")


def test_text_is_shown_as_it_is():
    texts = "".join(ET.fromstring(accuracy(title=HOSTILE).svg()).itertext())
    assert '<script>alert("1")</script>&' in texts and "$x$" in texts


def test_the_same_chart_is_the_same_file(tmp_path):
    assert accuracy().svg() == accuracy().svg()
    for name in "ab":
        accuracy().save(tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_png_has_the_width_asked_for(tmp_path):
    accuracy().save(tmp_path / "a.png", width=500, scale=1.5)
    assert Image.open(tmp_path / "a.png").width == 750


def test_a_name_has_its_mark():
    names = [*laprox.policies(), "q8_0", "q4_0", "shorter"]
    assert len({marks.mark(name) for name in names}) == len(names)
    assert marks.mark("laprox q8_0") != marks.mark("laprox")
    assert marks.mark("laprox q8_0").colour == marks.mark("laprox:uniform").colour == marks.mark("laprox").colour
    assert marks.mark("mine") == marks.mark("mine") and marks.mark("") and marks.mark(HOSTILE)


@pytest.mark.parametrize("paper", ["#ffffff", "#14161b"])
def test_lines_stand_out_on_white_and_on_black(paper):
    for name, mark in marks._MARKS.items():
        if mark.colour != chart.INK:  # which is the page's own
            assert contrast(mark.colour, paper) >= 3, name


def test_the_map_of_numbers_is_read_in_grey_too():
    steps = [luminance("#" + "".join(f"{round(255 * c):02x}" for c in chart.MAP(x)[:3])) for x in np.linspace(0, 1, 50)]
    assert all(b > a for a, b in zip(steps, steps[1:]))


@pytest.mark.parametrize("n, text", [(0, "0 B"), (1536, "1.5 KiB"), (2**20, "1 MiB"), (5 * 2**40, "5120 GiB")])
def test_sizes(n, text):
    assert size(n) == text
