"""One model with one document in its cache: read once, and every trial starts from a copy of that state.

Three regimes:

    aware      compressed when document and question are in, so that the question is in the observation window
    agnostic   the document is compressed alone, then the question is read
    follow-up  compressed when document and first question are in; that one is answered, then the question is read

    reader = Reader(llm)
    reader.read(document)                                    # tokens
    start = reader.start(question, Setting("laprox", "5%"))  # compressed, and ready to answer
    reader.greedy(start, 64)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp.llama import LlamaState

from laprox import _core
from laprox.cache_types import CACHE_TYPES, Types
from laprox.chat.tokens import last_logits, read
from laprox.config import KVConfig, initial
from laprox.eval.metrics import log_softmax
from laprox.llama import Llama
from laprox.policy import Policy
from laprox.read.probe import Probe, look

Floats = npt.NDArray[np.float64]

REGIMES = {
    "aware": "Question inside the window",
    "agnostic": "Document compressed before the question",
    "follow-up": "Document compressed for the first question, another one asked",
}
SHORTER = "shorter-context"  # in place of a policy: the document's last tokens, as many as the budget has, read by themselves


# After a policy's name:
RECALL = "@recall"  # what was evicted comes back from an archive when another question needs it
REPEAT = "@repeat"  # the model repeats the document before it is compressed, and its queries then decide
REFIT = "@refit"  # the same, and what stays is refitted to these queries
# And last of all "@q8_0" or "@q8_0/q4_0": the types of keys and values.

RECENT_PROBED = 8  # last tokens of a document that stay in any case: its end isn't a question then


def types_of(policy: str | Policy | None) -> Types | None:
    """The types that a policy is named with; None: those of the context. It needs a Llama with these."""
    last = policy.rpartition("@")[2] if isinstance(policy, str) and "@" in policy else ""
    return Types.parse(last) if last.partition("/")[0] in CACHE_TYPES else None


def untyped(policy: str | Policy | None) -> str | Policy | None:
    """A policy without the types that it is named with."""
    return policy.rpartition("@")[0] if isinstance(policy, str) and types_of(policy) else policy


def recalls(policy: str | Policy | None) -> bool:
    """Whether a policy is named with RECALL. It needs a Llama with an archive."""
    policy = untyped(policy)
    return isinstance(policy, str) and policy.endswith(RECALL)


def probes(policy: str | Policy | None) -> bool:
    """Whether a policy is named with REPEAT or REFIT. It needs a document with a probe, and a context with room for it."""
    policy = untyped(policy)
    return isinstance(policy, str) and policy.endswith((REPEAT, REFIT))


def archive_for(policies: Iterable[str]) -> str:
    """The setting `archive` of a Llama that these share; those without RECALL leave it empty."""
    return "ram" if any(map(recalls, policies)) else "off"


def suits(policy: str | Policy | None, regime: str) -> bool:
    """Whether there is something to measure: with the question in view nothing comes back, and nobody needs to guess it."""
    return regime == "agnostic" if probes(policy) else not (recalls(policy) and regime == "aware")


def check_suits(policies: Iterable[str], regimes: Sequence[str]) -> None:
    """Raises ValueError for a policy that suits none of the regimes that were asked for."""
    for name in policies:
        if not any(suits(name, regime) for regime in regimes):
            fitting = " or ".join(regime for regime in REGIMES if suits(name, regime))
            raise ValueError(f"--policies has {name!r}, which is for later questions; accepted with it: --regime {fitting}")


def plain(policy: str | Policy | None) -> str | Policy | None:
    """The policy as the engine knows it."""
    policy = untyped(policy)
    if not isinstance(policy, str):
        return policy
    return policy.removesuffix(RECALL).removesuffix(REPEAT).removesuffix(REFIT)


@dataclass(frozen=True)
class Setting:
    """How the cache is compressed. Without a policy it is not, and the budget means nothing.

    Attributes:
        coarse: Whether the context's types are others than those of the cache that all are compared with.
    """

    policy: str | Policy | None = None
    budget: str = initial("budget")
    regime: str = "aware"
    coarse: bool = False


@dataclass(frozen=True)
class Turn:
    """A question that is answered before the one that counts.

    Attributes:
        tokens: What follows the document, up to where the model answers.
        predict: The longest answer in tokens.
    """

    tokens: tuple[int, ...]
    predict: int


@dataclass(frozen=True)
class Cost:
    """What compressing left and took. Seconds differ from run to run, the rest doesn't.

    Attributes:
        kv_bytes: Allocated right after it, tail and padding included.
        entries_held: Entries in the cache right after it,
        entries_full: and without it.
        seconds: By the clock,
        cpu_seconds: by the processor; 0 if nothing was compressed.
        score_share: Of either, what scoring took.
    """

    kv_bytes: int
    entries_held: int
    entries_full: int
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    score_share: float = 0.0


@dataclass(frozen=True)
class Start:
    """A cache that is ready to answer.

    Attributes:
        logprobs: Of the first token to come: float64 [vocabulary]. Under "aware" they are the full cache's, as in any run.
        cost: None if this Llama has no compressing cache.
        seconds: What reading the question took, by the clock; 0 if a copy of the cache had it.
    """

    logprobs: Floats
    cost: Cost | None
    seconds: float


class Seconds(NamedTuple):
    """What something took: by the clock, and of the processor."""

    clock: float
    cpu: float


@dataclass
class Decoding:
    """Tokens that were evaluated one by one, and the time that took by the clock."""

    tokens: int = 0
    seconds: float = 0.0


@dataclass
class Reader:
    """A model and the document it has read.

    Attributes:
        llm: Made with `min_tokens=0`, or small budgets will not be reached on short documents; with the policy of
            made_with(), where a policy needs that; or with kv=None, if nothing is ever compressed.
        keep_asked: Whether to keep a copy of the cache after a question, which saves reading it again where several settings
            in a row are tried on one question.
        window: Queries that score, where no probe does; None: as many as the context observes.
        decoding: Adds up over all trials; set it to a new Decoding() where another sum begins.
    """

    llm: Llama
    keep_asked: bool = True
    window: int | None = None
    decoding: Decoding = field(default_factory=Decoding)

    def __post_init__(self) -> None:
        self._own = self.llm.kv_config or KVConfig()
        self._document: list[int] = []
        self._probe: Probe | None = None
        self._read: LlamaState | None = None  # with the whole document in the cache
        self._logprobs: Floats | None = None  # after it
        self._found: tuple[tuple[object, bool], _core.Found, Seconds] | None = None  # by the last probe, and what it took
        self._head = 0
        self._compressed: tuple[tuple[Setting, Turn | None], LlamaState, Cost | None] | None = None  # the last one
        self._questioned: tuple[list[int], LlamaState, Floats] | None = None  # with the last "aware" question in the cache
        self.read_seconds = 0.0
        self.read_cpu_seconds = 0.0

    def read(
        self, document: Sequence[int], head: int = 0, progress: Callable[[int], None] = lambda n: None, probe: Probe | None = None
    ) -> None:
        """Read a document and keep a copy of the cache.

        Args:
            document: Tokens that every prompt begins with.
            head: How many of them come before the text itself, which a shorter context can't do without.
            progress: Is called with how many more of them are in.
            probe: Of the document, for policies that need one.

        Raises:
            ValueError: They do not fit into the context.
        """
        self._document, self._head, self._probe = list(document), head, probe
        self._compressed, self._questioned, self._found = None, None, None
        clock, cpu = time.perf_counter(), time.process_time()
        before = 0
        for n in read(self.llm, self._document):
            progress(n - before)
            before = n
        self.read_seconds, self.read_cpu_seconds = time.perf_counter() - clock, time.process_time() - cpu
        self._logprobs = log_softmax(last_logits(self.llm))
        self._read = self.llm.save_state()

    @property
    def document(self) -> Sequence[int]:
        """The tokens that were read."""
        return self._document

    @property
    def state_bytes(self) -> int:
        """What the copies of the cache take, beside the cache itself."""
        states = [self._read, self._compressed and self._compressed[1], self._questioned and self._questioned[1]]
        return sum(state.llama_state_size + state.scores.nbytes for state in states if state)

    def start(self, question: Sequence[int], setting: Setting = Setting(), first: Turn | None = None) -> Start:
        """Bring the cache into the state in which it answers a question.

        Args:
            question: Tokens after the document (or after the answer to `first`); none at all: the document itself goes on.
            setting: How to compress.
            first: Under "follow-up", the question that the cache is compressed for.

        Raises:
            ValueError: A setting is out of range.
            LaproxError: The engine refuses: no gates for "retention", say, or a budget in bytes that can't be kept.
        """
        if setting.regime not in REGIMES:
            raise ValueError(f"regime is {setting.regime!r}; accepted: {', '.join(REGIMES)}")
        if (setting.regime == "follow-up") != (first is not None):
            raise ValueError(f"regime is {setting.regime!r}, which {'needs a' if first is None else 'has no'} first question")
        if not suits(setting.policy, setting.regime):
            raise ValueError(f"regime is {setting.regime!r}, which isn't for {setting.policy}")
        shorter = setting.policy == SHORTER
        if setting.policy is not None and not shorter:
            recall = initial("recall") if recalls(setting.policy) else 0
            probed = probes(setting.policy)
            recent = min(self._own.recent, RECENT_PROBED) if probed else self._own.recent
            window = self._own.window if probed else self.window or self._own.window
            self.llm.kv.set(policy=plain(setting.policy), budget=setting.budget, recall=recall, recent=recent, window=window)
        if not shorter and (setting.regime == "aware" or setting.policy is None and first is None):
            logprobs, seconds = self._restore_asked(question)
            return Start(logprobs, self._cost(setting), seconds)
        if self._compressed is None or self._compressed[0] != (setting, first):
            self._compressed = None  # two copies at a time are enough
            if shorter:
                cost: Cost | None = self._read_shorter(setting.budget)
                if first is not None:
                    self._answer_first(first, self._ask(first.tokens)[0])
            elif first is None:
                self._restore()
                cost = self._compress(setting.policy)
            else:
                logprobs, _ = self._restore_asked(first.tokens)
                cost = self._cost(setting)
                self._answer_first(first, logprobs)
            self._compressed = (setting, first), self.llm.save_state(archive=recalls(setting.policy)), cost
        else:
            self.llm.load_state(self._compressed[1])
        logprobs, seconds = self._ask(question)
        if recalls(setting.policy) and question:
            self.llm.kv.prompt_done()
            logprobs = log_softmax(last_logits(self.llm))
        return Start(logprobs, self._compressed[2], seconds)

    def force(self, start: Start, answer: Sequence[int]) -> Iterator[Floats]:
        """The log-probabilities [vocabulary] that each token of an answer met, while the model is told that answer."""
        yield start.logprobs
        for token in answer[:-1]:
            yield self._decode(token)

    def greedy(self, start: Start, predict: int) -> list[int]:
        """The likeliest answer, token by token, of at most `predict` tokens; without its end-of-turn token."""
        return self._go_on([], start.logprobs, predict)

    def answer(self, start: Start, predict: int) -> tuple[npt.NDArray[np.float32], list[int]]:
        """The same, with the log-probabilities along it: float32 [its tokens + 1, vocabulary], the last ones of what comes after."""
        along = [start.logprobs]
        tokens = self._go_on([], start.logprobs, predict, along.append)
        if len(along) == len(tokens):
            along.append(self._decode(tokens[-1]))
        return np.array(along, np.float32), tokens

    def compare(self, start: Start, answer: Sequence[int], predict: int) -> tuple[npt.NDArray[np.float32], list[int]]:
        """Tell the model another cache's greedy answer, then let it give its own: the beginning that both share is read once.

        Args:
            start: A cache that is ready to answer.
            answer: What the other answered, without its end-of-turn token.
            predict: The longest answer in tokens.

        Returns:
            Log-probabilities along `answer`, float32 [len(answer) + 1, vocabulary], the last ones of what comes after it;
            and the likeliest answer, as greedy() gives it.
        """
        begin = self.llm.n_tokens
        along = np.array(list(self.force(start, [*answer, -1])), np.float32)
        likeliest = along.argmax(-1)
        shared = int((likeliest[:-1] != np.asarray(answer, int)).argmax()) if (likeliest[:-1] != answer).any() else len(answer)
        if not self.llm._cut(begin + shared):
            raise RuntimeError(f"the cache can't go back by {len(answer) - shared} tokens")
        self.llm.n_tokens = begin + shared
        return along, self._go_on(list(answer[:shared]), along[shared], predict)

    def able(self, policies: Sequence[str]) -> dict[str, str]:
        """Why some of these policies can't run on this model: a file that it doesn't have, say."""
        reasons = {}
        for policy in policies:
            if policy == SHORTER:
                continue
            try:
                self.llm.kv.set(policy=plain(policy))
            except _core.LaproxError as error:
                reasons[policy] = str(error)
        return reasons

    # --- the cache ---

    def _restore(self) -> None:
        """The whole document in the cache, and nothing else."""
        if self._read is None:
            raise ValueError("there is no document yet: read() one first")
        self.llm.load_state(self._read)

    def _restore_asked(self, question: Sequence[int]) -> tuple[Floats, float]:
        """The whole document and a question in the cache: what comes next, and the seconds to read the question."""
        if self._questioned is not None and self._questioned[0] == list(question):
            self.llm.load_state(self._questioned[1])
            return self._questioned[2], 0.0
        self._restore()
        logprobs, seconds = self._ask(question)
        if self.keep_asked and question:
            self._questioned = None  # one copy at a time is enough
            self._questioned = list(question), self.llm.save_state(), logprobs
        return logprobs, seconds

    def _read_shorter(self, budget: str) -> Cost:
        """As many of the document's last tokens as the budget holds, after what comes before its text."""
        unit, value = _core.parse_budget(budget)
        if unit == "bytes":
            raise ValueError(f"{SHORTER} takes a share or a number of tokens as budget, not {budget}")
        n = round(value * len(self._document)) if unit == "fraction" else int(value)
        for _ in read(self.llm, self._document[: self._head] + self._document[self._head :][-max(1, n - self._head) :]):
            pass
        stats = self.llm.kv.stats()
        return Cost(stats.kv_bytes_full, stats.entries_held, stats.entries_full)

    def _answer_first(self, first: Turn, logprobs: Floats) -> None:
        """Answer a question that another one follows."""
        answer = self._go_on([], logprobs, first.predict)
        if len(answer) == first.predict:  # nothing asked for what follows its last token, which is therefore not in the cache
            self._decode(answer[-1])

    def _go_on(
        self,
        tokens: list[int],
        logprobs: npt.NDArray[Any],
        predict: int,
        met: Callable[[Floats], None] = lambda logprobs: None,
    ) -> list[int]:
        """An answer whose beginning is in the cache, to its end: the likeliest token each time. `met` is told what followed it."""
        vocabulary = llama_cpp.llama_model_get_vocab(self.llm.model)
        while len(tokens) < predict:
            token = int(logprobs.argmax())
            if llama_cpp.llama_vocab_is_eog(vocabulary, token):
                break
            tokens.append(token)
            if len(tokens) < predict:
                logprobs = self._decode(token)
                met(logprobs)
        return tokens

    def _ask(self, question: Sequence[int]) -> tuple[Floats, float]:
        if not question:
            assert self._logprobs is not None
            return self._logprobs, 0.0
        clock = time.perf_counter()
        self.llm.eval(question)
        return log_softmax(last_logits(self.llm)), time.perf_counter() - clock

    def _cost(self, setting: Setting) -> Cost | None:
        """Compress, if there is a policy, and say what is held; None without a compressing cache."""
        if setting.policy is not None:
            return self._compress()
        return self._held() if self.llm.kv_config else None

    def _held(self) -> Cost:
        stats = self.llm.kv.stats()
        return Cost(stats.kv_bytes, stats.entries_held, stats.entries_full)

    def _compress(self, policy: str | Policy | None = None) -> Cost:
        before = self.llm.kv.stats()
        probing = self._look(policy) if probes(policy) else Seconds(0.0, 0.0)
        clock, cpu = time.perf_counter(), time.process_time()
        self.llm.kv.compress()
        seconds, cpu_seconds = probing.clock + time.perf_counter() - clock, probing.cpu + time.process_time() - cpu
        stats = self.llm.kv.stats()
        score, *rest = (
            getattr(stats, name) - getattr(before, name) for name in ("score_seconds", "select_seconds", "compact_seconds")
        )
        total = score + sum(rest)
        return Cost(stats.kv_bytes, stats.entries_held, stats.entries_full, seconds, cpu_seconds, score / total if total else 0.0)

    def _look(self, policy: str | Policy | None) -> Seconds:
        """Let the probe look at the document, or remember what it saw for another budget: what it took."""
        if self._probe is None:
            raise _core.LaproxError(f"{policy} is for documents with a chat's questions; this one has no prompt to repeat it")
        by = plain(policy), str(untyped(policy)).endswith(REFIT)
        if self._found is not None and self._found[0] == by:
            _core.probe_again(self.llm.ctx, self._found[1])
        else:
            clock, cpu = time.perf_counter(), time.process_time()
            look(self.llm, self._probe, refit=by[1])
            took = Seconds(time.perf_counter() - clock, time.process_time() - cpu)
            self._found = by, _core.probe_found(self.llm.ctx), took
        return self._found[2]

    def _decode(self, token: int) -> Floats:
        clock = time.perf_counter()
        self.llm.eval([token])
        logits = last_logits(self.llm)
        self.decoding.seconds += time.perf_counter() - clock
        self.decoding.tokens += 1
        return log_softmax(logits)


def made_with(policy: str | Policy | None) -> str:
    """The policy that a context must be made with for this one: "laprox" but for those that collect something from the start.

    Expected Attention sums up queries and gates mark tokens while a document is read, if the context was made for that. A
    context that is made with "expected" serves all but "retention".
    """
    policy = plain(policy)
    meaning = dict(zip(_core.policies(), _core.meanings())).get(policy, policy) if isinstance(policy, str) else ""
    scorer = meaning.partition(":")[0]
    return scorer if scorer in ("expected", "retention") else "laprox"
