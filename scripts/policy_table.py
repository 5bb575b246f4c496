#!/usr/bin/env python3
"""What each policy keeps of the demo model's answers: the tables of docs/results.md.

    .venv/bin/python scripts/policy_table.py                      # measure what is missing, write the tables
    .venv/bin/python scripts/policy_table.py --documents 40       # more of it; what was measured is kept
    .venv/bin/python scripts/policy_table.py --render-only

Documents come from laprox.documents (held-out names and wordings), a function of their number. Each is read once; every
policy and budget starts from a copy of that cache. Two regimes:

    aware      compressed when document and question are in, so that the question is in the observation window
    agnostic   the document is compressed alone, then the question is read

The reference answer is forced upon the model token by token. It counts as right if each of its tokens, the end included,
is the likeliest one, so that greedy decoding would give exactly this answer. KL is from the full cache's next-token
distribution to the compressed one's, the mean over the answer's tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from laprox import KVConfig, LaproxError, Llama, _core, models
from laprox.cli import log
from laprox.cli.conversation import Conversation
from laprox.cli.loading import load_vocabulary
from laprox.config import policies
from laprox.documents import KINDS, make_document
from laprox.profiling import last_logits

ROOT = Path(__file__).resolve().parent.parent
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MEANINGS = dict(zip(_core.policies(), _core.meanings()))
REGIMES = {"aware": "Question inside the window", "agnostic": "Document compressed before the question"}
BEGIN, END = "<!-- scripts/policy_table.py writes from here -->\n", "<!-- to here -->\n"


# --- measuring -------------------------------------------------------------------------------------------------------


class Reader:
    """The demo model with one document in its cache."""

    def __init__(self, args: argparse.Namespace, made_with: str) -> None:
        """made_with: a policy; some collect what they need from the first token on, and only in a context made with them."""
        self.vocabulary = load_vocabulary(args.model)
        kv = KVConfig(policy=made_with, window=args.window, min_tokens=0)  # eval() alone evicts nothing
        self.llm = Llama(str(args.model), kv=kv, n_ctx=args.tokens + 512, n_threads=args.threads,
                         n_threads_batch=args.threads, verbose=False)  # fmt: skip

    def open(self, number: int, args: argparse.Namespace) -> None:
        """Read document `number`, and each of its questions on the full cache."""
        document = make_document(f"policies {args.seed} {number}", args.tokens - 60, kinds=args.kinds, questions=args.questions,
                                 depths=DEPTHS, count=lambda text: len(self.tokens(text)))  # fmt: skip
        self.questions = document.questions
        self.answers = [[*self.tokens(q.answer), self.vocabulary.token_eos()] for q in self.questions]
        conversation = Conversation(self.vocabulary, document.text)
        prompts = [conversation.prompt(q.text) for q in self.questions]
        opening = conversation.opening()
        assert all(prompt[: len(opening)] == opening for prompt in prompts)
        self.asked = [prompt[len(opening) :] for prompt in prompts]

        self.opening = opening
        start = time.process_time()
        self.evaluate(opening)
        self.read_ms = 1000 * (time.process_time() - start)
        self.read = self.llm.save_state()
        self.full = []  # the full cache after each question, and what it gives for the answer
        for asked, answer in zip(self.asked, self.answers):
            self.llm.load_state(self.read)
            self.llm.eval(asked)
            first = log_softmax(last_logits(self.llm))
            self.full.append((self.llm.save_state(), first, np.array([first, *self.force(answer)])))

    def able(self, policies: list[str]) -> list[str]:
        """Those that run on this model; others may need a file that it doesn't have."""
        found = []
        for policy in policies:
            try:
                self.llm.kv.set(policy=policy)
                found.append(policy)
            except LaproxError as error:
                print(f"without {policy}: {error}", file=sys.stderr)
        return found

    def tokens(self, text: str) -> list[int]:
        return self.vocabulary.tokenize(text.encode(), add_bos=False, special=False)

    def force(self, answer: list[int]) -> Iterator[np.ndarray]:
        """The log-probabilities after each token of an answer but its end."""
        for token in answer[:-1]:
            self.llm.eval([token])
            yield log_softmax(last_logits(self.llm))

    def evaluate(self, tokens: list[int]) -> None:
        """Evaluate from nothing."""
        self.llm.reset()
        self.llm.eval(tokens)

    def compress(self) -> dict:
        """Compress, and what that left and cost: processor time, of which the engine's clock tells the parts."""
        before, start = self.llm.kv.stats(), time.process_time()
        self.llm.kv.compress()
        ms, after = 1000 * (time.process_time() - start), self.llm.kv.stats()
        config = self.llm.kv.config
        wanted = _core.budget_entries(str(config.budget), after.tokens_seen, sum(self.llm.kv.layers.values()))
        if after.entries_held != wanted:
            sys.exit(f"{config.policy} held {after.entries_held} entries at {config.budget}, not {wanted}")
        score, *rest = (getattr(after, name) - getattr(before, name) for name in ("score_seconds", "select_seconds", "compact_seconds"))
        share = score / (score + sum(rest))
        return {"bytes": after.kv_bytes, "score_ms": ms * share, "rest_ms": ms * (1 - share)}

    def judge(self, i: int, first: np.ndarray) -> dict:
        """The answer to question i on the cache as it is now, against the full cache's."""
        answer, full = self.answers[i], self.full[i][2]
        now = np.array([first, *self.force(answer)])
        kl = (np.exp(full) * (full - now)).sum(1).mean()
        return {"right": bool((now.argmax(1) == answer).all()), "kl": float(kl)}

    def measure(self, regime: str, policy: str, budget: str) -> dict:
        """One cell of the tables for this document."""
        rows, costs = [], []
        self.llm.kv.set(policy=policy, budget=budget)
        again = MEANINGS.get(policy, policy).startswith("expected")  # its sums are in no state
        if regime == "agnostic":
            self.evaluate(self.opening) if again else self.llm.load_state(self.read)
            costs.append(self.compress())
            compressed = self.llm.save_state()
        for i, asked in enumerate(self.asked):
            if regime == "aware":
                state, first, _ = self.full[i]  # the first token comes from the full cache, as in any run
                self.evaluate(self.opening + asked) if again else self.llm.load_state(state)
                costs.append(self.compress())
            else:
                self.llm.load_state(compressed)
                self.llm.eval(asked)
                first = log_softmax(last_logits(self.llm))
            rows.append(self.judge(i, first))
        result = {name: [row[name] for row in rows] for name in ("right", "kl")}
        return result | {name: float(np.mean([c[name] for c in costs])) for name in costs[0]}

    def whole(self) -> dict:
        """The same for the full cache."""
        right = [bool((full.argmax(1) == answer).all()) for (_, _, full), answer in zip(self.full, self.answers)]
        self.llm.load_state(self.read)
        return {"right": right, "bytes": self.llm.kv.stats().kv_bytes, "read_ms": self.read_ms}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def measure(args: argparse.Namespace) -> None:
    """Append what is missing to the results, one line per document, regime, policy and budget."""
    settings = {"settings": {name: getattr(args, name) for name in ("tokens", "kinds", "questions", "seed", "window")}}
    readers = open_readers(args)
    settings["settings"]["fingerprint"] = _core.model_fingerprint(readers[0][0].llm._model.model)
    results = load(args.results)
    if args.results.exists() and not args.restart:
        first = json.loads(args.results.read_text().partition("\n")[0])
        if first != json.loads(json.dumps(settings)):
            sys.exit(f"{args.results} was measured with other settings, {first}; now: {settings}. Name another --results, or --restart")
    else:
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(settings) + "\n")
        results = []
    have = {(r["document"], r["regime"], r["policy"], r["budget"]) for r in results}

    def keep(line: dict) -> None:
        with open(args.results, "a") as file:
            file.write(json.dumps(line) + "\n")

    start = time.perf_counter()
    for number in range(args.documents):
        for reader, able in readers:
            cells = [(regime, policy, budget) for regime in REGIMES for policy in able for budget in args.budgets]
            missing = [cell for cell in cells if (number, *cell) not in have]
            if not missing:
                continue
            reader.open(number, args)
            about = {"document": number, "kinds": [q.kind for q in reader.questions]}
            if (number, "", "full", "") not in have:
                keep(about | {"regime": "", "policy": "full", "budget": ""} | reader.whole())
                have.add((number, "", "full", ""))
            for regime, policy, budget in missing:
                keep(about | {"regime": regime, "policy": policy, "budget": budget} | reader.measure(regime, policy, budget))
        print(f"document {number + 1} of {args.documents}: {time.perf_counter() - start:.0f} s", file=sys.stderr)


