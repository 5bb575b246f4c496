"""Web pages as a reader sees them."""

import pytest

from laprox.chat.reading import read_document
from laprox.chat.webpage import text_of_html


@pytest.mark.parametrize(
    "html, text",
    [
        ("<p>the code is 48<b>21</b>.", "the code is 4821."),
        ("H<sub>2</sub>O and un<i>believ</i>able", "H2O and unbelievable"),
        ("<p>one <b>two</b> three</p>", "one two three"),
        ("<p>one<b> two </b>three", "one two three"),
        ("a<br>b<br/>c", "a\nb\nc"),
        ("<p>one</p><p>two</p>", "one\ntwo"),
        ("<header>one</header><main>two<aside>three</aside></main>", "one\ntwo\nthree"),
        ("a&nbsp;b &lt;i&gt; &#x41;", "a\xa0b <i> A"),
        ("a\n   b\t c", "a b c"),
        ("<pre>a  b\n  c</pre>d", "a  b\n  c\nd"),
        ("<h2>Head</h2>text<h3></h3><p>more", "## Head\ntext\nmore"),
        ("<ul><li>one<li><p>two</p><li></ul>three", "- one\n- two\nthree"),
        (
            "<label>Name</label> <span>Ada</span><button>Send</button><select><option>A<option>B</select>",
            "Name Ada\nSend\nA\nB",
        ),
        ("one<!-- two -->three", "onethree"),
    ],
)
def test_inline_elements_join_and_blocks_break(html, text):
    assert text_of_html(html) == text


@pytest.mark.parametrize(
    "html, text",
    [
        ("<table><tr><th>Name<th>Code<tr><td>Ada<td>48<b>21</b></table>", "Name | Code\nAda | 4821"),
        ("<table><tr><td><p>Ada</p><p>Lovelace</p></td><td><div>48</div></td></tr></table>", "Ada Lovelace | 48"),
        ("<table><tr><td></td><td>b</td><td></td></tr><tr><td>a</td></tr></table>x", "| b | \na\nx"),
        ("<table><tr><td>a<br>b</td><td><ul><li>c</ul></td></tr></table>", "a b | c"),
        ("<table><tr><td><h1>Page</h1><p>one</p><p>two</p></td><td>menu</td></tr></table>", "# Page\none\ntwo\nmenu"),
        ("<table><tr><td><table><tr><td>a</td><td>b</td></tr></table></td></tr></table>", "a | b"),
        ("<td>a</td><td>b</td>", "ab"),  # no table: HTML drops the tags
    ],
)
def test_tables_keep_rows(html, text):
    assert text_of_html(html) == text


@pytest.mark.parametrize(
    "hidden",
    [
        "<p hidden>no",
        "<p hidden=''>no</p>",
        '<span style="color: red; DISPLAY : none !important">no</span>',
        '<div style="visibility:hidden">no</div>',
        "<svg><title>no</title><text>no</text></svg>",
        "<template><p>no</p></template>",
        "<script>no</script>",
        "<style>no</style>",
        "<noscript>no</noscript>",
        "<iframe>no</iframe>",
        "<video>no</video>",
        "<dialog>no</dialog>",
        "<div hidden><p>no<div><p>no</div></div>",
        "<!-- <p>no</p> -->",
    ],
)
def test_what_is_hidden_is_left_out(hidden):
    assert text_of_html(f"<p>one</p>{hidden}<p>two</p>") == "one\ntwo"


def test_what_looks_hidden_and_is_not():
    assert (
        text_of_html(
            '<p style="display:block">a</p><p style="--my-display:none">b</p><details><summary>c</summary>d</details>'
        )
        == "a\nb\nc\nd"
    )


XHTML = '<?xml version="1.0"?>\n<html xmlns="http://www.w3.org/1999/xhtml"><head><title/><script src="a.js"/></head><body><a id="x"/>text<br/>more</body></html>'


@pytest.mark.parametrize("name", ["a.xhtml", "a.txt", "a", "a.html"])
@pytest.mark.parametrize(
    "page, text",
    [
        (XHTML, "text\nmore"),
        ("<!DOCTYPE html>\n<title>T</title><script>var x</script><p>text", "T\ntext"),
        ("<!-- saved -->\n<HTML lang=en><body>text", "text"),
    ],
)
def test_pages_are_recognised_by_content(tmp_path, name, page, text):
    path = tmp_path / name
    path.write_text(page)
    assert read_document(path) == text


def test_text_about_html_is_no_page(tmp_path):
    path = tmp_path / "README.md"
    path.write_text('<p align="center">Title</p>\n\nWrite `<html>` first.')
    assert read_document(path) == path.read_text()


@pytest.mark.parametrize(
    "head, encoding",
    [
        ('<meta charset="windows-1251">', "cp1251"),
        ("<meta http-equiv=Content-Type content='text/html; charset=Shift_JIS'>", "shift_jis"),
        ('<?xml version="1.0" encoding="ISO-8859-1"?><html>', "latin-1"),
        ("<meta charset=nonsense>", "utf-8"),
        ("<meta charset=windows-1252>", "utf-8"),  # saved by a browser, in UTF-8, as it was
        ("<meta charset=hex>", "utf-8"),
        ("<meta charset=iso-2022-jp>", "iso2022_jp"),
    ],
)
def test_pages_in_the_encoding_they_say(tmp_path, head, encoding):
    text = {"cp1251": "Привет, мир", "shift_jis": "番号は四八二一", "iso2022_jp": "番号は四八二一"}.get(
        encoding, "café Größe"
    )
    path = tmp_path / "a.html"
    path.write_bytes(f"{head}<p>{text}</p>".encode(encoding))
    assert read_document(path) == text


def test_deeply_nested_pages_are_read():
    assert text_of_html("<div>" * 20000 + "<p>deep" + "<b>" * 2000 + "er") == "deeper"
    assert text_of_html("<table><tr><td>" * 300 + "x") == "x"
