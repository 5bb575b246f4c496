"""`laprox view`, as a user meets it, and `/view` in a chat."""

import re

import pytest
from bs4 import BeautifulSoup
from gguf_factory import CHATML
from test_cli import Terminal, fails, run

FAST = ["-t", "1", "--kv-min-tokens", "64", "--kv-budget", "20%"]


@pytest.fixture(scope="module")
def model(toy):
    return str(toy(chat_template=CHATML, n_ctx_train=4096))


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "notes.txt"
    path.write_text("the quick <b>brown</b> fox jumps over the lazy dog. " * 15)
    return str(path)


def test_in_a_pipe(model, document):
    done = run("view", model, document, *FAST)
    assert done.returncode == 0, done.stderr
    assert "⋯" in done.stdout and "Entries kept" in done.stdout and "\x1b" not in done.stdout
    assert "entries held (20." in done.stderr and "without laprox" in done.stderr


def test_into_files(model, document, tmp_path):
    html, svg = tmp_path / "out.html", tmp_path / "out.svg"
    done = run("view", model, document, "--question", "who <i>?", "--html", html, "--svg", svg, *FAST)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr.splitlines()[1:] == [str(html), str(svg)]
    soup = BeautifulSoup(html.read_text(), "html.parser")
    assert soup.h1.get_text() == f"What {model.rsplit('/')[-1]} remembers of notes.txt"
    assert "with “who <i>?” in view" in soup.find(class_="lead").get_text()
    text = soup.find(id="text").get_text()
    assert "<b>brown</b>" in text and "question" in text and "who <i>?" in text
    picture = BeautifulSoup(svg.read_text(), "xml")
    assert picture.svg and "<b>brown</b>" in picture.get_text().replace("\xa0", " ") and "Entries kept" in picture.get_text().replace("\xa0", " ")


def test_what_each_further_question_brings_back(model, document, tmp_path):
    """In the terminal, the picture and the page: a section for each, in the order in which they were asked."""
    html, svg = tmp_path / "out.html", tmp_path / "out.svg"
    asked = [word for q in ("who jumps?", "the <i>lazy</i> what?", "who jumps?") for word in ("-q", q)]
    piped = run("view", model, document, *asked, *FAST)
    assert piped.returncode == 0, piped.stderr
    text = piped.stdout
    places = [text.index("Entries kept"), text.index("What “the <i>lazy</i> what?” brought back"), text.index("What “who jumps?” brought back")]
    assert places == sorted(places) and all(text.count(line) == 2 for line in ("held before", "came back ", "held now"))
    came = [int(n.replace(",", "")) for n in re.findall(r"brought back: ([\d,]+) entries", text)]
    assert len(came) == 2 and min(came) > 0
    assert [int(n.replace(",", "")) for n in re.findall(r"”: ([\d,]+) entries came back", piped.stderr)] == came

    done = run("view", model, document, *asked, "--html", html, "--svg", svg, *FAST)
    assert done.returncode == 0, done.stderr
    soup = BeautifulSoup(html.read_text(), "html.parser")
    assert [h.get_text() for h in soup.find_all("h2") if "brought" in h.get_text()] == [
        "What “the <i>lazy</i> what?” brought back", "What “who jumps?” brought back",
    ]  # fmt: skip
    assert len(soup.find_all(class_="shaded")) == 3 and len(soup.find_all(id="text")) == 1
    assert "“who jumps?” in view" in soup.find(class_="lead").get_text().replace("with ", "")
    picture = BeautifulSoup(svg.read_text(), "xml").get_text().replace("\xa0", " ")
    assert "brought back" in picture and "came back to" in picture


def test_without_an_archive_the_text_is_read_again_for_each_question(model, document):
    done = run("view", model, document, "-q", "who jumps?", "-q", "the lazy what?", "--kv-archive", "off", *FAST)
    assert done.returncode == 0, done.stderr
    assert "What “the lazy what?” brought back" in done.stdout


def test_a_short_text_is_kept(model, document):
    done = run("view", model, document, "-t", "1", "--kv-min-tokens", "3000")
    assert done.returncode == 0, done.stderr
    assert "<|im_start|>" in done.stdout and "Nothing was evicted: the text is within the budget" in done.stderr
    done = run("view", model, document, "-t", "1", "--kv-policy", "full")
    assert "Nothing is evicted: the policy is full." in done.stderr


def test_what_is_wrong_is_said_before_the_long_work(model, document, tmp_path):
    assert "name a document" in fails("view", model, status=2)
    assert fails("view", model, document, "--html", tmp_path / "no" / "x.html").endswith(
        "can't be written: No such file or directory"
    )
    assert fails("view", model, document, "--svg", tmp_path / "x.png").endswith("x.png: the picture is an .svg file")
    assert "there is nothing to show" in fails("view", model, document, "--kv-policy", "off")
    assert fails("view", model, tmp_path / "none.txt").endswith("none.txt: No such file or directory")
    assert fails("view", tmp_path / "none.gguf", document).endswith("none.gguf: no such file")
    assert "--kv-budget" in fails("view", model, document, "--kv-budget", "lots")
    (tmp_path / "d.kv").write_bytes(b"GGUF\3\0\0\0 general.architecture laprox-document")
    assert "d.kv: a text that `laprox read` has read; accepted by `laprox ask` and `laprox chat -d`" in fails("view", model, tmp_path / "d.kv")
    assert fails("view", model, document, "--html", tmp_path / "x.txt").endswith("x.txt: the page is an .html file")


def test_no_page_takes_the_place_of_what_is_read(model, tmp_path):
    page, link = tmp_path / "page.html", tmp_path / "link.html"
    page.write_text("<p>Some text</p>" * 40)
    link.symlink_to(page)
    for same in (page, link, f"{tmp_path}/./page.html"):
        assert "; name another output" in fails("view", model, page, "--html", same, *FAST)
    t = Terminal("chat", model, "-d", page, *FAST)
    try:
        t.say(f"/view {page}")
        t.expect("; name another output")
        t.say(f"/view {tmp_path}/notes.txt")
        t.expect("notes.txt: the page is an .html file")
    finally:
        t.kill()
    assert page.read_text() == "<p>Some text</p>" * 40 and len(list(tmp_path.iterdir())) == 2


def test_in_a_chat(model, document, tmp_path):
    terminal = Terminal(
        "chat", model, "-d", document, "-t", "1", "--temp", "0", "-n", "8", "--kv-min-tokens", "64", "--kv-budget", "20%"
    )
    try:
        terminal.expect("ctrl-D quits")
        terminal.say("/budget")
        terminal.expect(" entries held, ")
        assert "/reread" not in terminal.expect("> ")
        terminal.press(b"/view\n")
        without = re.search(r"[\d.]+ [KM]iB $", terminal.expect("without laprox"))[0]
        terminal.expect("Nothing has been compressed yet: that comes with the first question")
        terminal.say("who?")
        assert terminal.expect("without laprox").endswith(without)
        terminal.say("/stats")
        assert terminal.expect("without laprox").endswith(without)
        terminal.say("/view")
        shown = terminal.expect("without laprox")
        assert shown.endswith(without)
        assert "Where in the text" in shown and "Entries kept" in shown
        terminal.say(f"/view {tmp_path}/out.html")
        terminal.expect("without laprox")
        terminal.expect("out.html")
        terminal.say(f"/view {tmp_path}/no/out.html")
        terminal.expect("can't be written")
        assert "who?" in BeautifulSoup((tmp_path / "out.html").read_text(), "html.parser").find(id="text").get_text()
    finally:
        terminal.kill()
