"""Documents and questions as tokens: one job for each document, whatever it is measured for."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from laprox._upstream import LlamaModel
from laprox.chat.conversation import Conversation
from laprox.chat.tokens import check_context, n_shared, text_of, tokens_of, trained_for
from laprox.eval import books, longbench, tasks
from laprox.eval.facts import insert_facts
from laprox.eval.trials import Prompt
from laprox.read.probe import Probe, repeating

BOOK_ANSWER = 24  # tokens, at most
LEAST = 1024  # tokens of somebody's own document, without its end
FACTS, CONTINUATION = "facts", "continuation"  # tasks of somebody's own document


@dataclass(frozen=True)
class Job:
    """A document to read, and what to ask about it.

    Attributes:
        family: Of documents; with length and number it names this one.
        length: In tokens, as it was asked for; 0: as it is.
        number: Among those of its family and length.
        opening: Tokens that every prompt begins with.
        prompts: What follows, at least one.
        head: Tokens of the opening before the document itself.
        probe: Of the opening; None: there is no prompt to repeat it.
        name: For messages.
    """

    family: str
    length: int
    number: int
    opening: list[int]
    prompts: tuple[Prompt, ...]
    head: int = 0
    probe: Probe | None = None
    name: str = ""

    def context(self, n_read: int | None = None) -> int:
        """Tokens that a context must hold which reads so many of the opening; all of them, if it isn't said."""
        asked = max(max(len(p.tokens), len(p.after)) + p.room for p in self.prompts)
        before = len(self.prompts[0].tokens) + self.prompts[0].room if self.prompts[0].after else 0
        probed = self.probe.context if self.probe and n_read is None else 0
        return max((len(self.opening) if n_read is None else n_read) + before + asked, probed)

    def end(self, n: int) -> list[int]:
        """Of n tokens, those before the document and as many of its last ones as there is room for."""
        return self.opening[: self.head] + self.opening[max(self.head, len(self.opening) - max(0, n - self.head)) :]

    def questions(self, regime: str = "") -> range:
        """Those that are asked under a regime: a follow-up has one before it."""
        if regime != "follow-up":
            return range(len(self.prompts))
        return range(1, len(self.prompts) if self.prompts[0].after else 1)


@dataclass(frozen=True)
class Facts:
    """What is put into somebody's own document and asked about.

    Attributes:
        n_questions: Of facts.
        n_continue: Tokens of the document's end to hold back.
        n_predict: Longest answer in tokens.
        seed: Of the facts.
        n_tokens: Tokens of the document to read, at most; 0: all.
    """

    n_questions: int = 10
    n_continue: int = 192
    n_predict: int = 48
    seed: int = 1
    n_tokens: int = 0


def task_jobs(vocabulary: LlamaModel, maker: tasks.Maker, chosen: Sequence[str], lengths: Sequence[int], n: int) -> Iterator[Job]:
    """Documents of tasks, by number first: what an interrupted run has measured is then of every task and length.

    Raises:
        ValueError: A length is too short for a task.
    """
    for number in range(n):
        for length in lengths:
            for family, sample in maker.samples(chosen, length, number):
                yield Job(family, length, number, *encode(vocabulary, sample))


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
                yield Job("books", length, number, *encode(vocabulary, tasks.Sample(texts[i], asked)))


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
        yield Job(f"longbench {line.dataset}", max_prompt, number, *encode(vocabulary, sample))


