"""Documents with questions, of any length in tokens of the model that reads them, made from a seed.

They are the families of RULER (arXiv 2404.06654) in our own words and our own generators: needles, variables, common words,
and questions about given paragraphs. Answers are greedy, and the share of what they had to name counts.

The same arguments give the same document, whatever else is measured.
"""

from __future__ import annotations

import random
import re
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from laprox.chat.reading import read_jsonl
from laprox.eval import english

QA = "qa"
TASKS = ("niah-single", "niah-multikey", "niah-multikey-dense", "niah-multivalue", "niah-multiquery", "niah-uuid",
         "variable-tracking", "common-words", QA)  # fmt: skip
GROUPS = {"ruler": tuple(task for task in TASKS if task != QA)}  # qa needs paragraphs

_NEEDLES = 4  # keys, values or queries where there are several
_HOPS = 4
_COMMON = 10


@dataclass(frozen=True)
class Question:
    """A question about a document, and what counts as an answer.

    Attributes:
        task: One of TASKS, or a dataset of LongBench.
        text: Follows the document.
        references: What an answer is compared with.
        metric: A name that `laprox.eval.metrics.score` knows.
        prefix: The beginning of the reply that the model is given.
        predict: Longest reply in tokens.
        classes: Of a classification, their names.
        first_line: Only the first line of a reply counts.
        stop: What ends a reply, where the model has no token for it.
    """

    task: str
    text: str
    references: tuple[str, ...]
    metric: str
    prefix: str = ""
    predict: int = 0
    classes: tuple[str, ...] = ()
    first_line: bool = False
    stop: tuple[str, ...] = ()

    def counted(self, answer: str) -> str:
        """What of a reply counts."""
        for stop in self.stop:
            answer = answer.partition(stop)[0]
        return answer.lstrip("\n").partition("\n")[0] if self.first_line else answer


@dataclass(frozen=True)
class Sample:
    """A document and questions about it; each is asked for itself.

    Attributes:
        document: The text that is read once.
        questions: At least one.
        between: White space between document and question.
        chat: Whether the model's chat template is put around them.
    """

    document: str
    questions: tuple[Question, ...]
    between: str = "\n\n"
    chat: bool = True


