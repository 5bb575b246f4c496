"""A text that a model has read, in a file: what its cache holds of it, and how to go on from there."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from laprox import _core
from laprox._upstream import LlamaModel, model_of
from laprox.cache_types import CACHE_TYPES
from laprox.chat.conversation import Conversation
from laprox.chat.formats import GGUF, was_read
from laprox.config import KVConfig
from laprox.files import sha256_of

if TYPE_CHECKING:
    from laprox.llama import Llama


class Document:
    """A text that a model has read. `Llama.load_document` makes one that can be asked about.

    Attributes:
        path: The file.
        title: The names of the texts in it.
        text: All of them, as the model read them.
        tokens: Of a prompt up to the end of the text.
        settings: What it was made with, as laprox.read.writing writes it.
        fingerprint: The model's, as _core.model_fingerprint tells it.
        n_bytes: Size of the file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Read and check a file; no model is needed.

        Raises:
            LaproxError: It is none, damaged, or of another version of laprox or llama.cpp; begins with its path.
        """
        self.path = Path(path)
        try:
            self._file = _core.Document(os.fsencode(self.path))
        except _core.LaproxError as error:
            raise self.refused(error) from None
        self.title, self.text, settings = (self._get(key) for key in ("title", "text", "settings"))
        self.fingerprint = self._get("fingerprint")
        self.tokens = self._file.tokens()
        try:
            self.settings: dict[str, Any] = json.loads(settings)
            self.n_bytes = self.path.stat().st_size
            _check(self.settings)
        except (ValueError, RecursionError) as error:
            raise self.refused(f"its settings can't be read: {error}") from None
        except OSError as error:
            raise self.refused(error.strerror) from None
        self._bound_to: tuple[weakref.ref[Llama], Conversation] | None = None

    def _get(self, key: str) -> str:
        text = self._file.get(key)
        if text is None:
            raise self.refused(f"it has no {key}, so another program wrote it")
        return text

    def refused(self, reason: object) -> _core.LaproxError:
        """To be raised: why this document can't be used."""
        return _core.LaproxError(f"{self.path}: {reason}")

    @property
    def has_archive(self) -> bool:
        """Whether what isn't held is in the file, too, and can come back for a question."""
        return bool(self.settings["archive"])

    @property
    def cache_types(self) -> tuple[int, int]:
        """Of keys and values, as llama.cpp numbers types: a context that loads this has the same."""
        return CACHE_TYPES[self.settings["cache_type_k"]].ggml, CACHE_TYPES[self.settings["cache_type_v"]].ggml

    def check(self, llm: Llama) -> None:
        """Raises LaproxError where a Llama computes other entries, or has no room for these. The engine looks at the rest as it loads them."""
        if len(self.tokens) >= llm.n_ctx():
            raise self.refused(
                f"it has {len(self.tokens)} tokens, the context has room for {llm.n_ctx()}; accepted: an n_ctx that holds a question, too"
            )
        if self.cache_types != (given := (llm.context_params.type_k, llm.context_params.type_v)):
            raise self.refused(f"type_k, type_v are {given} here; accepted: {self.cache_types}, as it was made with")
        made_with, here = self.settings.get("lora"), lora_of(llm)
        if made_with != here:
            raise self.refused(
                f"lora_path, lora_scale are {llm.lora_path!r}, {llm.lora_scale} here; accepted: "
                + (f"those that it was made with: {made_with}" if made_with else "no lora_path, as it was made without")
            )

    @property
    def kv(self) -> KVConfig:
        """The settings of a context that evicts nothing more from it and takes only the memory it needs: Llama(path, kv=document.kv).

        With an archive, those that it was made with: a question then chooses anew among everything.

        Raises:
            LaproxError: They aren't accepted any more, or of a policy of one's own.
        """
        policy, budget = self.settings["policy"], self.settings["budget"]
        try:
            if self.has_archive:
                return KVConfig(policy=policy, budget=budget)
            # Entries that gates have marked are of another layout, so these can't be done without.
            marked = policy.partition(":")[0] == "retention"
            return KVConfig(policy=policy if marked else "full", budget="100%", prefill="chunked", archive="off")
        except ValueError as error:
            raise self.refused(error) from None

    def conversation(self, vocabulary: LlamaModel) -> Conversation:
        """A conversation about it, whose prompts all begin with its tokens.

        Raises:
            LaproxError: They can't: the model has another chat template than the one that it was made with.
        """
        try:
            return Conversation(vocabulary, self.tokens, template=self.settings["chat_template"])
        except ValueError as error:
            raise self.refused(f"it was made with another chat template: {error}") from None

    def check_model(self, model: LlamaModel) -> None:
        """Raises LaproxError unless it was made with this model, whose weights are loaded."""
        if (here := _core.model_fingerprint(model.model)) != self.fingerprint:
            raise self.refused(f"it was made with the model {self.settings['model']}, and this is another one (fingerprint {self.fingerprint} there, {here} here)")

    def prompt(self, question: str, turns: Sequence[tuple[str, str]] = ()) -> list[int]:
        """The tokens of a question about it, up to where the answer begins: for `create_completion(prompt=...)`.

        Args:
            question: What is asked.
            turns: Questions and answers before it.

        Raises:
            LaproxError: No Llama has it loaded, or it was closed.
            ValueError: The chat template leaves out the question.
        """
        conversation = self._bound()
        conversation.turns = list(turns)
        return conversation.prompt(question)

    @property
    def stop(self) -> list[str]:
        """Where an answer ends, if not at an end-of-turn token: for `create_completion(stop=...)`."""
        return self._bound().stop

    def bind(self, llm: Llama) -> None:
        """From now on, `prompt` makes prompts for this one, for as long as it lives. Raises as `conversation`."""
        self._bound_to = weakref.ref(llm), self.conversation(model_of(llm))

    def _bound(self) -> Conversation:
        if self._bound_to is None or (llm := self._bound_to[0]()) is None:
            raise self.refused("no Llama has it loaded, so its prompts aren't known: Llama.load_document() loads it")
        llm._check_usable()
        return self._bound_to[1]

    def load(self, ctx: int) -> None:
        """A context's first sequence then holds it, and only it.

        Raises:
            LaproxError: It is of another model or layout, or there is no room for it.
        """
        try:
            self._file.load(ctx)
        except _core.LaproxError as error:
            raise self.refused(error) from None


