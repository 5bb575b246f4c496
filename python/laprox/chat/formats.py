"""The text of a file by what is in it, whatever its name: plain text, HTML, PDF, e-mail, RTF, Word, PowerPoint, EPUB."""

from __future__ import annotations

import email
import email.policy
import logging
import posixpath
import re
import zipfile
from collections.abc import Callable, Iterator
from email.message import EmailMessage
from io import BytesIO
from typing import Any
from urllib.parse import unquote

from laprox.chat.decoding import Decoded, charset, clean, decode
from laprox.chat.webpage import declared_charset, looks_like_html, text_of_html
from laprox.extras import need

LARGEST = 1 << 30  # bytes that a part of an archive may unpack to

GGUF = b"GGUF"

_HTML_SUFFIXES = (".html", ".htm", ".xhtml", ".xht")

# What other files begin with, and what to do about it.
_REFUSED = {
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an older Office file (.doc, .xls or .ppt); save it as .docx, .csv or .pptx",
    b"\x89PNG\r\n": "a picture (PNG), and text in pictures is not read",
    b"\xff\xd8\xff": "a picture (JPEG), and text in pictures is not read",
    b"GIF8": "a picture (GIF), and text in pictures is not read",
    b"II*\0": "a picture (TIFF), and text in pictures is not read",
    b"MM\0*": "a picture (TIFF), and text in pictures is not read",
    b"%!PS": "PostScript; make a PDF of it (ps2pdf)",
    b"\x1f\x8b": "compressed (gzip); unpack it",
    b"BZh": "compressed (bzip2); unpack it",
    b"\xfd7zXZ\0": "compressed (xz); unpack it",
    b"\x28\xb5\x2f\xfd": "compressed (zstd); unpack it",
    b"7z\xbc\xaf\x27\x1c": "an archive (7z); unpack it",
    b"Rar!\x1a\x07": "an archive (RAR); unpack it",
    GGUF: "a model (GGUF), not a document",
    b"\x7fELF": "a program, not a document",
    b"SQLite format 3\0": "a database (SQLite); export what you want to ask about as text",
}


def was_read(data: bytes) -> bool:
    """Whether a file is one that `laprox read` wrote, by how it begins: 256 bytes tell."""
    return data.startswith(GGUF) and b"laprox-document" in data[:256]


def text_of(data: bytes, suffix: str = "") -> Decoded:
    """The text of a file's bytes. `suffix`, ".html" say, decides only where the content leaves it open.

    Raises:
        ValueError: It is damaged, locked, binary, or of a kind that isn't read; says which.
        MissingExtra: It takes a package that is not installed.
    """
    if was_read(data):
        raise ValueError("a text that `laprox read` has read; accepted by `laprox ask` and `laprox chat -d`, or name the files that it was made of")
    for start, what in _REFUSED.items():
        if data.startswith(start):
            raise ValueError(what)
    if b"%PDF-" in data[:1024]:
        return Decoded(clean(_pdf(data)), "")
    if data.startswith(b"PK\x03\x04"):
        return Decoded(clean(_zip(data)), "")
    if data.lstrip()[:5] == b"{\\rtf":
        return Decoded(clean(_rtf(data)), "")
    if suffix == ".pdf":
        raise ValueError("not a PDF that can be read (it doesn't begin as one)")
    if suffix == ".eml" or _looks_like_email(data):
        return Decoded(clean(_email(data)), "")
    declared = declared_charset(data)
    text, note = decode(data, declared)
    if suffix in _HTML_SUFFIXES or looks_like_html(text):
        return Decoded(clean(_html(text)), note if declared is None else "")
    return Decoded(clean(text), note)


def _html(text: str) -> str:
    need("documents", "reading HTML")
    return text_of_html(text)


def _pdf(data: bytes) -> str:
    need("documents", "reading a PDF")
    import pypdf
    from pypdf.errors import DependencyError, FileNotDecryptedError, WrongPasswordError

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it tells of every oddity that it gets over
    locked = ValueError("the PDF asks for a password; save it without one")
    try:
        pdf = pypdf.PdfReader(BytesIO(data))
        if pdf.is_encrypted and not pdf.decrypt(""):
            raise locked
        return "\n\n".join(page.extract_text() for page in pdf.pages)
    except (FileNotDecryptedError, WrongPasswordError):
        raise locked from None
    except DependencyError:
        raise ValueError('an encrypted PDF takes the package cryptography: pip install "laprox[documents]"') from None
    except ValueError as error:
        if error is locked:
            raise
        raise _damaged("PDF", error) from None
    except Exception as error:  # a broken PDF can make pypdf raise anything
        raise _damaged("PDF", error) from None


def _zip(data: bytes) -> str:
    try:
        archive = zipfile.ZipFile(BytesIO(data))
    except (zipfile.BadZipFile, NotImplementedError, OSError) as error:
        raise ValueError(f"a damaged archive ({error})") from None
    with archive:
        names = set(archive.namelist())
        if any(info.file_size > LARGEST for info in archive.infolist()):
            raise ValueError("an archive that unpacks to gigabytes; unpack it and choose what to read")
        for part, (what, reader) in _ARCHIVES.items():
            if part in names:
                need("documents", f"reading {what}")
                return _guarded(what, lambda: reader(data, archive))
        kind = archive.read("mimetype")[:100].decode("ascii", "replace") if "mimetype" in names else ""
    if "xl/workbook.xml" in names or kind.endswith("opendocument.spreadsheet"):
        raise ValueError("a spreadsheet; save it as .csv")
    if "opendocument" in kind:
        raise ValueError("an OpenDocument file; save it as .docx, .pptx or .pdf")
    raise ValueError("an archive (ZIP); unpack it")