def open_readers(args: argparse.Namespace) -> list[tuple[Reader, list[str]]]:
    """Readers, and what each can measure: Expected Attention sums up queries, gates mark tokens, where a context is made for it."""
    gated = [p for p in args.policies if MEANINGS.get(p, p).startswith("retention")]
    reader = Reader(args, "expected")
    found = [(reader, reader.able([p for p in args.policies if p not in gated]))]
    try:
        if gated:
            reader = Reader(args, "retention")
            found.append((reader, reader.able(gated)))
    except ValueError as error:
        print(f"without {', '.join(gated)}: {error}", file=sys.stderr)
    return found


def load(path: Path) -> list[dict]:
    """The results so far, without a line that was cut off."""
    if not path.exists():
        return []
    text = path.read_text()
    if not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text)
    return [json.loads(line) for line in text.splitlines()[1:]]


# --- tables ----------------------------------------------------------------------------------------------------------


def accuracy(lines: list[dict], kinds: list[str]) -> str:
    """In percent, with a standard error: over questions or over documents, whose questions aren't independent; the larger."""
    per_document = [[r for r, kind in zip(line["right"], line["kinds"]) if kind in kinds] for line in lines]
    per_document = [d for d in per_document if d]
    n = sum(map(len, per_document))
    if not n:
        return "-"
    mean = sum(map(sum, per_document)) / n
    error = math.sqrt(mean * (1 - mean) / n)
    if (m := len(per_document)) > 1:
        off = sum((sum(d) - mean * len(d)) ** 2 for d in per_document)
        error = max(error, math.sqrt(off * m / (m - 1)) / n)
    return f"{100 * mean:.0f} ± {100 * error:.0f}"


