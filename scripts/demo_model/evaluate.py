"""Measure the GGUF in llama.cpp (greedy, full cache, held-out names and wordings), and PyTorch beside it.

Writes results.json and tables in Markdown to the work folder."""
from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType
from llama_cpp import Llama

from common import OUT, chat, documents, tokenizer
from export import SHIPPED, load, write

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Reader:
    """Greedy answers of a GGUF in llama.cpp."""

    def __init__(self, path, context):
        self.llm = Llama(str(path), n_ctx=context, n_threads=1, verbose=False)

    def __call__(self, prompt: str) -> tuple[list[int], list[int], str]:
        ids = self.llm.tokenize(prompt.encode(), add_bos=False, special=True)
        reply = []
        for token in self.llm.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if token == self.llm.token_eos() or len(reply) >= 60:
                break
            reply.append(token)
        return ids, reply, self.llm.detokenize(reply).decode(errors="replace").strip()


def papers(kind, length, count, tok, per=5, **options):
    """Held-out documents with questions of one kind, at the five depths."""
    size = lambda s: len(tok.encode(s).ids)  # noqa: E731
    for i in range(count):
        doc = documents.make_document(f"evaluation {kind} {i}", length - 60, kinds=(kind,), questions=per,
                                      depths=DEPTHS, count=size, rephrased=0.3 if kind == "rephrased" else 0.1, **options)
        for q in doc.questions:
            if q.kind == kind:
                yield doc, q


def guesses(doc, q):
    """The chance to be right from one key alone, picking at random among what fits it."""
    f = q.facts[-1]
    rate = lambda same: 1 / max(1, len({g.value for g in doc.facts if same(g)}))  # noqa: E731
    return (rate(lambda g: g.attribute == f.attribute), rate(lambda g: g.name == f.name),
            rate(lambda g: g.value.isdigit() == f.value.isdigit() and (" " in g.value) == (" " in f.value)), rate(lambda g: True))


def by_depth(read, tok, lengths, count):
    out = {}
    for length in lengths:
        rows, chance = {d: [] for d in DEPTHS}, []
        for doc, q in papers("single", length, count, tok):
            ok = read(chat(documents.prompt(doc.text, q.text)))[2] == q.answer
            rows[min(DEPTHS, key=lambda d: abs(d - q.depth))].append(ok)
            chance.append(guesses(doc, q))
        every = [x for r in rows.values() for x in r]
        out[length] = {"n": len(every), "mean": float(np.mean(every)),
                       "depths": {d: float(np.mean(r)) if r else None for d, r in rows.items()},
                       "guess": [float(x) for x in np.mean(chance, 0)]}
        print(length, out[length], flush=True)
    return out


def ready(read):
    """The ready document's own questions."""
    text, questions = ((SHIPPED.parent / f"demo_{n}").read_text() for n in ("document.txt", "questions.json"))
    out = {}
    for q in json.loads(questions):
        kind = out.setdefault(q["kind"], {"n": 0, "right": 0})
        kind["n"] += 1
        kind["right"] += read(chat(documents.prompt(text, q["question"])))[2] == q["answer"]
    return out


def by_kind(read, tok, lengths, count):
    out = {}
    for kind in documents.KINDS[1:]:
        for length in lengths:
            right = [read(chat(documents.prompt(doc.text, q.text)))[2] == q.answer
                     for doc, q in papers(kind, length, count, tok)]
            out.setdefault(kind, {})[length] = {"n": len(right), "mean": float(np.mean(right)) if right else None}
            print(kind, length, out[kind][length], flush=True)
    return out


@torch.no_grad()
def agreement(read, model, tok, count, length=1000):
    """Documents for which PyTorch, given llama.cpp's reply, would have chosen every token of it; the same ids."""
    same, same_ids = [], []
    for doc, q in papers("single", length, count, tok, per=1):
        prompt = chat(documents.prompt(doc.text, q.text))
        ids, reply, _ = read(prompt)
        same_ids.append(ids == tok.encode(prompt).ids)
        all_ids = torch.tensor([ids + reply])
        best = model.logits(model.hidden(all_ids)[0, len(ids) - 1:]).argmax(-1)
        same.append(bool((best[:-1] == all_ids[0, len(ids):]).all()))
    rng, differ = random.Random(0), 0
    ranges = ((32, 127), (32, 127), (1, 0x300), (0x300, 0x3000), (0x3000, 0xD7FF), (0xE000, 0x1FFFF))
    for _ in range(1000):
        text = "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40)))
        ours = tok.encode(text).ids
        differ += ours != read.llm.tokenize(text.encode(), add_bos=False, special=False)
    return {"n": len(same), "same ids": sum(same_ids), "same answers": sum(same), "random strings that differ": differ,
            "logit differences": logit_differences(model, ids)}


