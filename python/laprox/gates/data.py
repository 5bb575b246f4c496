"""Training data: text files, or lines of a .jsonl file, as tokens and which of them are supervised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laprox.chat.reading import read_document, read_jsonl

EXPECTED = '{"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ..., "content": ...}, ...]}'


@dataclass(frozen=True)
class Example:
    """A sequence.

    Attributes:
        ids: Its tokens.
        supervised: Positions, from 1 on, of the tokens that are to be predicted from what is before them.
    """

    ids: list[int]
    supervised: list[int]


def read_examples(paths: Sequence[Path], tokenizer: Any, length: int) -> list[Example]:
    """The sequences of several files.

    Args:
        paths: .jsonl files as above; any other file is a text, cut into pieces of `length` tokens.
        tokenizer: A transformers tokenizer.
        length: Tokens that a sequence may have. Longer texts are cut into pieces; longer conversations are refused.

    Raises:
        ValueError: A file or a line can't be used; names both.
    """
    examples: list[Example] = []
    for path in paths:
        if path.suffix.lower() != ".jsonl":
            examples += _pieces(tokenizer.encode(read_document(path)), length)
            continue
        for source, data in read_jsonl(path, EXPECTED):
            examples += _line(source, data, tokenizer, length)
    if not examples:
        raise ValueError("the data hold no sequence of two tokens or more")
    return examples


def _line(source: str, data: Any, tokenizer: Any, length: int) -> list[Example]:
    if isinstance(data.get("text"), str):
        return list(_pieces(tokenizer.encode(data["text"]), length))
    if isinstance(data.get("prompt"), str) and isinstance(data.get("completion"), str):
        before = tokenizer.encode(data["prompt"])
        after = tokenizer.encode(data["completion"], add_special_tokens=False)
        example = Example(before + after, list(range(max(1, len(before)), len(before) + len(after))))
    elif isinstance(data.get("messages"), list):
        example = _conversation(source, data["messages"], tokenizer)
    else:
        raise ValueError(f"{source}: expected {EXPECTED}")
    if len(example.ids) > length:
        raise ValueError(f"{source}: {len(example.ids):,} tokens, more than --length {length:,}")
    if not example.supervised:
        raise ValueError(f"{source}: there is nothing to predict in it")
    return [example]


def _conversation(source: str, messages: list[Any], tokenizer: Any) -> Example:
    """What the assistant says is supervised, its end of turn included."""
    if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and isinstance(m.get("role"), str) for m in messages):
        raise ValueError(f'{source}: "messages" must be a list of {{"role": ..., "content": ...}}')
    if not tokenizer.chat_template:
        raise ValueError(f"{source}: the model has no chat template for messages; give prompt and completion")
    ids: list[int] = []
    supervised: list[int] = []
    done = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(messages[:i], tokenize=False, add_generation_prompt=True)
        said = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        if not said.startswith(prompt) or not prompt.startswith(done):
            raise ValueError(f"{source}: the chat template changes what was said before (message {i + 1}); give prompt and completion")
        ids += tokenizer.encode(prompt[len(done) :], add_special_tokens=False)
        answer = tokenizer.encode(said[len(prompt) :], add_special_tokens=False)
        supervised += range(max(1, len(ids)), len(ids) + len(answer))
        ids += answer
        done = said
    return Example(ids, supervised)


def _pieces(ids: list[int], length: int) -> Iterator[Example]:
    for start in range(0, len(ids), length):
        piece = ids[start : start + length]
        if len(piece) > 1:
            yield Example(piece, list(range(1, len(piece))))
