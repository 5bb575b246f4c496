"""Documents as text: plain text, Markdown, HTML and PDF; objects in JSON."""

from __future__ import annotations

import codecs
import json
import logging
import re
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from laprox import extras


def read_documents(paths: Sequence[Path]) -> str:
    """The text of several files, each under its name.

    Raises:
        ValueError: A file is missing, unreadable or without text; the message starts with its path.
        MissingExtra: It takes a package that is not installed.
    """
    texts = [read_document(path) for path in paths]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"# {path.name}\n\n{text}" for path, text in zip(paths, texts))


def read_document(path: Path) -> str:
    """The text of one file, by its suffix: .pdf, .html or .htm, and anything else as text.

    Raises:
        ValueError: It is missing, unreadable or without text; the message starts with its path.
        MissingExtra: It takes a package that is not installed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    reader = _READERS.get(path.suffix.lower(), _text)
    try:
        text = reader(data).strip()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not text:
        raise ValueError(f"{path}: {'there is no text in it' if data else 'the file is empty'}")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a .json file.

    Raises:
        ValueError: It can't be read or is no object; the message starts with its path.
    """
    try:
        data = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: not an object")
    return data


def read_jsonl(path: Path, expected: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file, each with "FILE line N" for messages.

    Raises:
        ValueError: It can't be read, is empty, or a line is no object (`expected` says what it should be).
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    if not text.strip():
        raise ValueError(f"{path}: there is nothing in it")
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        source = f"{path} line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{source}: not JSON ({error})") from None
        if not isinstance(data, dict):
            raise ValueError(f"{source}: not an object" + (f"; expected {expected}" if expected else ""))
        yield source, data


def _text(data: bytes) -> str:
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"not {encoding[:6].rstrip('-').upper()} text (byte {error.start})") from None
    if "\0" in text:
        raise ValueError("not text, but binary data")
    return text


def _html(data: bytes) -> str:
    extras.need("documents", "reading HTML")
    from bs4 import BeautifulSoup

    soup = BeautifulSoup(data, "html.parser")
    for hidden in soup(["script", "style", "noscript", "template"]):
        hidden.decompose()
    return re.sub(r"\s*\n\s*", "\n", soup.get_text("\n"))


def _pdf(data: bytes) -> str:
    extras.need("documents", "reading a PDF")
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of every oddity that it gets over
    try:
        pdf = pypdf.PdfReader(BytesIO(data))
        if pdf.is_encrypted and not pdf.decrypt(""):
            raise ValueError("the PDF asks for a password")
        return "\n\n".join(page.extract_text() for page in pdf.pages)
    except ValueError:
        raise
    except Exception as error:  # a broken PDF can make pypdf raise anything
        raise ValueError(f"not a PDF that can be read ({error})") from None


_READERS = {".pdf": _pdf, ".html": _html, ".htm": _html}
