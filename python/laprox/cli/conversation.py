"""Documents, questions and answers as a model's prompt."""

from __future__ import annotations

from typing import Any

from llama_cpp._internals import LlamaModel
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

# Stands for the documents while a template is rendered, so that their text is never read as template or control tokens.
_DOCUMENT = "\x02document\x03"
_ANSWER = "\x02answer\x03"  # the same for an answer


class Conversation:
    """What was said so far. The documents open the first question."""

    def __init__(self, vocabulary: LlamaModel, document: str, between: str = "\n\n") -> None:
        """`vocabulary` may be a model that was loaded without its weights. `between` separates documents and question."""
        self.turns: list[tuple[str, str]] = []  # question, answer
        self._vocabulary = vocabulary
        self._between = between
        self._document = vocabulary.tokenize(document.encode(), add_bos=False, special=False) if document else []
        self._formatter = _formatter(vocabulary)

    @property
    def stop(self) -> list[str]:
        """Where an answer ends, if not at an end-of-turn token."""
        return [] if self._formatter else ["\nQuestion:"]

    @property
    def trained_for(self) -> int:
        """The model's training context in tokens, 0 if it doesn't say."""
        metadata = self._vocabulary.metadata()
        return int(metadata.get(f"{metadata.get('general.architecture')}.context_length", 0))

    def prompt(self, question: str) -> list[int]:
        """The tokens of everything said so far and a question, up to where the answer begins."""
        text, has_bos = self._render(question)
        before, mark, after = text.partition(_DOCUMENT)
        tokens = self._vocabulary.tokenize(before.encode(), add_bos=not has_bos, special=True)
        if mark:
            tokens += self._document
            tokens += self._vocabulary.tokenize(after.encode(), add_bos=False, special=True)
        return tokens

    def opening(self) -> list[int]:
        """The tokens that every next prompt starts with, whatever the question."""
        one, other = self.prompt("1"), self.prompt("?")
        n = next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
        return one[:n]

    def next_turn(self, question: str) -> list[int]:
        """The tokens of another question, from the end of the answer before it up to where its own begins."""
        turns, self.turns = self.turns, [("?", _ANSWER)]
        try:
            text, _ = self._render(question)
        finally:
            self.turns = turns
        return self._vocabulary.tokenize(text.partition(_ANSWER)[2].encode(), add_bos=False, special=True)

    def document_begin(self) -> int:
        """How many tokens of every prompt come before the documents."""
        return self.document_end() - len(self._document)

    def document_end(self) -> int:
        """How many tokens of every prompt there are up to the end of the documents."""
        text, has_bos = self._render("?")
        before = text.partition(_DOCUMENT)[0]
        return len(self._vocabulary.tokenize(before.encode(), add_bos=not has_bos, special=True)) + len(self._document)

    def _render(self, question: str) -> tuple[str, bool]:
        """The prompt with a mark in place of the documents, and whether it brings its own beginning-of-text token."""
        document = f"{_DOCUMENT}{self._between}" if self._document else ""
        if self._formatter is None:
            turns = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in self.turns)
            return f"{document}{turns}Question: {question}\nAnswer:", not self._vocabulary.add_bos_token()

        messages: list[Any] = []
        for q, a in self.turns:
            messages += [{"role": "user", "content": q}, {"role": "assistant", "content": a}]
        messages.append({"role": "user", "content": question})
        messages[0]["content"] = document + messages[0]["content"]
        response = self._formatter(messages=messages)
        return response.prompt, response.added_special


def _formatter(vocabulary: LlamaModel) -> Jinja2ChatFormatter | None:
    template = vocabulary.metadata().get("tokenizer.chat_template")
    if not template:
        return None
    eos, bos = vocabulary.token_eos(), vocabulary.token_bos()
    return Jinja2ChatFormatter(
        template=template,
        eos_token=vocabulary.token_get_text(eos) if eos != -1 else "",
        bos_token=vocabulary.token_get_text(bos) if bos != -1 else "",
    )