@dataclass(frozen=True)
class Paragraph:
    """A question, its answers, and the paragraph that has them."""

    question: str
    answers: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Maker:
    """Makes samples.

    Attributes:
        count: Tokens of a text.
        seed: Another seed, other documents.
        questions: At most so many about one document, where a task has several.
        filler: Sentences to hide needles among, in their order; none: generated ones.
        paragraphs: For the task "qa".
    """

    count: Callable[[str], int]
    seed: int = 1
    questions: int = 5
    filler: Sequence[str] = ()
    paragraphs: Sequence[Paragraph] = field(default=(), repr=False)

    def samples(self, tasks: Sequence[str], length: int, number: int) -> list[tuple[str, Sample]]:
        """The documents of this number for some tasks, each with its family, which is the task's name.

        Args:
            tasks: Of TASKS.
            length: Of a document in tokens; it is at most one sentence (or paragraph) shorter.
            number: From 0 on; another number, another document.

        Raises:
            ValueError: The length is too short for a task, or there are too few paragraphs.
        """
        made: list[tuple[str, Sample]] = []
        for task in tasks:
            rng = random.Random(f"laprox eval {task} {self.seed} {length} {number}")
            made.append((task, _FAMILIES[task](self, rng, length, number)))
        return made

    # --- needles -----------------------------------------------------------------------------------------------------

    def _single(self, rng: random.Random, length: int, number: int) -> Sample:
        (name,), (value,) = _names(rng, 1), _numbers(rng, 1)
        document = self._hide(rng, "niah-single", [_needle(name, value)], length)
        return Sample(document, (self._asked("niah-single", [name], [value]),))

    def _multikey(self, rng: random.Random, length: int, number: int) -> Sample:
        return self._each(rng, "niah-multikey", _names(rng, _NEEDLES), _numbers(rng, _NEEDLES), length)

    def _uuid(self, rng: random.Random, length: int, number: int) -> Sample:
        return self._each(rng, "niah-uuid", _names(rng, _NEEDLES), _uuids(rng, _NEEDLES), length)

    def _each(self, rng: random.Random, task: str, names: Sequence[str], values: Sequence[str], length: int) -> Sample:
        document = self._hide(rng, task, list(map(_needle, names, values)), length)
        pairs = list(zip(names, values))[: self.questions]
        return Sample(document, tuple(self._asked(task, [name], [value]) for name, value in pairs))

    def _multikey_dense(self, rng: random.Random, length: int, number: int) -> Sample:
        n = max(2, 2 * length // self.count(_needle("Narei", "1234567")))  # more than fit
        names, values = _names(rng, n), _numbers(rng, n)
        needles = _fitting(map(_needle, names, values), length, self.count)
        if len(needles) < 2:
            raise ValueError(f"--lengths has {length}, too short for niah-multikey-dense")
        asked = rng.sample(range(len(needles)), min(self.questions, len(needles)))
        return Sample(" ".join(needles), tuple(self._asked("niah-multikey-dense", [names[i]], [values[i]]) for i in asked))

    def _multivalue(self, rng: random.Random, length: int, number: int) -> Sample:
        (name,), values = _names(rng, 1), _numbers(rng, _NEEDLES)
        document = self._hide(rng, "niah-multivalue", [f"One secret number of {name} is {value}." for value in values], length)
        return Sample(document, (self._asked("niah-multivalue", [name], values),))

    def _multiquery(self, rng: random.Random, length: int, number: int) -> Sample:
        names, values = _names(rng, _NEEDLES), _numbers(rng, _NEEDLES)
        document = self._hide(rng, "niah-multiquery", list(map(_needle, names, values)), length)
        return Sample(document, (self._asked("niah-multiquery", names, values),))

    def _asked(self, task: str, names: Sequence[str], values: Sequence[str]) -> Question:
        of = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        what, verb = ("number", "is") if len(values) == 1 else ("numbers", "are")
        every = "all " if len(values) > len(names) else ""
        return self._question(task, f"What {verb} {every}the secret {what} of {of}?", values, f"The secret {what} of {of} {verb}")

    # --- variables, words, paragraphs --------------------------------------------------------------------------------

    def _variables(self, rng: random.Random, length: int, number: int) -> Sample:
        letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        names = english.distinct(lambda: "".join(rng.choices(letters, k=5)), 2 * (_HOPS + 1))
        values = english.distinct(lambda: str(rng.randrange(10_000, 100_000)), 2)
        chains, sentences = [names[: _HOPS + 1], names[_HOPS + 1 :]], []
        for chain, value in zip(chains, values):
            sentences.append([f"Set {a} to {b}." for a, b in zip(chain, [value, *chain])])
        # In any order, but each chain in its own.
        turns = [i for i, chain in enumerate(sentences) for _ in chain]
        rng.shuffle(turns)
        left = [iter(chain) for chain in sentences]
        intro = "Some sentences of this text set a variable, to a number or to what another variable was set to."
        document = self._hide(rng, "variable-tracking", [next(left[i]) for i in turns], length, intro)
        return Sample(document, tuple(
            self._question("variable-tracking", f"Which {len(chain)} variables have the value {value}?", chain,
                           f"The {len(chain)} variables with the value {value} are")
            for chain, value in list(zip(chains, values))[: self.questions]))  # fmt: skip

    def _common_words(self, rng: random.Random, length: int, number: int) -> Sample:
        often, seldom = (6, 1) if length < 4096 else (30, 3)
        words = english.distinct(lambda: english.made_up_word(rng).lower(), _COMMON + max(1, length // (2 * seldom)))
        common, others = words[:_COMMON], words[_COMMON:]
        intro = "This is a numbered list of words. Some of them come more often than the others."
        shuffled = rng.random()

        def text(n: int) -> str:
            listed = common * often + others[:n] * seldom
            random.Random(shuffled).shuffle(listed)
            return f"{intro}\n" + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))

        fits, too_many = 0, len(others) + 1
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            fits, too_many = (middle, too_many) if self.count(text(middle)) <= length else (fits, middle)
        if not fits:
            raise ValueError(
                f"--lengths has {length}, too short for common-words: the common words alone are {self.count(text(0))} tokens"
            )
        ask = f"Which {_COMMON} words come most often in the list?"
        return Sample(text(fits), (self._question("common-words", ask, common, f"The {_COMMON} words that come most often are"),))

    def _paragraphs(self, rng: random.Random, length: int, number: int) -> Sample:
        order = list(range(len(self.paragraphs)))
        random.Random(f"laprox eval qa {self.seed}").shuffle(order)
        if number >= len(order):
            raise ValueError(f"--paragraphs has {len(order)} questions, fewer than --documents")
        asked = self.paragraphs[order[number]]
        others = list(dict.fromkeys(p.text for p in self.paragraphs if p.text != asked.text))
        rng.shuffle(others)

        def text(chosen: Sequence[str]) -> str:
            return "\n\n".join(f"Paragraph {i}:\n{paragraph}" for i, paragraph in enumerate(chosen, 1))

        chosen, used, missed = [asked.text], self.count(text([asked.text])), 0
        if used > length:
            raise ValueError(f"--lengths has {length}, too short for the paragraph of {asked.question!r}, which is {used} tokens")
        for paragraph in others:
            n = self.count("\n\n" + text([paragraph]))
            if used + n > length:
                missed += 1
                if missed > 20:
                    break
                continue
            chosen.append(paragraph)
            used += n
        if not missed and used < 0.9 * length:
            raise ValueError(f"--paragraphs has {used:,} tokens only, too few for documents of {length:,}")
        rng.shuffle(chosen)
        while self.count(text(chosen)) > length and len(chosen) > 1:
            chosen.remove(next(p for p in chosen if p != asked.text))
        ask = f"Answer with a few words from the paragraphs, and nothing else: {asked.question}"
        question = Question(QA, ask, asked.answers, "any", "", max(32, 2 * max(map(self.count, asked.answers))))
        return Sample(text(chosen), (question,))

    # --- all of them -------------------------------------------------------------------------------------------------

    def _question(self, task: str, text: str, references: Sequence[str], prefix: str) -> Question:
        room = 24 + 2 * sum(self.count(" " + reference) for reference in references)  # for models that say more than asked
        return Question(task, text, tuple(references), "recall", prefix, room)

    def _hide(self, rng: random.Random, task: str, needles: Sequence[str], length: int, intro: str = "") -> str:
        """Needles in their order among filler, after an introduction."""
        source = self._sentences(rng)
        chosen: list[str] = []
        fixed = [intro, *needles] if intro else list(needles)
        used = self.count(" ".join(fixed))
        if used > length:
            raise ValueError(f"--lengths has {length}, too short for {task}: its needles alone are {used} tokens")
        places: list[float] = sorted(rng.random() for _ in needles)

        def text() -> str:
            parts, rest = [intro] if intro else [], list(zip(places, needles))
            for i, sentence in enumerate(chosen):
                while rest and rest[0][0] * len(chosen) <= i:
                    parts.append(rest.pop(0)[1])
                parts.append(sentence)
            return " ".join(parts + [needle for _, needle in rest])

        # Sentences one by one may count for more or fewer tokens than together, so this is looked at again.
        while more := _fitting(source, length - self.count(text()), self.count):
            chosen += more
        while chosen and self.count(text()) > length:
            chosen.pop()
        return text()

    def _sentences(self, rng: random.Random) -> Iterator[str]:
        if not self.filler:
            while True:
                yield english.sentence(rng)
        start = rng.randrange(len(self.filler))
        while True:
            yield from self.filler[start:]
            start = 0


_FAMILIES: dict[str, Callable[[Maker, random.Random, int, int], Sample]] = {
    "niah-single": Maker._single,
    "niah-multikey": Maker._multikey,
    "niah-multikey-dense": Maker._multikey_dense,
    "niah-multivalue": Maker._multivalue,
    "niah-multiquery": Maker._multiquery,
    "niah-uuid": Maker._uuid,
    "variable-tracking": Maker._variables,
    "common-words": Maker._common_words,
    QA: Maker._paragraphs,
}


def choose_tasks(names: str) -> list[str]:
    """The tasks of a list such as "ruler,qa", in the order of TASKS. The group "ruler" is all of them but "qa".

    Raises:
        ValueError: There is no such task.
    """
    wanted: set[str] = set()
    for name in filter(None, map(str.strip, names.split(","))):
        if name not in TASKS and name not in GROUPS:
            raise ValueError(f"--tasks has {name!r}; accepted: {', '.join([*GROUPS, *TASKS])}")
        wanted.update(GROUPS.get(name, (name,)))
    return [task for task in TASKS if task in wanted]


def sentences(text: str) -> list[str]:
    """A text cut after ".", "!" and "?"."""
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]


