"""Train through the stages in stages.json; go on from the last checkpoint if there is one."""
from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
from common import OUT, tokenizer
from model import Config, Model, Muon

STAGES = Path(__file__).with_name("stages.json")


def batch_of(stage, seed, step, tok):
    """The data of one step, from one of the stage's sources: a function of (seed, stage, step) alone."""
    rng = random.Random(f"{seed}/{stage['name']}/{step}")
    i = rng.choices(range(len(stage["sources"])), [w for w, _ in stage["sources"]])[0]
    source = stage["sources"][i][1]
    rows = max(1, stage["tokens"] // source["length"])
    return i, data.chats(rng, tok, rows, source["length"], **source["options"])


def answers(model, ids, weight):
    """Loss weight, target and logits wherever the next token is supervised."""
    ids, weight = torch.from_numpy(ids), torch.from_numpy(weight)[:, 1:]
    at = weight > 0
    return weight[at], ids[:, 1:][at], model.logits(model.hidden(ids, planted=True)[:, :-1][at])


@torch.no_grad()
def accuracy(model, tok, length, rows, seed="watch"):
    """Exact answers (every token right, teacher-forced) to held-out names and wordings, by kind."""
    found: dict[str, list[bool]] = {}
    for row in range(rows):
        ids, weight, spans = data.chats(random.Random(f"{seed}/{length}/{row}"), tok, 1, length, "eval", prose_share=0, density=20)
        ids = torch.from_numpy(ids)
        best = model.logits(model.hidden(ids, planted=True)[0, :-1]).argmax(-1)
        for _, a, b, kind in spans:
            found.setdefault(kind, []).append(bool((best[a - 1:b - 1] == ids[0, a:b]).all()))
    return " ".join(f"{k[:6]} {np.mean(v):.2f}({len(v)})" for k, v in sorted(found.items()))


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--minutes", type=float, default=1e9, help="stop (with a checkpoint) after this long")
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    tok = tokenizer()
    model = Model(Config(), a.seed)
    model.plant()
    muon = Muon([getattr(model, n) for n in model.MATRICES])
    adam = torch.optim.AdamW([{"params": [model.attn_norm, model.ffn_norm, model.norm]}, {"params": [model.emb]}],
                             betas=(0.9, 0.98), weight_decay=0)
    at = {"stage": 0, "step": 0, "tokens": 0, "seconds": 0.0, "total": 0}
    checkpoint = OUT / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        muon.load_state_dict(state["muon"])
        adam.load_state_dict(state["adam"])
        at = state["at"]

    def save(path=checkpoint):
        state = {"model": model.state_dict(), "muon": muon.state_dict(), "adam": adam.state_dict(), "at": at}
        torch.save(state, f"{path}.new")
        Path(f"{path}.new").replace(path)

    def log(text):
        with open(OUT / "train.log", "a") as f:
            print(text, file=f)
        print(text, flush=True)

    started, last = time.time(), time.time()
    stages = json.loads(STAGES.read_text())
    while at["stage"] < len(stages):
        stage = stages[at["stage"]]
        losses, right = [], {}
        while at["step"] < stage["steps"]:
            share = at["step"] / stage["steps"]
            lr = np.interp(share, (0, stage.get("hold", 0), 1), np.array(stage["lr"])[[0, 0, 1]])
            lr = float(lr) * min(1.0, (at["total"] + 1) / 20)
            muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = lr, lr * 0.33
            adam.param_groups[1]["lr"] = lr * stage["embedding"]
            source, (ids, weight, _) = batch_of(stage, a.seed, at["step"], tok)
            w, target, logits = answers(model, ids, weight)
            loss = (F.cross_entropy(logits, target, reduction="none") * w).sum() / w.sum()
            loss.backward()
            model.attn_norm.grad[0] = model.q.grad[0] = model.k.grad[0] = 0  # as planted
            muon.step()
            adam.step()
            model.keep_common()
            muon.zero_grad()
            adam.zero_grad()
            full = w >= 1
            losses.append(loss.item())
            right.setdefault(source, []).append((logits.argmax(-1) == target)[full].float().mean().item())
            at["step"] += 1
            at["total"] += 1
            at["tokens"] += ids.size
            at["seconds"] += time.time() - last
            last = time.time()
            if at["step"] % 25 == 0:
                shown = " ".join(f"{i}:{np.mean(r):.2f}" for i, r in sorted(right.items()))
                log(f"{stage['name']} {at['step']} tokens {at['tokens'] / 1e6:.2f}M minutes {at['seconds'] / 60:.1f} "
                    f"loss {np.mean(losses):.3f} right {shown} lr {lr:.4f}")
                losses, right = [], {}
                save()
            if at["step"] % stage.get("watch", 10**9) == 0:
                for length, rows in stage["watched"]:
                    log(f"  held out @{length}: {accuracy(model, tok, length, rows)}")
            if time.time() - started > 60 * a.minutes:
                return save()
        save(OUT / f"{stage['name']}.pt")
        at["stage"], at["step"] = at["stage"] + 1, 0
        save()


if __name__ == "__main__":
    main()
