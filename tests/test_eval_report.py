"""The report of `laprox eval`."""

import random

import pytest

from laprox.eval.eval_report import evaluation_page
from laprox.eval.rows import make_header
from laprox.eval.summary import Summary, key
from laprox.eval.tasks import TASKS

POLICIES = ["laprox", "snapkv", "adakv", "cake", "lava", "keydiff", "knorm", "streaming", "keydiff:global"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of two lengths and nine policies with random scores."""
    rng = random.Random(0)
    rows = {}
    for length in (1000, 2000):
        for number in range(2):
            for i, task in enumerate(TASKS):
                row = {"task": task, "entries": 9, "score": 1.0, "bytes": 6000 * length}
                rows[key("mixed", length, number, i)] = row
                for policy in POLICIES:
                    for budget, share in (("5%", 0.05), ("50%", 0.5)):
                        more = {
                            "score": float(rng.random() < share),
                            "bytes": share * row["bytes"],
                            "kl": rng.random(),
                            "agreement": share,
                        }
                        more["bytes"] *= 1.2 if policy == "lava" else 1
                        rows[key("mixed", length, number, i, "aware", policy, budget)] = row | more
    folder = tmp_path_factory.mktemp("report")
    (folder / "in.txt").write_text("x")
    header = make_header(
        "eval", ["laprox", "eval", "<b>"], {"seed": 1}, [folder / "in.txt"], {"name": "<i>m</i>.gguf", "fingerprint": "f"}
    )
    page = evaluation_page(Summary(rows.items()), header)
    page.save(folder / "report.html")
    return folder / "report.html"


def test_what_it_says(report):
    text = report.read_text()
    assert "<i>m" not in text and "&lt;i&gt;m" in text  # names are text
    for what in (
        "Question inside the window: 2,000 tokens",
        "keydiff:global",
        "in.txt",
        "along the full cache&#39;s own answers",
    ):
        assert what in text
    assert text.count("<svg") == 2 * 2 * 2  # lengths, charts of at most seven lines, and each for screens and for phones
    assert "Unequal bytes" in text and "lava +20%" in text


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_in_a_browser(browser, report, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith(("file:", "data:")) else None)
    page.goto(report.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("table").count() == 2 * 4 + 1 and page.locator("svg:visible").count() == 4
    assert said == []
    context.close()