@torch.no_grad()
def logit_differences(model, ids):
    """The largest over all positions of one prompt, in F32 throughout and as shipped."""
    ours = model.logits(model.hidden(torch.tensor([ids])))[0].numpy()
    found = {"largest logit": float(np.abs(ours).max())}
    for name, kind, kv in (("F32", GGMLQuantizationType.F32, 0), ("F16", GGMLQuantizationType.F16, 1)):
        path = OUT / f"compare-{name}.gguf"
        write(model, path, kind)
        llm = Llama(str(path), n_ctx=len(ids) + 8, n_threads=1, verbose=False, logits_all=True, type_k=kv, type_v=kv)
        llm.eval(ids)
        found[name] = float(np.abs(np.array(llm.scores[:len(ids)]) - ours).max())
    return found


@torch.no_grad()
def without_layers(model, tok, length, count):
    """Accuracy when one layer's cache of the document is cut to 4 + 32 tokens after it was read."""
    out = {"none": []} | {str(i): [] for i in range(model.c.layers)} | {f"only {i}": [] for i in range(model.c.layers)}
    for doc, q in papers("single", length, count, tok):
        text = tok.encode(f"<|im_start|>user\n{doc.text}\n\n").ids
        full = tok.encode(chat(documents.prompt(doc.text, q.text))).ids
        answer = tok.encode(q.answer + "<|im_end|>").ids
        ids = torch.tensor([full + answer])
        n, p = ids.shape[1], len(text)
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        less = causal.clone()
        less[p:, 4:p - 32] = False
        for name in out:
            def cut(layer, _, name=name):
                if name.startswith("only"):
                    return causal if layer == int(name[5:]) else less
                return less if name == str(layer) else causal
            best = model.logits(model.hidden(ids, cut)[0, len(full) - 1:-1]).argmax(-1)
            out[name].append(bool((best == ids[0, len(full):]).all()))
    return {k: float(np.mean(v)) for k, v in out.items()} | {"n": len(out["none"])}


def tables(results):
    """The results in Markdown."""
    percent = lambda x: "-" if x is None else f"{100 * x:.0f}%"  # noqa: E731
    lines = []
    if "depth" in results:
        lines += ["| single facts | " + " | ".join(f"depth {d}" for d in DEPTHS) + " | mean | questions | guess: attribute | "
                  "guess: name | guess: kind of value |", "|---" * (len(DEPTHS) + 6) + "|"]
        for length, r in results["depth"].items():
            cells = [*r["depths"].values(), r["mean"]]
            lines.append(f"| {length} tokens | " + " | ".join(map(percent, cells)) + f" | {r['n']} | "
                         + " | ".join(map(percent, r["guess"][:3])) + " |")
    if "kind" in results:
        lengths = list(next(iter(results["kind"].values())))
        lines += ["", "| kind | " + " | ".join(f"{n} tokens" for n in lengths) + " |", "|---" * (len(lengths) + 1) + "|"]
        for kind, r in results["kind"].items():
            lines.append(f"| {kind} | " + " | ".join(f"{percent(x['mean'])} of {x['n']}" for x in r.values()) + " |")
    if "layers" in results:
        r = results["layers"]
        lines += ["", f"| document cache, {r['n']} questions | right |", "|---|---|"]
        lines += [f"| {'whole' if k == 'none' else k + ' whole' if 'only' in k else 'layer ' + k + ' cut'} | {percent(v)} |"
                  for k, v in r.items() if k != "n"]
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--gguf", type=Path, default=SHIPPED)
    p.add_argument("--checkpoint", type=Path, default=OUT / "checkpoint.pt")
    p.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000])
    p.add_argument("--documents", type=int, default=40, help="per length, with five questions each")
    p.add_argument("--only", nargs="+", default=["depth", "kind", "ready", "agreement", "layers"])
    a = p.parse_args()
    tok, model = tokenizer(), load(a.checkpoint)
    torch.set_num_threads(1)
    path = OUT / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}

    def keep(name, result):
        results[name] = result
        path.write_text(json.dumps(results, indent=1))
        (OUT / "tables.md").write_text(tables(json.loads(path.read_text())))
        print(result, flush=True)

    read = Reader(a.gguf, max(a.lengths) + 512)
    if "depth" in a.only:
        keep("depth", by_depth(read, tok, a.lengths, a.documents))
    if "kind" in a.only:
        keep("kind", by_kind(read, tok, a.lengths, a.documents // 2))
    if "ready" in a.only:
        keep("ready", ready(Reader(a.gguf, 9000)))
    if "agreement" in a.only:
        keep("agreement", agreement(read, model, tok, 100))
    if "layers" in a.only:
        keep("layers", without_layers(model, tok, 1000, max(1, a.documents // 4)))


if __name__ == "__main__":
    main()
