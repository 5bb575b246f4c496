"""The text of a web page: what a reader sees, with its lines, lists and tables."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from laprox.chat.decoding import charset

if TYPE_CHECKING:
    from selectolax.lexbor import LexborNode

_UNSEEN = frozenset(
    "area audio canvas datalist dialog iframe link map meta noembed noframes noscript object param rp script style svg template video".split()
)
_BLOCKS = frozenset(
    "address article aside blockquote body br button caption center dd details dir div dl dt fieldset figcaption figure footer "
    "form frameset h1 h2 h3 h4 h5 h6 header hgroup hr html legend li main menu nav ol optgroup option p pre search section "
    "select summary table tbody textarea tfoot thead title tr ul".split()
)
_OPENINGS = {"li": "- ", **{f"h{n}": "#" * n + " " for n in range(1, 7)}}
_CELLS = ("td", "th")
_IN_LAYOUT = "table, h1, h2, h3, form"
_DEEPEST = 8  # tables in tables that are looked into
_PREFORMATTED = ("pre", "textarea", "listing")
_SPACE = re.compile(r"[ \t\n\r\f]+")
_NOT_DISPLAYED = re.compile(r"(?:^|;)\s*(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))\b", re.IGNORECASE)

_CHARSET = re.compile(
    rb"""<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w.:-]+)|^\s*<\?xml[^>]{0,100}?encoding\s*=\s*["']([\w.:-]+)""",
    re.IGNORECASE,
)
_START = re.compile(
    r"\s*(?:<\?xml[^>]*\?>\s*|<!--.*?-->\s*)*(?:<!doctype\s+html\b|<html[\s>]|<head[\s>]|<body[\s>])",
    re.IGNORECASE | re.DOTALL,
)
_XML_START = re.compile(
    r"\s*<\?xml\b|[^>]{0,200}//DTD XHTML|(?:\s|<!--.*?-->|<![^>]*>)*<html[^>]*\sxmlns\s*=", re.IGNORECASE | re.DOTALL
)
_CLOSED = re.compile(r"<([a-z][\w:.-]*)((?:\s[^<>]*)?)/>", re.IGNORECASE)
_VOID = frozenset("area base br col embed hr img input link meta param source track wbr".split())


def declared_charset(data: bytes) -> str | None:
    """The encoding that a page says it is in; None if it says nothing, or nothing known."""
    found = _CHARSET.search(data[:2048])
    return charset((found[1] or found[2]).decode("ascii")) if found else None


def looks_like_html(text: str) -> bool:
    """Whether a text begins as a web page does."""
    return _START.match(text[:4096]) is not None


def text_of_html(html: str) -> str:
    """Inline elements join, blocks and table rows are lines, and what is hidden is left out."""
    from selectolax.lexbor import LexborHTMLParser

    if _XML_START.match(html[:4096]):  # where <title/> is a whole element, which HTML takes for a start
        html = _CLOSED.sub(lambda tag: tag[0] if tag[1].lower() in _VOID else f"<{tag[1]}{tag[2]}></{tag[1]}>", html)
    writer = _Writer()
    node: LexborNode | None = LexborHTMLParser(html).root
    while node is not None:  # no recursion: pages are nested without limit
        if _is_seen(node):
            writer.start(node)
            if node.child is not None:
                node = node.child
                continue
            writer.end(node)
        while node is not None and node.next is None:
            node = node.parent
            if node is not None:
                writer.end(node)
        node = node.next if node is not None else None
    return writer.text()


def _is_seen(node: LexborNode) -> bool:
    tag = node.tag or ""
    if tag == "-text":
        return True
    if tag in _UNSEEN or not tag or tag.startswith(("-", "!")):
        return False
    attributes = node.attributes
    return "hidden" not in attributes and not _NOT_DISPLAYED.search(attributes.get("style") or "")


def _is_layout(table: LexborNode) -> bool:
    """Whether a table places parts of a page, as old ones do, so that its cells are no values in a row."""
    return table.attributes.get("role") in ("presentation", "none") or any(
        found.mem_id != table.mem_id for found in table.css(_IN_LAYOUT)
    )


class _Writer:
    """Lines of text. Spaces and what opens a line are written when text follows."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._at_start = True  # of a line
        self._space = False
        self._opening = ""  # of the line: a heading's or a list item's
        self._layouts: list[bool] = []  # of the tables that are open: whether it is one
        self._cells = 0  # of the row so far
        self._in_cell = False
        self._preformatted = 0

    def start(self, node: LexborNode) -> None:
        tag = node.tag or ""
        if tag == "-text":
            self._write(node.text_content or "")
            return
        if tag == "table":
            self._break()
            self._layouts.append(len(self._layouts) >= _DEEPEST or _is_layout(node))
        elif tag == "tr":
            self._break()
            self._cells = 0
        elif tag in _CELLS and self._layouts and not self._layouts[-1]:
            self._in_cell = True
            if self._cells:
                self._parts.append("| " if self._at_start else " | ")
                self._at_start = self._space = False
            self._cells += 1
        elif tag in _BLOCKS or tag in _CELLS:
            self._break()
            self._opening = _OPENINGS.get(tag, self._opening)
        if tag in _PREFORMATTED:
            self._preformatted += 1

    def end(self, node: LexborNode) -> None:
        tag = node.tag or ""
        if tag in _PREFORMATTED:
            self._preformatted -= 1
        if tag in _OPENINGS:
            self._opening = ""
        if tag == "table" and self._layouts:
            self._layouts.pop()
        if tag in _CELLS and self._in_cell:
            self._in_cell = False
        elif tag in _BLOCKS or tag in _CELLS:
            self._break()

    def text(self) -> str:
        return "".join(self._parts).strip()

    def _break(self) -> None:
        if self._in_cell:  # a row stays a line
            self._space = True
        elif not self._at_start:
            self._parts.append("\n")
            self._at_start, self._space = True, False

    def _write(self, text: str) -> None:
        if self._preformatted and not self._in_cell:
            self._emit(text)
            self._at_start = text.endswith("\n")
            return
        words = _SPACE.sub(" ", text)
        self._space |= words.startswith(" ")
        if words.strip(" "):
            self._emit(words.strip(" "))
            self._space = words.endswith(" ")

    def _emit(self, text: str) -> None:
        if self._at_start:
            self._parts.append(self._opening)
            self._opening = ""
        elif self._space and not self._parts[-1].endswith("| "):
            self._parts.append(" ")
        self._parts.append(text)
        self._at_start = self._space = False
