"""Documents and questions of `laprox eval` as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llama_cpp._internals import LlamaModel

from laprox.cli.conversation import Conversation
from laprox.eval import longbench, tasks
from laprox.eval.reader import Setting
from laprox.eval.summary import Key, key
from laprox.eval.trials import Prompt


@dataclass(frozen=True)
class Job:
    """A document to read, and what to ask about it."""

    family: str
    length: int
    number: int
    opening: list[int]
    prompts: tuple[Prompt, ...]

    @property
    def tokens(self) -> int:
        """The longest that the cache has to hold."""
        return len(self.opening) + max(len(p.tokens) + p.question.predict for p in self.prompts)

    @property
    def weight(self) -> float:
        """About how long all its questions take under one setting, for the progress bar."""
        return float(len(self.opening) * len(self.prompts))

    def key(self, i: int, setting: Setting | None = None) -> Key:
        """Of the row of question i."""
        cell = (setting.regime, setting.policy, setting.budget) if setting else ()
        return key(self.family, self.length, self.number, i, *cell)


def task_jobs(vocabulary: LlamaModel, maker: tasks.Maker, chosen: Sequence[str], lengths: Sequence[int], n: int) -> Iterator[Job]:
    """Documents of tasks, by number first: what an interrupted run has measured is then of every task and length.

    Raises:
        ValueError: A length is too short for a task.
    """
    for number in range(n):
        for length in lengths:
            for family, sample in maker.samples(chosen, length, number):
                yield Job(family, length, number, *_encode(vocabulary, sample))


def longbench_jobs(vocabulary: LlamaModel, lines: Sequence[longbench.Line], max_prompt: int) -> Iterator[Job]:
    """Questions of LongBench, each with its own document, cut to `max_prompt` tokens; 0: to what the model was trained for.

    Raises:
        ValueError: Nothing would be left of a prompt.
    """
    conversation = Conversation(vocabulary, "")
    around = len(conversation.prompt("")) + 8
    numbers: dict[str, int] = {}
    for line in lines:
        longest = max_prompt or conversation.trained_for - line.predict - around
        if longest < 64:
            raise ValueError(
                f"--max-prompt is {max_prompt} and the model was trained for {conversation.trained_for} tokens: too few"
            )
        sample = longbench.sample(
            line, longest, lambda text: tokens_of(vocabulary, text), lambda t: text_of(vocabulary, t), chat=not conversation.stop
        )
        number = numbers[line.dataset] = numbers.get(line.dataset, -1) + 1
        yield Job(f"longbench {line.dataset}", max_prompt, number, *_encode(vocabulary, sample))


def _encode(vocabulary: LlamaModel, sample: tasks.Sample) -> tuple[list[int], tuple[Prompt, ...]]:
    """The tokens that every question's prompt begins with, and what follows in each."""
    if sample.chat:
        conversation = Conversation(vocabulary, sample.document, sample.between)
        whole = [conversation.prompt(question.text) for question in sample.questions]
        opening = conversation.opening()
    else:
        opening = vocabulary.tokenize(b"", add_bos=True, special=False) + tokens_of(vocabulary, sample.document)
        whole = [opening + tokens_of(vocabulary, sample.between + question.text) for question in sample.questions]
    # A question that begins like another one may share more tokens with the opening than belong to it, or fewer.
    n = min([len(opening), *(_shared(opening, prompt) for prompt in whole), *(len(prompt) - 1 for prompt in whole)])
    prompts = []
    for question, prompt in zip(sample.questions, whole):
        begin = tokens_of(vocabulary, _space(vocabulary, prompt) + question.prefix) if question.prefix else []
        prompts.append(Prompt(question, prompt[n:] + begin))
    return opening[:n], tuple(prompts)


def _space(vocabulary: LlamaModel, prompt: Sequence[int]) -> str:
    """What a reply begins with: a space, unless the prompt ends with white space or a control token, or the tokenizer adds it."""
    if vocabulary.metadata().get("tokenizer.ggml.model") == "llama":
        return ""
    last = text_of(vocabulary, prompt[-1:])  # nothing, if it is a control token
    return " " if last and not last[-1].isspace() else ""


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def tokens_of(vocabulary: LlamaModel, text: str) -> list[int]:
    """A text that is part of a prompt; nothing in it is a control token."""
    return vocabulary.tokenize(text.encode(), add_bos=False, special=False) if text else []


def text_of(vocabulary: LlamaModel, tokens: Sequence[int]) -> str:
    """What tokens say, control tokens left out."""
    return vocabulary.detokenize(list(tokens)).decode(errors="replace")


def context_size(vocabulary: LlamaModel, jobs: Sequence[Job], wanted: int) -> int:
    """Room for the longest document with question and answer, within what the model was trained for unless it is told otherwise.

    Raises:
        ValueError: There is not as much.
    """
    longest = max(jobs, key=lambda job: job.tokens)
    trained = Conversation(vocabulary, "").trained_for
    if wanted and wanted < longest.tokens:
        raise ValueError(f"{longest.family} takes {longest.tokens:,} tokens, too many for -c {wanted}")
    if not wanted and trained and trained < longest.tokens:
        raise ValueError(
            f"{longest.family} takes {longest.tokens:,} tokens, but the model was trained for {trained:,}: shorter --lengths "
            f"(or insist: -c {longest.tokens})"
        )
    return wanted or longest.tokens
