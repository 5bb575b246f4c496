"""Self-contained HTML pages: no network, light and dark, for screens and phones. Everything given as text is escaped."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from laprox.files import replacing
from laprox.viz.chart import NARROW, WIDE, Chart
from laprox.viz.text import visible

_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("laprox.viz"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
    finalize=lambda value: visible(value) if type(value) is str else value,
)


def template(name: str, **values: Any) -> Markup:
    """A file of viz/templates, filled in. Values that aren't Markup are escaped."""
    return Markup(_TEMPLATES.get_template(name).render(**values))


@dataclass
class _Section:
    heading: str
    parts: list[Markup] = field(default_factory=list)


class Page:
    """A page that is filled from top to bottom, then saved.

        page = Page("Which policy?", "model.gguf on report.pdf")
        page.callout("Don't compress this model below 20%.")
        page.section("Accuracy")
        page.figure(charts.against_bytes(...), "Facts found, with standard errors.")
        page.table(["policy", "bytes"], [["laprox", "1.2 MiB"]])
        page.save("report.html")

    Whatever is given may come from a document or a file name: text is shown as it is, never read as HTML. Only `html` isn't
    escaped, for what other modules of laprox.viz made.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        """Begin.

        Args:
            title: The heading, and the browser's title.
            lead: What it is about, in a line or two under the heading.
        """
        self._title = title
        self._lead = lead
        self._sections = [_Section("")]
        self._scripts: list[str] = []

    def section(self, heading: str) -> None:
        """Begin a section: what follows goes into it."""
        self._sections.append(_Section(heading))

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add("text", text=text)

    def note(self, text: str) -> None:
        """A paragraph in small print: how something was measured, what it can't show."""
        self._add("note", text=text)

    def callout(self, text: str) -> None:
        """The sentence to take home."""
        self._add("callout", text=text)

    def facts(self, facts: Mapping[str, str]) -> None:
        """A few numbers that everyone should see: {"entries held": "1,234 of 20,000"}."""
        self._add("facts", facts=facts)

    def details(self, facts: Mapping[str, str], summary: str = "How this was made") -> None:
        """Many facts, folded away until they are asked for: settings, versions, hashes."""
        self._add("details", facts=facts, summary=summary)

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        """A table, as text as `str` gives it. None is an empty cell.

        Columns without a letter at their cells' start (numbers, "83 ± 8", "1.2 MiB", "-") are set flush right; in a column with
        a text of more than 30 characters, lines are broken. A wide table scrolls on a narrow screen, its first column in place.

        Raises:
            ValueError: A row isn't as long as the header.
        """
        texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
        for row in texts:
            if len(row) != len(header):
                raise ValueError(f"a row of {len(row)} cells under a header of {len(header)}: {row}")
        columns = list(zip(*texts)) or [()] * len(header)
        kinds = [
            "prose" if _longest(c) > 30 else "number" if c and not any(text[:1].isalpha() for text in c) else "" for c in columns
        ]
        self._add("table", header=header, rows=texts, caption=caption, kinds=kinds)

    def figure(self, chart: Chart, caption: str = "") -> None:
        """A chart, drawn once for screens and once for phones."""
        self._add("figure", wide=Markup(chart.svg(WIDE)), narrow=Markup(chart.svg(NARROW)), caption=caption, alt=chart.alt)

    def html(self, html: Markup, script: str = "") -> None:
        """Markup that is not escaped, and a script that runs when the page is there. Never put in what came from outside.

        The page's content security policy lets these scripts run and nothing else.
        """
        self._sections[-1].parts.append(html)
        if script:
            self._scripts.append(script)

    def render(self) -> str:
        """The page."""
        hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in self._scripts]
        return _TEMPLATES.get_template("page.html").render(
            title=self._title,
            lead=self._lead,
            sections=self._sections,
            scripts=[Markup(script) for script in self._scripts],
            script_sources=" ".join(f"'sha256-{h}'" for h in hashes) or "'none'",
        )

    def save(self, path: str | Path) -> None:
        """Write the page, whole or not at all.

        Raises:
            OSError: It can't be written.
        """
        with replacing(Path(path)) as unfinished, open(unfinished, "w", encoding="utf-8", newline="\n") as file:
            file.write(self.render())

    def _add(self, part: str, **values: Any) -> None:
        self._sections[-1].parts.append(Markup(getattr(_TEMPLATES.get_template("parts.html").module, part)(**values)))


def _longest(texts: Sequence[str]) -> int:
    return max(map(len, texts), default=0)
