"""Documents as text, and objects in JSON, from files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from laprox.chat.decoding import printable, whole
from laprox.chat.formats import text_of


def read_documents(paths: Sequence[Path], note: Callable[[str], None] = lambda _: None) -> str:
    """The text of several files, each under its name. `note` is told what a reader should know: "FILE: read as Shift-JIS".

    Raises:
        ValueError: A file is missing, unreadable or without text; the message starts with its path.
        MissingExtra: It takes a package that is not installed.
    """
    texts = [read_document(path, note) for path in paths]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"# {printable(path.name)}\n\n{text}" for path, text in zip(paths, texts))


def read_document(path: Path, note: Callable[[str], None] = lambda _: None) -> str:
    """The text of one file, by what is in it: see laprox.chat.formats. `note` as for read_documents().

    Raises:
        ValueError: It is missing, unreadable or without text; the message starts with its path.
        MissingExtra: It takes a package that is not installed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    if not data:
        raise ValueError(f"{path}: the file is empty")
    try:
        text, remark = text_of(data, path.suffix.lower())
    except ValueError as error:
        raise ValueError(f"{path}: {printable(str(error))}") from None
    text = text.strip()
    if not text:
        raise ValueError(f"{path}: there is no text in it")
    if remark:
        note(f"{path}: {remark}")
    return text


def read_json(path: Path) -> dict[str, Any]:
    """The object in a .json file.

    Raises:
        ValueError: It can't be read or is no object; the message starts with its path.
    """
    try:
        data = _loads(path.read_text("utf-8-sig"))
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
            data = _loads(line)
        except ValueError as error:
            raise ValueError(f"{source}: not JSON ({error})") from None
        if not isinstance(data, dict):
            raise ValueError(f"{source}: not an object" + (f"; expected {expected}" if expected else ""))
        yield source, data


def _loads(text: str) -> Any:
    """JSON, with what stands for half a character ("\\ud83d" alone) replaced: no tokenizer takes it."""
    data = json.loads(text)
    if "\\ud" not in text.lower():
        return data
    return json.loads(whole(json.dumps(data, ensure_ascii=False)))