def read_paragraphs(path: Path) -> list[Paragraph]:
    """Lines of {"question": ..., "answers": [...], "context": ...} from a .jsonl file.

    Raises:
        ValueError: It can't be read, or a line is something else; names it.
    """
    found = []
    for source, data in read_jsonl(path):
        question, answers, context = data.get("question"), data.get("answers"), data.get("context")
        for name, value in (("question", question), ("context", context)):
            if not isinstance(value, str) or not value.strip():
                raise ValueError(f'{source}: "{name}" must be a text')
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise ValueError(f'{source}: "answers" must be a list of at least one text')
        found.append(Paragraph(str(question).strip(), tuple(answers), str(context).strip()))
    return found


def _needle(name: str, value: str) -> str:
    return f"The secret number of {name} is {value}."


def _names(rng: random.Random, n: int) -> list[str]:
    return english.distinct(lambda: english.made_up_word(rng), n)


def _numbers(rng: random.Random, n: int) -> list[str]:
    return english.distinct(lambda: str(rng.randrange(1_000_000, 10_000_000)), n)


def _uuids(rng: random.Random, n: int) -> list[str]:
    return english.distinct(lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)), n)


def _fitting(texts: Iterator[str], length: int, count: Callable[[str], int]) -> list[str]:
    """The first texts, one sentence each, that fit into so many tokens."""
    found = []
    for text in texts:
        length -= count(" " + text)
        if length < 0:
            break
        found.append(text)
    return found