def lora_of(llm: Llama) -> dict[str, Any] | None:
    """The adapter that a Llama computes with, as settings tell of it; None: none."""
    if not llm.lora_path or not llm.lora_scale:
        return None
    return {"sha256": sha256_of(Path(llm.lora_path)), "scale": llm.lora_scale}


def is_document(path: Path) -> bool:
    """Whether a file is no text, but perhaps a document that was read."""
    try:
        return _begin(path).startswith(GGUF)
    except OSError:
        return False  # whoever reads it as text says why


def check_replaceable(output: Path) -> None:
    """Raises ValueError unless a document can take the place of what is there: nothing, nothing in it, or another document."""
    try:
        accepted = not output.exists() or output.is_file() and (output.stat().st_size == 0 or was_read(_begin(output)))
    except OSError as error:
        raise ValueError(f"{output}: {error.strerror}") from None
    if not accepted:
        raise ValueError(f"{output} is there, and is none of `laprox read`'s documents; accepted: one of them, which is replaced, or a new file")


def _begin(path: Path) -> bytes:
    """A file's first bytes; of a pipe none, since they would be gone from it."""
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(256)


def _check(settings: Any) -> None:
    """Raises ValueError unless they are of the types that the properties above rely on."""
    if not isinstance(settings, dict):
        raise ValueError("no object")
    kinds: dict[str, tuple[type, ...]] = {
        "policy": (str,), "budget": (str,), "archive": (bool,), "cache_type_k": (str,), "cache_type_v": (str,),
        "chat_template": (str, type(None)), "model": (str,), "full_bytes": (int,),
    }  # fmt: skip
    for name, accepted in kinds.items():
        if not isinstance(settings.get(name), accepted):
            raise ValueError(f"{name} is {settings.get(name)!r}")
        if name.startswith("cache_type") and settings[name] not in CACHE_TYPES:
            raise ValueError(f"{name} is {settings[name]!r}; accepted: {', '.join(CACHE_TYPES)}")
    if not 0 < settings["full_bytes"] < 1 << 63:
        raise ValueError("full_bytes is no number of bytes")