def complete(results: list[dict]) -> list[dict]:
    """Those of documents that are through, so that all policies are compared on the same ones."""
    cells = defaultdict(set)
    for r in results:
        cells[r["document"]].add((r["regime"], r["policy"], r["budget"]))
    most = max(map(len, cells.values()), default=0)
    return [r for r in results if len(cells[r["document"]]) == most]


def render(args: argparse.Namespace) -> str:
    """The tables in Markdown."""
    results = complete(load(args.results))
    if not results:
        sys.exit(f"{args.results}: nothing was measured yet")
    first = json.loads(args.results.read_text().partition("\n")[0])["settings"]
    cells = defaultdict(list)
    for r in results:
        cells[r["regime"], r["policy"], r["budget"]].append(r)
    named = [p for p in args.policies if any(p == policy for _, policy, _ in cells)]
    kinds = list(dict.fromkeys(first["kinds"]))
    there = [kind for kind in kinds if kind != "unanswerable"]
    full = cells["", "full", ""]
    n = sum(kind in there for line in full for kind in line["kinds"])

    out = [
        f"{len(full)} documents of {first['tokens']:,} tokens, {n} questions that the document answers "
        f"({', '.join(there)}), seed {first['seed']}; model {first['fingerprint']}. "
        f"Reading a document takes {np.mean([line['read_ms'] for line in full]):,.0f} ms.\n"
    ]

    def table(title: str, head: list[str], rows: list[list[str]]) -> None:
        out.append(f"### {title}\n")
        out.append("| " + " | ".join(head) + " |\n" + "|---" + "|---:" * (len(head) - 1) + "|")
        out.append("\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n")

    def label(policy: str) -> str:
        meaning = MEANINGS.get(policy, policy)
        return policy if meaning == policy else f"{policy} ({meaning})"

    budgets = args.budgets
    for regime, title in REGIMES.items():
        rows = [["full cache"] + [accuracy(full, there)] * len(budgets)]
        rows += [[label(p)] + [accuracy(cells[regime, p, b], there) for b in budgets] for p in named]
        table(f"{title}: right answers in %", ["policy", *budgets], rows)
    for regime, title in REGIMES.items():
        def kl(lines: list[dict]) -> str:
            values = [x for line in lines for x, kind in zip(line["kl"], line["kinds"]) if kind in there]
            return f"{np.mean(values):.3f}" if values else "-"
        rows = [[label(p)] + [kl(cells[regime, p, b]) for b in budgets] for p in named]
        table(f"{title}: KL to the full cache in nats per answer token", ["policy", *budgets], rows)

    if len(kinds) > 1 and "5%" in budgets:
        for regime, title in REGIMES.items():
            rows = [["full cache"] + [accuracy(full, [kind]) for kind in kinds]]
            rows += [[label(p)] + [accuracy(cells[regime, p, "5%"], [kind]) for kind in kinds] for p in named]
            table(f"{title}: right answers in % by kind of question, at 5%", ["policy", *kinds], rows)

    def mean(lines: list[dict], name: str, scale: float, digits: int) -> str:
        return f"{np.mean([line[name] for line in lines]) / scale:,.{digits}f}" if lines else "-"
    rows = [["full cache"] + [mean(full, "bytes", 1024, 0)] * len(budgets) + ["", ""]]
    for p in named:
        every = [line for b in budgets for line in cells["aware", p, b]]
        rows.append([label(p)] + [mean(cells["aware", p, b], "bytes", 1024, 0) for b in budgets]
                    + [mean(every, "score_ms", 1, 1), mean(every, "rest_ms", 1, 1)])  # fmt: skip
    table("Cost: KiB of cache held, and milliseconds of one core", ["policy", *budgets, "to score", "to select and move"], rows)
    return "\n".join(out)


