"""LongBench (arXiv 2308.14508): its files, its prompts and its metrics. Files and prompts are the user's.

A file has a line per question, {"input", "context", "answers", "all_classes", "dataset", "language", "length", "_id"}.
Prompts are a JSON of dataset -> template with {context} and {input}, and one of dataset -> longest answer in tokens, as
LongBench publishes them.

Three of its datasets are refused: multifieldqa_zh, dureader and vcsum are scored word by word, and Chinese words take a
segmenter that we don't have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laprox.chat.reading import read_json, read_jsonl
from laprox.eval import metrics
from laprox.eval.tasks import Question, Sample

DATASETS = {  # -> metric
    "narrativeqa": "f1",
    "qasper": "f1",
    "multifieldqa_en": "f1",
    "hotpotqa": "f1",
    "2wikimqa": "f1",
    "musique": "f1",
    "gov_report": "rouge-l",
    "qmsum": "rouge-l",
    "multi_news": "rouge-l",
    "trec": "classification",
    "triviaqa": "f1",
    "samsum": "rouge-l",
    "lsht": "classification",
    "passage_retrieval_en": "retrieval",
    "passage_retrieval_zh": "retrieval",
    "passage_count": "count",
    "lcc": "code",
    "repobench-p": "code",
}
UNSUPPORTED = ("multifieldqa_zh", "dureader", "vcsum")
_FEW_SHOT = ("trec", "triviaqa", "samsum", "lsht")  # the model goes on with examples, of which only the first line is its own
_CODE = ("lcc", "repobench-p")


@dataclass(frozen=True)
class Line:
    """One question of LongBench.

    Attributes:
        source: "FILE line N", for messages.
        dataset: Of DATASETS.
        head: The prompt up to the end of the context,
        tail: and what follows it.
        answers: Each of them is right.
        classes: Of a classification.
        predict: Longest answer in tokens.
    """

    source: str
    dataset: str
    head: str
    tail: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    predict: int


def read_prompts(templates: Path, lengths: Path) -> dict[str, tuple[str, int]]:
    """The template and the longest answer of each dataset.

    Args:
        templates: A JSON of dataset -> template (LongBench's dataset2prompt.json).
        lengths: A JSON of dataset -> tokens (LongBench's dataset2maxlen.json).

    Raises:
        ValueError: A file is something else; names it.
    """
    prompts, tokens = read_json(templates), read_json(lengths)
    for dataset, template in prompts.items():
        if not isinstance(template, str) or "{context}" not in template:
            raise ValueError(f"{templates}: the template of {dataset} must be a text with {{context}} in it")
        if dataset in tokens and (not isinstance(tokens[dataset], int) or tokens[dataset] < 1):
            raise ValueError(f"{lengths}: {dataset} is {tokens[dataset]!r}; accepted: a number of tokens of at least 1")
    return {dataset: (template, tokens[dataset]) for dataset, template in prompts.items() if dataset in tokens}


def read_lines(path: Path, prompts: dict[str, tuple[str, int]]) -> list[Line]:
    """The questions of a file. Its dataset is the field "dataset", or else the file's name (also with "_e").

    Raises:
        ValueError: It can't be read, a line is something else, or the dataset has no prompt or no metric here.
    """
    found = []
    for source, data in read_jsonl(path):
        dataset = str(data.get("dataset") or path.stem).removesuffix("_e")
        if dataset in UNSUPPORTED:
            raise ValueError(
                f"{source}: {dataset} is scored by Chinese words, which laprox can't tell apart; the other datasets work"
            )
        if dataset not in DATASETS:
            raise ValueError(f"{source}: the dataset is {dataset!r}; accepted: {', '.join(DATASETS)}")
        if dataset not in prompts:
            raise ValueError(f"{source}: --prompts and --max-lengths don't both have {dataset}")
        context, asked, answers = data.get("context"), data.get("input"), data.get("answers")
        if not isinstance(context, str) or not isinstance(asked, str):
            raise ValueError(f'{source}: "context" and "input" must be texts')
        if not isinstance(answers, list) or not answers or not all(isinstance(a, str) for a in answers):
            raise ValueError(f'{source}: "answers" must be a list of at least one text')
        classes = data.get("all_classes") or []
        if DATASETS[dataset] == "classification" and not classes:
            raise ValueError(f'{source}: "all_classes" must name the classes')
        template, predict = prompts[dataset]
        before, _, after = template.partition("{context}")
        head, tail = (_fill(part, context, asked) for part in (before + "{context}", after))
        found.append(Line(source, dataset, head, tail, tuple(answers), tuple(classes), predict))
    return found


def sample(
    line: Line, longest: int, tokenize: Callable[[str], list[int]], detokenize: Callable[[Sequence[int]], str], chat: bool
) -> Sample:
    """A question to be read by a model, which has a template for `chat` or not.

    A prompt of more than `longest` tokens loses its middle: its first and its last half of so many tokens remain. As in
    LongBench, a chat template is put around it only where the model is not to go on with examples or code.
    """
    head, tail = line.head, line.tail
    tokens = tokenize(head + tail)
    if len(tokens) > longest:
        half = longest // 2
        text = detokenize(tokens[:half]) + detokenize(tokens[-half:])
        # What follows the context is still told apart from it, unless the cut went through it.
        head, tail = (text.removesuffix(tail), tail) if text.endswith(tail) else (text, "")
    question = Question(line.dataset, tail, line.answers, DATASETS[line.dataset], "", line.predict, line.classes,
                        first_line=line.dataset in _FEW_SHOT)  # fmt: skip
    return Sample(head, (question,), between="", chat=chat and line.dataset not in _FEW_SHOT + _CODE)


def check_packages(lines: Sequence[Line]) -> None:
    """Raises MissingExtra if a metric of these needs a package that is not installed."""
    metrics.check_packages({DATASETS[line.dataset] for line in lines})


def _fill(template: str, context: str, asked: str) -> str:
    """Without str.format: neither braces in a template's examples nor those in a context mean anything."""
    before, mark, after = template.partition("{context}")
    return before.replace("{input}", asked) + (context if mark else "") + after.replace("{input}", asked)
