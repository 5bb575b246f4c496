"""Documents, questions and answers as a model's prompt."""

from __future__ import annotations

import re
import secrets
from typing import Any

from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from laprox import templates
from laprox._upstream import LlamaModel
from laprox.chat.tokens import n_shared, text_of, tokens_of, trained_for


class Conversation:
    """What was said so far. The documents open the first question."""

    def __init__(self, vocabulary: LlamaModel, document: str | list[int], between: str = "\n\n", template: str | None = None, advice: str = "") -> None:
        """Prepare prompts.

        Args:
            vocabulary: The model, which may be loaded without its weights.
            document: All documents' text, or ""; or the tokens of a prompt up to the documents' end, as an earlier one had them.
            between: What separates them from the first question.
            template: A chat template instead of the model's.
            advice: What else can be done where it is refused.

        Raises:
            ValueError: The template is broken, or leaves out what is asked; or no prompt begins with these tokens.
        """
        self.turns: list[tuple[str, str]] = []  # question, answer
        self._vocabulary = vocabulary
        self._between = between
        self._advice = advice
        self._document = tokens_of(vocabulary, document) if isinstance(document, str) else document
        self._asked: tuple[str, list[int]] = ("", [])  # the last prompt

        # Marks stand for the documents and other text while a template is rendered, so that documents are never read as
        # template or control tokens, and that what a template leaves out is noticed. Letters and digits, since a template may
        # write JSON; it may change their case, too.
        self._mark, self._probe = (f"{name}{secrets.token_hex(8)}" for name in ("document", "text"))
        self._formatter = self._compiled(template or vocabulary.metadata().get("tokenizer.chat_template"))
        self._in_parts = False  # content is a list of parts
        if self._formatter is not None:
            self._choose_form()
        if not isinstance(document, str):
            self._document = document[self.document_begin() :]
            if not self._document or self.prompt("?")[: len(document)] != document:
                raise self._refused("the chat template begins otherwise")

    @property
    def stop(self) -> list[str]:
        """Where an answer ends, if not at an end-of-turn token."""
        return [] if self._formatter else ["\nQuestion:"]

    @property
    def trained_for(self) -> int:
        """The model's training context in tokens, 0 if it doesn't say."""
        return trained_for(self._vocabulary)

    def prompt(self, question: str) -> list[int]:
        """The tokens of everything said so far and a question, up to where the answer begins.

        Raises:
            ValueError: The chat template fails, or leaves out the documents or the question.
        """
        text, has_bos = self._render(question)
        tokens = self._tokens(text, add_bos=not has_bos)
        before, before_tokens = self._asked
        if before and text.startswith(before) and tokens[: len(before_tokens)] != before_tokens:
            # Where the answer merged with the end of the prompt before it, the cache wouldn't know that prompt again.
            return before_tokens + self._tokens(text[len(before) :], add_bos=False)
        return tokens

    def ask(self, question: str) -> list[int]:
        """The same, and the prompts of follow-ups begin with these very tokens."""
        tokens = self.prompt(question)
        self._asked = self._render(question)[0], tokens
        return tokens

    def text_of(self, tokens: list[int]) -> str:
        """What tokens say, control tokens left out."""
        return text_of(self._vocabulary, tokens)

    def opening(self) -> list[int]:
        """The tokens that every next prompt starts with, whatever the question."""
        one, other = self.prompt("1"), self.prompt("?")
        return one[: n_shared(one, other)]

    def next_turn(self, question: str) -> list[int]:
        """The tokens of another question, from the end of the answer before it up to where its own begins."""
        turns, self.turns = self.turns, [("?", self._probe)]
        try:
            text, _ = self._render(question)
        finally:
            self.turns = turns
        return self._tokens(_split(text, self._probe)[-1], add_bos=False)

    def document_begin(self) -> int:
        """How many tokens of every prompt come before the documents."""
        text, has_bos = self._render("?")
        return len(self._tokens(_split(text, self._mark)[0], add_bos=not has_bos))

    def document_end(self) -> int:
        """How many tokens of every prompt there are up to the end of the documents."""
        return self.document_begin() + len(self._document)

    def _tokens(self, text: str, add_bos: bool) -> list[int]:
        """A rendered text's tokens, with the documents' in place of their mark."""
        first, *rest = _split(text, self._mark)
        tokens = self._vocabulary.tokenize(first.encode(), add_bos=add_bos, special=True)
        for piece in rest:
            tokens += self._document
            tokens += self._vocabulary.tokenize(piece.encode(), add_bos=False, special=True)
        return tokens

    def _render(self, question: str) -> tuple[str, bool]:
        """The prompt with a mark in place of the documents, and whether it brings its own beginning-of-text token."""
        document = f"{self._mark}{self._between}" if self._document else ""
        if self._formatter is None:
            turns = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in self.turns)
            return f"{document}{turns}Question: {question}\nAnswer:", not self._vocabulary.add_bos_token()

        text, has_bos = self._applied(document, question)
        if document and len(_split(text, self._mark)) == 1:
            raise self._refused(f"the chat template leaves out the documents{' of a follow-up' if self.turns else ''}")
        probed = self._applied(document, self._probe)[0]
        if len(_split(probed, self._probe)) == 1 or self._in_parts and "'type': 'text'" in probed:  # the list itself is printed
            raise self._refused("the chat template leaves out the question")
        return text, has_bos

    def _applied(self, document: str, question: str) -> tuple[str, bool]:
        said = [text for turn in self.turns for text in turn] + [question]
        said[0] = document + said[0]
        messages: list[Any] = [
            {"role": ("user", "assistant")[i % 2], "content": [{"type": "text", "text": text}] if self._in_parts else text}
            for i, text in enumerate(said)
        ]
        assert self._formatter is not None
        try:
            response = templates.rendered(self._formatter, messages)
        except ValueError as error:
            raise self._refused(error) from None
        return response.prompt, response.added_special

    def _choose_form(self) -> None:
        """Most templates take a message's content as text, some as a list of parts."""
        refusals = []
        for self._in_parts in (False, True):
            try:
                self._render("?")
                return
            except ValueError as refusal:
                refusals.append(refusal)
        self._in_parts = False
        raise refusals[0]

    def _compiled(self, template: str | None) -> Jinja2ChatFormatter | None:
        if not template:
            return None
        eos, bos = self._vocabulary.token_eos(), self._vocabulary.token_bos()
        try:
            return templates.compiled(
                template,
                eos_token=self._vocabulary.token_get_text(eos) if eos != -1 else "",
                bos_token=self._vocabulary.token_get_text(bos) if bos != -1 else "",
            )
        except ValueError as error:
            raise self._refused(error) from None

    def _refused(self, reason: object) -> ValueError:
        return ValueError(f"{reason}; {self._advice}" if self._advice else str(reason))


def _split(text: str, mark: str) -> list[str]:
    return re.split(mark, text, flags=re.IGNORECASE)