def fact_job(vocabulary: LlamaModel, text: str, about: Facts, name: str, number: int) -> Job:
    """Somebody's own document with facts in it, questions about them, and, as the last prompt, its end, which is held back.

    Raises:
        ValueError: It is too short; says how long it must be.
    """

    def cut(tokens: list[int]) -> int:
        """Where in the text these first tokens of it end, moved back to white space."""
        end = len(vocabulary.detokenize(tokens).decode(errors="ignore"))
        near = max(0, end - 200)
        spaces = [m.start() for m in re.finditer(r"\s+", text[near:end])]
        return near + spaces[-1] if spaces else end

    tokens = tokens_of(vocabulary, text)
    if about.n_tokens and len(tokens) > about.n_tokens:
        text = text[: cut(tokens[: about.n_tokens])]
        tokens = tokens_of(vocabulary, text)
    if len(tokens) < LEAST + about.n_continue:
        raise ValueError(
            f"{name} is {len(tokens):,} tokens, too short to compress: accepted are {LEAST + about.n_continue:,} and more"
            + (f" (--tokens {about.n_tokens} cuts it)" if about.n_tokens else "")
        )
    at = cut(tokens[: len(tokens) - about.n_continue])
    try:
        body, facts = insert_facts(text[:at], about.n_questions, about.seed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    stop = tuple(Conversation(vocabulary, "").stop)
    asked = tuple(tasks.Question(FACTS, q.text, (q.value,), "any", predict=about.n_predict, stop=stop) for q in facts)
    opening, prompts, head, _ = encode(vocabulary, tasks.Sample(body, asked), whole=False)
    read = opening[head:]
    if len(read) > 2 * len(tokens):
        raise ValueError(
            f"--questions {about.n_questions} puts {len(read) - len(tokens):,} tokens of facts into {name}, which is "
            f"{len(tokens):,} tokens itself: take fewer questions or a longer document"
        )
    # Some tokenizers put a space before a text, which is not there within one.
    both = tokens_of(vocabulary, body + text[at:])
    end = both[len(read) :] if both[: len(read)] == read else tokens_of(vocabulary, text[at:])
    told = Prompt(tasks.Question(CONTINUATION, "", (), "any"), [], told=end[: about.n_continue])
    asked_alone = [replace(prompt, after=()) for prompt in prompts]  # no question follows another one
    return Job(FACTS, 0, number, opening, (*asked_alone, told), head, name=name)


def encode(vocabulary: LlamaModel, sample: tasks.Sample, whole: bool = True) -> tuple[list[int], tuple[Prompt, ...], int, Probe | None]:
    """The tokens that every question's prompt begins with, what follows in each, how many come before the document, and a probe.

    Args:
        vocabulary: Of the model.
        sample: What to read and ask.
        whole: Whether the former are all that they have in common, or end with the document.
    """
    if sample.chat:
        conversation = Conversation(vocabulary, sample.document, sample.between)
        asked = [conversation.prompt(question.text) for question in sample.questions]
        later = [conversation.next_turn(question.text) for question in sample.questions]
        opening, head = conversation.opening(), conversation.document_begin()
        if not whole:
            opening = opening[: conversation.document_end()]
    else:
        start = vocabulary.tokenize(b"", add_bos=True, special=False)
        opening, head = start + tokens_of(vocabulary, sample.document), len(start)
        asked = [opening + tokens_of(vocabulary, sample.between + question.text) for question in sample.questions]
        later = [[] for _ in asked]
    # A question that begins like another one may share more tokens with the opening than belong to it, or fewer.
    n = min(n_shared(opening, *asked), *(len(prompt) - 1 for prompt in asked))
    prompts = []
    for question, prompt, after in zip(sample.questions, asked, later):
        begin = tokens_of(vocabulary, _space(vocabulary, prompt) + question.prefix) if question.prefix else []
        prompts.append(Prompt(question, prompt[n:] + begin, after + begin if after else ()))
    probe = None
    if sample.chat and sample.document and n >= conversation.document_end():
        probe = repeating(conversation, n)
    return opening[:n], tuple(prompts), min(head, n), probe


def _space(vocabulary: LlamaModel, prompt: Sequence[int]) -> str:
    """What a reply begins with: a space, unless the prompt ends with white space or a control token, or the tokenizer adds it."""
    if vocabulary.metadata().get("tokenizer.ggml.model") == "llama":
        return ""
    last = text_of(vocabulary, prompt[-1:])  # nothing, if it is a control token
    return " " if last and not last[-1].isspace() else ""


def context_size(vocabulary: LlamaModel, jobs: Sequence[Job], wanted: int) -> int:
    """Room for the longest document with question and answer, within what the model was trained for unless it is told otherwise.

    Raises:
        ValueError: There is not as much.
    """
    longest = max(jobs, key=lambda job: job.context())
    check_context(longest.family, longest.context(), wanted, trained_for(vocabulary), "shorter --lengths")
    return wanted or longest.context()
