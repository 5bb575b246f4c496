"""Documents and questions of `laprox eval` as tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_cpp._internals import LlamaModel

from laprox.cli.conversation import Conversation
from laprox.eval import books, longbench, tasks
from laprox.eval.reader import Setting
from laprox.eval.summary import Key, key
from laprox.eval.trials import Prompt

BOOK_ANSWER = 24  # tokens, at most


@dataclass(frozen=True)
class Job:
    """A document to read, and what to ask about it."""

    family: str
    length: int
    number: int
    opening: list[int]
    prompts: tuple[Prompt, ...]
    head: int = 0  # tokens of the opening before the document itself

    @property
    def tokens(self) -> int:
        """The longest that the cache has to hold."""
        asked = max(max(len(p.tokens), len(p.after)) + p.question.predict for p in self.prompts)
        before = len(self.prompts[0].tokens) + self.prompts[0].question.predict if self.prompts[0].after else 0
        return len(self.opening) + before + asked

    @property
    def weight(self) -> float:
        """About how long all its questions take under one setting, for the progress bar."""
        return float(len(self.opening) * len(self.prompts))

    def questions(self, setting: Setting | None = None) -> range:
        """Those that are asked under a setting: a follow-up has one before it."""
        if setting is None or setting.regime != "follow-up":
            return range(len(self.prompts))
        return range(1, len(self.prompts) if self.prompts[0].after else 0)

    def key(self, i: int, setting: Setting | None = None) -> Key:
        """Of the row of question i."""
        cell = (setting.regime, setting.policy or "full", setting.budget) if setting else ()
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


def book_jobs(
    vocabulary: LlamaModel, documents: Sequence[books.Document], folder: Path, lengths: Sequence[int], n: int, questions: int
) -> Iterator[Job]:
    """The first n documents about as long as each of the lengths, to within a fifth, with at most so many questions each.

    Raises:
        ValueError: A book is missing or another edition, or there is no document of a length.
    """
    texts = [document.text(folder) for document in documents]
    sizes = [len(tokens_of(vocabulary, text)) for text in texts]
    chosen = [(length, [i for i, size in enumerate(sizes) if abs(size - length) <= length / 5][:n]) for length in lengths]
    for length, found in chosen:
        if not found:
            raise ValueError(f"--lengths has {length:,}, but no document is as long; accepted: {', '.join(map(str, sorted(sizes)))}")
    for number in range(n):
        for length, found in chosen:
            if number < len(found):
                i = found[number]
                asked = tuple(
                    tasks.Question("books", f"{q.text} Answer in a few words.", q.answers, "any", predict=BOOK_ANSWER)
                    for q in documents[i].questions[:questions]
                )
                yield Job("books", length, number, *_encode(vocabulary, tasks.Sample(texts[i], asked)))


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


def _encode(vocabulary: LlamaModel, sample: tasks.Sample) -> tuple[list[int], tuple[Prompt, ...], int]:
    """The tokens that every question's prompt begins with, what follows in each, and how many come before the document."""
    if sample.chat:
        conversation = Conversation(vocabulary, sample.document, sample.between)
        whole = [conversation.prompt(question.text) for question in sample.questions]
        later = [conversation.next_turn(question.text) for question in sample.questions]
        opening, head = conversation.opening(), conversation.document_begin()
    else:
        start = vocabulary.tokenize(b"", add_bos=True, special=False)
        opening, head = start + tokens_of(vocabulary, sample.document), len(start)
        whole = [opening + tokens_of(vocabulary, sample.between + question.text) for question in sample.questions]
        later = [[] for _ in whole]
    # A question that begins like another one may share more tokens with the opening than belong to it, or fewer.
    n = min([len(opening), *(_shared(opening, prompt) for prompt in whole), *(len(prompt) - 1 for prompt in whole)])
    prompts = []
    for question, prompt, after in zip(sample.questions, whole, later):
        begin = tokens_of(vocabulary, _space(vocabulary, prompt) + question.prefix) if question.prefix else []
        prompts.append(Prompt(question, prompt[n:] + begin, after + begin if after else ()))
    return opening[:n], tuple(prompts), min(head, n)


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