def write(page: Path, tables: str) -> None:
    """Put the tables into the page, between its two marks."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        sys.exit(f"{page}: the marks of the tables are missing")
    page.write_text(before + begin + "\n" + tables + "\n" + end + after)


def parse() -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--documents", type=int, default=8)
    p.add_argument("--questions", type=int, default=8, help="per document")
    p.add_argument("--kinds", nargs="+", choices=KINDS, default=["single", "single", "single", "unanswerable"], help="in turns")
    p.add_argument("--tokens", type=int, default=2000, help="per document")
    p.add_argument("--policies", nargs="+", default=[name for name in policies() if name != "full"])
    p.add_argument("--budgets", nargs="+", default=["2%", "5%", "10%", "20%"])
    p.add_argument("--window", type=int, default=32)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--threads", type=int, default=1, help="with another number, other roundings")
    p.add_argument("--model", type=Path, default=models.demo_model())
    p.add_argument("--results", type=Path, default=ROOT / "build" / "policy_table.jsonl")
    p.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    p.add_argument("--restart", action="store_true", help="forget what was measured")
    p.add_argument("--render-only", action="store_true")
    return p.parse_args()


def main() -> None:
    args = parse()
    log.record(verbose=False)
    if not args.render_only:
        measure(args)
    write(args.page, render(args))


if __name__ == "__main__":
    main()
