"""What a text's reader will look at, found before anybody asks: the model repeats the text, and its queries score the entries.

KVzip (arXiv 2505.23416): where a question would be, a prompt asks to repeat the text, part by part; the part's own tokens follow
as the answer. What these tokens look at is what is needed to say all of the text again, whatever will be asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from laprox import _core
from laprox.chat.conversation import Conversation
from laprox.llama import Llama
from laprox.policy import Policy

PART = 2048  # tokens that are repeated in one go
RECALLED = 8  # tokens of the part before, which say where to go on
ROWS = 1280  # queries of a KV head's group that a refit is made for
WINDOW = 256  # tokens evaluated between two looks: the context's window has to hold their queries

FIRST = "Repeat the previous context exactly."
NEXT = "Repeat the part of the previous context exactly, starting with {begin}"


@dataclass(frozen=True)
class Part:
    """Tokens to evaluate behind a text, and the part of it, positions [first, last), that they are about."""

    tokens: Sequence[int]
    first: int
    last: int


@dataclass(frozen=True)
class Probe:
    """What to evaluate behind a text.

    Attributes:
        n_text: Tokens of the text, a chat template's prefix included.
        n_prefix: Of these, the prefix.
        parts: What follows it, one after another.
    """

    n_text: int
    n_prefix: int
    parts: tuple[Part, ...]

    @property
    def tokens(self) -> int:
        """To evaluate."""
        return sum(len(part.tokens) for part in self.parts)

    @property
    def context(self) -> int:
        """Tokens that a context must have room for."""
        return self.n_text + max(len(part.tokens) for part in self.parts)


def repeating(conversation: Conversation, n_text: int = 0, size: int = PART) -> Probe:
    """The probe in which a conversation's documents are repeated, in parts of at most `size` tokens.

    Args:
        conversation: Has the documents.
        n_text: Tokens that are cached, the same in every prompt: more than up to the documents' end, or 0 for these.
        size: Of a part.

    Raises:
        ValueError: There is no document, or the chat template leaves something out.
    """
    begin, end = conversation.document_begin(), n_text or conversation.document_end()
    if end <= begin:
        raise ValueError("there is no document to repeat")
    n_parts = -(-(end - begin) // size)
    text = conversation.prompt(FIRST)[:end]
    parts = []
    for i in range(n_parts):
        first, last = (begin + (end - begin) * j // n_parts for j in (i, i + 1))
        prompt = FIRST if i == 0 else NEXT.format(begin=conversation.text_of(text[first - RECALLED : first]).strip())
        parts.append(Part([*conversation.prompt(prompt)[end:], *text[first:last]], first, last))
    return Probe(end, begin, tuple(parts))


def asking(conversation: Conversation, questions: Sequence[str]) -> Probe:
    """The probe of somebody's own questions, each about all of the text.

    Raises:
        ValueError: There is no question or no document, or the chat template leaves something out.
    """
    begin, end = conversation.document_begin(), conversation.document_end()
    if end <= begin or not questions:
        raise ValueError("there is no document to ask about" if questions else "there is no question to probe with")
    return Probe(end, begin, tuple(Part(conversation.prompt(question)[end:], begin, end) for question in questions))


def check(policy: str | Policy | None) -> None:
    """Raises LaproxError unless a probe can tell a policy something."""
    if not isinstance(policy, str) or not _core.policy_probes(policy):
        raise _core.LaproxError(
            f"policy {policy} doesn't score by queries, so a probe has nothing to tell it; accepted: no probe, or energy, kvzip, laprox and their kind"
        )


def check_share(share: float, name: str = "share") -> None:
    """Raises ValueError unless a probe can look with that share of its tokens."""
    if not 1 / PART <= share <= 1:
        raise ValueError(f"{name} is {share}; accepted: from {1 / PART} to 1")


def look(
    llm: Llama, probe: Probe, refit: bool = True, progress: Callable[[int], None] = lambda n: None, share: float = 1.0
) -> None:
    """Let a probe find out what counts in the text that is cached, and nothing behind it. The next `llm.kv.compress()` keeps that.

    Args:
        llm: Made with `window=WINDOW`, say: as many tokens are evaluated at a time.
        probe: Of the text that is cached.
        refit: Whether that compression also refits what it keeps, to what the probe's queries read from all.
        progress: Is told how many more tokens of the probe have been evaluated.
        share: Of the probe's tokens, how many score: 0.25 is every fourth. All of them are evaluated, and attended to.

    Raises:
        LaproxError: The policy doesn't score by queries, or the text isn't what is cached.
        ValueError: The probe doesn't fit into the context, or the share is none.
    """
    check_share(share)
    check(llm.kv.config.policy)
    if llm.n_tokens != probe.n_text:
        raise _core.LaproxError(f"a probe of a text of {probe.n_text} tokens, but {llm.n_tokens} are cached")
    every = max(1, probe.tokens * _group(llm) // ROWS) if refit else 0
    if not llm._goes_back():
        _core.mark(llm.ctx)
    for part in probe.parts:
        for tokens in _pieces(part.tokens, min(llm.kv.config.window, llm.n_batch)):
            with llm._in_use:
                llm.eval(tokens)
                _core.probe(llm.ctx, probe.n_text, probe.n_prefix, part.first, part.last, every, round(1 / share))
            progress(len(tokens))
        if not llm._cut(probe.n_text):
            raise _core.LaproxError(f"the probe's tokens can't be taken back: {_core.last_error()}")
        llm.n_tokens = probe.n_text


def _pieces(tokens: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(tokens), size):
        yield tokens[start : start + size]


def _group(llm: Llama) -> int:
    """Query heads per KV head; where layers differ, the most."""
    return max(_core.head_shape(llm.ctx, layer)[0] // n_head_kv for layer, n_head_kv in llm.kv.layers.items())
