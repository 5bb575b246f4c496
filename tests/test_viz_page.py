"""Pages: self-contained, and whatever is put in is text."""

import base64
import hashlib
import re

import pytest
from bs4 import BeautifulSoup
from markupsafe import Markup

from laprox.viz.charts import Line, against_bytes
from laprox.viz.page import Page

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(2)>&amp; {{ 7 * 7 }} \' \x1b[31m \u202eevil שלום 🦊'
SHOWN = HOSTILE.replace("\x1b", "\u241b").replace("\u202e", "\ufffd")


def full_page():
    page = Page(HOSTILE, HOSTILE)
    page.text(HOSTILE)
    page.callout(HOSTILE)
    page.facts({HOSTILE: HOSTILE})
    page.section(HOSTILE)
    page.note(HOSTILE)
    page.figure(against_bytes([Line(HOSTILE, [2**20, 2**21], [0.5, 0.7])], title=HOSTILE), HOSTILE)
    page.table([HOSTILE, "b"], [[HOSTILE, 1], [None, "1.2 MiB"]], HOSTILE)
    page.table([f"column {i}" for i in range(30)], [["many"] * 30], "a caption " * 40)
    page.details({HOSTILE: HOSTILE}, HOSTILE)
    page.html(Markup("<p id=ours>…</p>"), 'document.getElementById("ours").textContent = "it ran";')
    return page


def test_text_is_never_html():
    soup = BeautifulSoup(full_page().render(), "html.parser")
    assert len(soup.find_all("script")) == 1 and not soup.find("img")
    for element in (
        soup.title,
        soup.h1,
        soup.h2,
        soup.dt,
        soup.dd,
        soup.summary,
        soup.td.parent.th,
        *soup.find_all("p")[:-1],
        *soup.find_all("figcaption")[:2],
    ):
        assert element.get_text() == SHOWN, element


def security_policy(html):
    return BeautifulSoup(html, "html.parser").find("meta", {"http-equiv": "Content-Security-Policy"})["content"]


def test_nothing_comes_from_elsewhere():
    html = full_page().render()
    soup = BeautifulSoup(html, "html.parser")
    policy = security_policy(html)
    script = soup.script.string
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    addresses = [tag[name] for tag in soup.find_all() for name in ("src", "href", "xlink:href") if tag.has_attr(name)]
    assert all(a.startswith(("data:", "#")) for a in addresses)
    assert not re.search(r"@import|url\((?!#)", html)
    assert "script-src 'none'" in security_policy(Page("no script").render())


def test_the_same_page_is_the_same_file():
    assert full_page().render() == full_page().render()


def test_tables():
    page = Page("t")
    page.table(["policy", "bytes", "right", "answer"], [["laprox", "1.2 MiB", "83 ± 8%", "a " * 20], ["full", 12, None, ""]])
    soup = BeautifulSoup(page.render(), "html.parser")
    assert [th["class"] for th in soup.thead.find_all("th")] == [[], ["number"], ["number"], ["prose"]]
    assert [cell.get_text() for cell in soup.find_all("tr")[2]] == ["full", "12", "", ""]
    with pytest.raises(ValueError, match="a row of 1 cells under a header of 2"):
        page.table(["a", "b"], [["1"]])
    page.table(["nothing"], [])


def test_saved_whole_or_not_at_all(tmp_path):
    path = tmp_path / "page.html"
    Page("first").save(path)
    before = path.read_text()
    broken = Page("second")
    broken._sections = None
    with pytest.raises(TypeError):
        broken.save(path)
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        Page("t").save(tmp_path / "missing" / "page.html")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
def test_in_a_browser(browser, tmp_path, scheme, width):
    full_page().save(tmp_path / "page.html")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, said, asked = context.new_page(), [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    assert page.inner_text("#ours") == "it ran"
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert page.evaluate("document.documentElement.scrollWidth") == width  # nothing stands out to the side
    light = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    assert [page.locator(f".chart .{which}").is_visible() for which in ("wide", "narrow")] == [width > 640, width <= 640]
    context.close()