def _word(data: bytes, _archive: zipfile.ZipFile) -> str:
    import mammoth

    return text_of_html(mammoth.convert_to_html(BytesIO(data), convert_image=lambda image: []).value)


def _powerpoint(data: bytes, _archive: zipfile.ZipFile) -> str:
    from pptx import Presentation

    slides = []
    for number, slide in enumerate(Presentation(BytesIO(data)).slides, 1):
        lines = list(_lines_of(slide.shapes))
        if slide.has_notes_slide and slide.notes_slide.notes_text_frame is not None:
            lines += ["Notes:", slide.notes_slide.notes_text_frame.text]
        slides.append("\n".join([f"# Slide {number}", *filter(str.strip, lines)]))
    return "\n\n".join(slides)


def _lines_of(shapes: Any) -> Iterator[str]:
    for shape in shapes:
        if hasattr(shape, "shapes"):  # a group
            yield from _lines_of(shape.shapes)
        elif getattr(shape, "has_table", False):
            for row in shape.table.rows:
                yield " | ".join(" ".join(cell.text.split()) for cell in row.cells)
        elif shape.has_text_frame:
            yield shape.text_frame.text


def _epub(_data: bytes, archive: zipfile.ZipFile) -> str:
    from selectolax.lexbor import LexborHTMLParser

    def page(name: str) -> str:
        found = archive.read(name)
        return decode(found, declared_charset(found)).text

    def elements(xml: str, tag: str) -> list[dict[str, str | None]]:
        return [node.attributes for node in LexborHTMLParser(re.sub(r"<(/?)\w+:", r"<\1", xml)).css(tag)]

    package = elements(page("META-INF/container.xml"), "rootfile")[0]["full-path"] or ""
    listing = page(package)
    files = {item["id"]: item["href"] for item in elements(listing, "item") if "id" in item and "href" in item}
    if "META-INF/encryption.xml" in archive.namelist() and "EncryptedData" in page("META-INF/encryption.xml"):
        readable = [name for name in archive.namelist() if name.endswith(("html", "htm"))]
        if not any(looks_like_html(page(name)) for name in readable):
            raise ValueError("an e-book with copy protection (DRM)")
    chapters = []
    for reference in elements(listing, "itemref"):
        href = files.get(reference.get("idref"))
        if href is not None:
            chapters.append(
                text_of_html(page(posixpath.normpath(posixpath.join(posixpath.dirname(package), unquote(href)))))
            )
    return "\n\n".join(filter(None, chapters))


_ARCHIVES: dict[str, tuple[str, Callable[[bytes, zipfile.ZipFile], str]]] = {
    "word/document.xml": ("a Word document", _word),
    "ppt/presentation.xml": ("a PowerPoint presentation", _powerpoint),
    "META-INF/container.xml": ("an e-book (EPUB)", _epub),
}


def _rtf(data: bytes) -> str:
    need("documents", "reading RTF")
    from striprtf.striprtf import rtf_to_text

    return _guarded("RTF", lambda: rtf_to_text(data.decode("latin-1"), errors="replace"))


_HEADERS = ("From", "To", "Cc", "Date", "Subject")
_HEADER_LINE = re.compile(rb"[!-9;-~]+:[ \t]")
_MAIL_ONLY = re.compile(
    rb"^(?:MIME-Version|Message-ID|Received|Return-Path|Delivered-To):", re.IGNORECASE | re.MULTILINE
)


def _looks_like_email(data: bytes) -> bool:
    head = re.split(rb"\r?\n\r?\n", data[:65536], maxsplit=1)[0]
    lines = head.splitlines()
    is_header = lines and all(
        _HEADER_LINE.match(line) or line[:1] in (b" ", b"\t") or line.endswith(b":") for line in lines
    )
    return bool(is_header and re.search(rb"^From:", head, re.IGNORECASE | re.MULTILINE) and _MAIL_ONLY.search(head))


def _email(data: bytes) -> str:
    message = email.message_from_bytes(data, policy=email.policy.default)
    assert isinstance(message, EmailMessage)
    return _guarded("e-mail", lambda: _message_text(message))


def _message_text(message: EmailMessage) -> str:
    lines = [f"{name}: {message[name]}" for name in _HEADERS if message[name]]
    body = message.get_body(("plain", "html"))
    if body is not None:
        payload = body.get_payload(decode=True)
        content = payload if isinstance(payload, bytes) else b""
        named = body.get_content_charset()
        text = decode(content, charset(named) if named else None).text if content else ""
        lines += ["", _html(text) if body.get_content_subtype() == "html" else text.strip()]
    for part in message.iter_attachments():
        if part.get_content_type() == "message/rfc822":
            inner = part.get_payload(0) if part.is_multipart() else None
            lines += ["", _message_text(inner)] if isinstance(inner, EmailMessage) else []
        else:
            lines += ["", f"(attachment, not read: {part.get_filename() or part.get_content_type()})"]
    return "\n".join(lines)


def _guarded(what: str, read: Callable[[], str]) -> str:
    try:
        return read()
    except (ImportError, MemoryError):
        raise
    except ValueError as error:
        raise error if str(error).startswith(("an e-book", "not text")) else _damaged(what, error) from None
    except Exception as error:  # what is damaged can make a reader raise anything
        raise _damaged(what, error) from None


def _damaged(what: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()) or type(error).__name__
    article = "" if what[:2] in ("a ", "an", "RT") else "an " if what[0] in "e" else "a "
    return ValueError(f"not {article}{what} that can be read ({reason[:200]})")
