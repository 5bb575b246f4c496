"""Bytes as text, whatever their encoding, and text without what drives a terminal."""

from __future__ import annotations

import codecs
import contextlib
import re
import unicodedata
from typing import NamedTuple

from laprox.extras import need

_BOMS = {  # UTF-32 first: its mark begins with UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
_USUAL_NAMES = {"cp1252": "windows-1252", "cp932": "Shift-JIS"}
_SAMPLE = 1 << 16  # bytes that show an encoding

_BINARY = 0.02  # the share of control characters that no text has
_CONTROL = frozenset(range(32)) - frozenset(b"\t\n\v\f\r\b\x1b")  # that no program writes into text

# What a terminal obeys: ESC [ ... letter, ESC ] ... BEL, and the shorter ones, with their one-byte forms.
_ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x9c]{0,4096}(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
_OVERSTRIKE = re.compile(r".\x08")  # bold and underlined, as man pages have it


class Decoded(NamedTuple):
    """Text, and what it was read as. `note` is a remark for the reader where this was a guess or something was lost."""

    text: str
    note: str


def decode(data: bytes, declared: str | None = None) -> Decoded:
    """Text in UTF-8, in what its byte-order mark or `declared` says, or else in the likeliest encoding.

    Raises:
        ValueError: It is binary data, or no encoding is likely.
        MissingExtra: It takes a package that is not installed to guess.
    """
    for mark, encoding in _BOMS.items():
        if data.startswith(mark):
            return _replacing(data[len(mark) :], encoding)
    if b"\x1b$B" in data or b"\x1b$@" in data:  # Japanese e-mail's, in ASCII with escape sequences
        with contextlib.suppress(UnicodeDecodeError):
            return Decoded(data.decode("iso2022_jp"), "")
    if (wide := _wide_encoding(data)) is not None:
        return _replacing(data, wide)._replace(note=f"read as {wide.upper()}")
    try:
        return Decoded(_checked(data.decode("utf-8")), "")
    except UnicodeDecodeError as error:
        if error.reason == "unexpected end of data" and _is_cut(data, error.start):
            return _replacing(data, "utf-8")
        if declared is not None:
            return _replacing(data, declared)
        return _guessed(data, error)


def charset(name: str) -> str | None:
    """Python's name of an encoding that a file claims to be in; None if there is no such encoding."""
    try:
        found = codecs.lookup(name.strip())
    except (LookupError, ValueError):
        return None
    if not found._is_text_encoding:  # "hex", "zlib"
        return None
    return "cp1252" if found.name in ("ascii", "iso8859-1") else found.name  # as browsers do


def clean(text: str) -> str:
    """Without escape sequences and control characters, byte-order marks and lone surrogates; lines end with \\n."""
    text = whole(text).replace("\r\n", "\n").replace("\r", "\n")
    text = _OVERSTRIKE.sub("", _ESCAPES.sub("", text))
    return printable(text.replace("\f", "\n").replace("\v", "\n").replace("\ufeff", ""))


def whole(text: str) -> str:
    """With halves of characters (lone surrogates) replaced: no tokenizer takes them."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def printable(text: str) -> str:
    """Without control characters and lone surrogates, a piece of a text at a time: nothing of it drives a terminal."""
    if text.isprintable():
        return text
    return "".join(
        "\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc"
    )


def _checked(text: str) -> str:
    if text and sum(ord(c) in _CONTROL for c in text[:_SAMPLE]) > max(1, _BINARY * len(text[:_SAMPLE])):
        raise ValueError("not text, but binary data")
    return text


def _replacing(data: bytes, encoding: str) -> Decoded:
    before = data.decode(encoding, "ignore").count("\ufffd")
    text = _checked(data.decode(encoding, "replace"))
    n = text.count("\ufffd") - before
    at_end = text.endswith("\ufffd") and n == 1
    if n == 0:
        return Decoded(text, "")
    return Decoded(
        text,
        "cut off within its last character"
        if at_end
        else f"{n:,} characters are not {encoding.upper()} and were replaced",
    )


def _is_cut(data: bytes, start: int) -> bool:
    """Whether the last bytes are the start of a UTF-8 character, rather than one of another encoding ("caf\\xe9")."""
    return len(data) - start > 1 or data[start] in b"\xc2\xc3\xe2\xf0" or not data[:start].isascii()


def _wide_encoding(data: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: of the encodings that give text, the one that gives most spaces and ASCII."""
    if b"\0" not in data[:_SAMPLE]:
        return None
    best: str | None = None
    most = 0.02
    for encoding in _WIDE:
        width = 4 if encoding.startswith("utf-32") else 2
        sample = data[: min(len(data), _SAMPLE) // width * width]
        text = sample.decode(encoding, "replace")
        if text.count("\ufffd") > 1 or any(ord(c) in _CONTROL for c in text):
            continue
        common = sum(" " <= c <= "~" or c in "\n\r\t\u3000\u3001\u3002\uff0c" for c in text) / max(1, len(text))
        if common > most:
            best, most = encoding, common
    return best


def _guessed(data: bytes, error: UnicodeDecodeError) -> Decoded:
    text = data.decode("utf-8", "replace")
    n_bad = text.count("\ufffd")
    if sum(c > "\x7f" for c in text) > 10 * n_bad:  # by chance, no other encoding makes so much UTF-8
        return Decoded(_checked(text), f"{n_bad:,} characters are not UTF-8 and were replaced")

    reason = f"not UTF-8 text (byte {error.start})"
    if sum(data[:_SAMPLE].count(byte) for byte in _CONTROL) > max(1, _BINARY * len(data[:_SAMPLE])):
        raise ValueError(f"{reason}, but binary data")
    need("documents", "reading text that is not UTF-8")
    encoding = _likeliest_encoding(data)
    if encoding is None:
        raise ValueError(f"{reason}, nor in an encoding that can be told; convert it: iconv -f ENCODING -t UTF-8")
    name = _USUAL_NAMES.get(encoding, encoding.replace("_", "-"))
    return Decoded(_checked(data.decode(encoding, "replace")), f"not UTF-8; read as {name}")


def _likeliest_encoding(data: bytes) -> str | None:
    from charset_normalizer import from_bytes

    matches = list(from_bytes(data))
    if not matches:
        return None
    best = matches[0]
    level = [m for m in matches if m.chaos <= best.chaos + 0.01 and m.coherence >= best.coherence - 0.05]
    # Where several fit as well, what is more usual: kana are Japanese, and Western text is windows-1252.
    for match in level:
        if "Hiragana" in match.alphabets:
            return match.encoding
    if not best.multi_byte_usage and any("cp1252" in m.could_be_from_charset for m in level):
        return "cp1252"
    return best.encoding
