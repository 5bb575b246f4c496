"""From contexts to a file: which questions are asked, the table that comes out, and the run that makes it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from laprox import KVConfig, LaproxError, Llama, __version__, _core
from laprox._upstream import LlamaModel
from laprox.cache_types import name_of
from laprox.chat.conversation import Conversation
from laprox.chat.loading import Loader, load_weights
from laprox.chat.tokens import n_shared
from laprox.files import Partial, check_writable, replacing
from laprox.profile.contexts import Context
from laprox.profile.measure import SEED, STEPS, TEMPERATURE, Profiler, Sample, observing

Floats = npt.NDArray[np.float64]


def sample(context: Context, vocabulary: LlamaModel) -> Sample:
    """A context and its questions as tokens."""
    conversation = Conversation(vocabulary, context.text)
    prompts = [conversation.prompt(question) for question in context.questions]
    n = n_shared(*prompts, conversation.opening())
    return Sample(context.source, prompts[0][:n], [prompt[n:] for prompt in prompts])


def choose(samples: Sequence[Sample], n: int) -> list[Sample]:
    """At most n questions: the first of each context, then the second of each ..."""
    turns = sorted((turn, i) for i, sample in enumerate(samples) for turn in range(len(sample.questions)))
    asked = [0] * len(samples)
    for _, i in turns[:n]:
        asked[i] += 1
    return [Sample(s.name, s.context, s.questions[:count]) for s, count in zip(samples, asked) if count]


def check_lengths(samples: Sequence[Sample], config: KVConfig) -> None:
    """Raises ValueError unless there is something to choose in every context."""
    if not samples:
        raise ValueError("--data holds no context")
    least = 2 * (config.sink + config.recent)
    for sample in samples:
        n = len(sample.context)
        if n < least:
            raise ValueError(
                f"{sample.name}: the context is {n} tokens, of which {config.sink} + {config.recent} are kept in any case; "
                f"accepted: at least {least}"
            )


def spread(shares: Floats, llm: Llama) -> Floats:
    """[99, heads of the compressed layers] as [99, layers, KV heads]; the uniform share where there is no such head."""
    metadata = llm.metadata
    counts = metadata.get(f"{metadata.get('general.architecture')}.attention.head_count_kv", "")  # one for all, or a list
    layers = llm.kv.layers
    n_head_kv = max(*layers.values(), *map(int, re.findall(r"\d+", counts)))
    table = np.tile(np.arange(1, 100)[:, None, None] / 100, (1, llama_cpp.llama_model_n_layer(llm.model), n_head_kv))
    start = 0
    for layer, n in layers.items():
        table[:, layer, :n] = shares[:, start : start + n]
        start += n
    return table


def check_output(output: Path, inputs: Sequence[Path | None] = ()) -> None:
    """Raises ValueError if the table can't be written there: better now than after hours."""
    if output.suffix != ".gguf":
        raise ValueError(f"{output}: the table is a .gguf file, such as MODEL.kv-profile.gguf beside MODEL.gguf")
    check_writable(output, inputs)


def save(output: Path, model: Any, table: Floats, texts: dict[str, Any]) -> None:
    """Write a table of a model, as llama_cpp holds it: [99, layers, KV heads], and texts about it. Whole or not at all.

    Raises:
        ValueError, LaproxError: It is of another shape than the model's, or a share isn't in [0, 1].
    """
    with replacing(output) as unfinished:
        _core.profile_save(model, os.fsencode(unfinished), table, {name: str(value) for name, value in texts.items()})


def converted(curves: Path, output: Path, model: Path, scorer: str) -> Floats:
    """A published table, a .npy file, written as one of a model and a scorer.

    Raises:
        ValueError: It is no such table, or not one for the model; begins with its path.
        OSError: It can't be read.
    """
    weights = load_weights(model, use_extra_bufts=False)  # mapped, but neither read nor repacked
    try:
        with open(curves, "rb") as file:
            table = np.lib.format.read_array(file, allow_pickle=False)
        if table.dtype.kind != "f":
            raise ValueError(f"elements of type {table.dtype}; accepted: float64, float32, float16")
        save(output, weights.model, table, {"model": model.name, "scorer": scorer, "source": curves.name, "laprox": __version__})
    except (LaproxError, ValueError) as error:
        raise ValueError(f"{curves}: {error}") from None
    return table


@dataclass(frozen=True)
class Run:
    """A table to make.

    Attributes:
        output: The .gguf file. What is finished of it lies in a folder beside it.
        loader: Of the model.
        samples: What is read and asked.
        scorer: Ranks the entries of a head, here and when the table is used.
        config: The settings that the table will be used with.
        steps: Longest answer in tokens.
    """

    output: Path
    loader: Loader
    samples: Sequence[Sample]
    scorer: str = "laprox"
    config: KVConfig = KVConfig()
    steps: int = STEPS

    @property
    def n_questions(self) -> int:
        """Of all samples."""
        return sum(len(sample.questions) for sample in self.samples)

    @property
    def n_ctx(self) -> int:
        """Tokens of the longest context with question and answer."""
        return max(len(s.context) + max(map(len, s.questions)) for s in self.samples) + self.steps

    def make(self, restart: bool = False, told: Callable[[str, int], None] = lambda what, done: None) -> Floats:
        """Measure what is missing and write the table: [99, layers, KV heads].

        Args:
            restart: Begin anew instead of going on with an interrupted run.
            told: Is called with what is done now, and how many questions are.

        Raises:
            ValueError: The model can't be loaded, or the interrupted run has other settings.
        """
        llm = self.loader.open(self.n_ctx, observing(self.config, self.steps))
        settings = self._settings(llm)
        partial = Partial(self.output, settings, restart)
        self._measure(Profiler(llm, self.scorer, self.config, self.steps), partial, told)
        parts = [np.load(partial.path(_part(i))) for i in range(self.n_questions)]
        table = spread(np.mean(parts, axis=0), llm)
        save(self.output, llm.model, table, settings)
        partial.remove()
        return table

    def _measure(self, profiler: Profiler, partial: Partial, told: Callable[[str, int], None]) -> None:
        done = sum(_part(i) in partial for i in range(self.n_questions))
        first = 0
        for number, sample in enumerate(self.samples, 1):
            parts = range(first, first := first + len(sample.questions))
            missing = [(i, question) for i, question in zip(parts, sample.questions) if _part(i) not in partial]
            if not missing:
                continue
            told(f"reading context {number} of {len(self.samples)}", done)
            profiler.read(sample.context)
            for i, question in missing:
                told(f"asking about context {number} of {len(self.samples)}", done)
                shares = profiler.ask(question, seed=i)
                with replacing(partial.path(_part(i))) as unfinished, open(unfinished, "wb") as file:
                    np.save(file, shares)
                done += 1

    def _settings(self, llm: Llama) -> dict[str, Any]:
        """What decides the numbers."""
        data = json.dumps([[s.context, s.questions] for s in self.samples])
        return {
            "model": self.loader.path.name,
            "model_fingerprint": _core.model_fingerprint(llm.model),
            "scorer": self.scorer,
            "window": self.config.window,
            "sink": self.config.sink,
            "recent": self.config.recent,
            "tokens": self.steps,
            "samples": self.n_questions,
            "data": hashlib.sha256(data.encode()).hexdigest()[:16],
            "temperature": TEMPERATURE,
            "seed": SEED,
            "cache": ", ".join(name_of(given) for given in (llm.context_params.type_k, llm.context_params.type_v)),
            "laprox": __version__,
        }


def _part(i: int) -> str:
    """The file of a question's shares."""
    return f"{i:06}.npy"
