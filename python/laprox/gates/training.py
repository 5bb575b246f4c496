"""Training of gates: the recipe of DBTrimKV and TRIM-KV, a step at a time, resumable."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from laprox.files import replacing
from laprox.gates.data import Example
from laprox.gates.losses import capacity_loss, prediction_losses
from laprox.gates.modules import Gated


@dataclass(frozen=True)
class Recipe:
    """How gates are trained; the defaults are the papers'.

    Attributes:
        kind: "rg10" (DBTrimKV) or "rg" (TRIM-KV).
        hidden: Width of the gates.
        bias: What the last bias starts with. 18 is beta = 1 - 1.5e-8: nothing is forgotten at first.
        budget: M, the tokens per KV head that training presses for; a budget at use may be another.
        whole: One budget for the whole model (DBTrimKV), not one per head (TRIM-KV).
        pressure: lambda, the weight of the capacity loss.
        strictness: Entries count as retained by beta^(age / strictness); 1 in the papers. In training, forgetting only takes
            age x -log beta off an attention logit. Heads whose matches win by many nats find what was forgotten all the
            same, and gates learn to forget everything a little. What counts longer than it is seen must be chosen.
        steps, accumulate: Steps of the optimizer, and sequences in each.
        lr, min_lr, warmup: The rate at its highest and at the end (as a share), reached after so many steps, then a cosine.
        weight_decay, clip: Of AdamW; of the gradient's norm.
        seed: Decides initial weights and the order of the data.
    """

    kind: str = "rg10"
    hidden: int = 512
    bias: float = 18.0
    budget: int = 128
    whole: bool = True
    pressure: float = 1.0
    strictness: float = 1.0
    steps: int = 2000
    accumulate: int = 1
    lr: float = 2e-4
    min_lr: float = 0.1
    warmup: int = 100
    weight_decay: float = 1e-5
    clip: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        along = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.min_lr + (1 - self.min_lr) * (1 + math.cos(math.pi * along)) / 2)


class Trainer:
    """Trains the gates of a model. What a step does depends on the recipe, the data and the step's number alone."""

    def __init__(self, gated: Gated, recipe: Recipe, examples: Sequence[Example]) -> None:
        self.gated, self.recipe, self.examples = gated, recipe, examples
        self.step = 0
        self.optimizer = torch.optim.AdamW(gated.gates.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
        self._device = next(gated.gates.parameters()).device

    def losses(self, example: Example) -> dict[str, torch.Tensor]:
        """One sequence: the loss to train on, and what it is made of."""
        ids = torch.tensor(example.ids, device=self._device)
        at = torch.tensor(example.supervised, device=self._device)  # positions of supervised tokens
        with torch.no_grad(), self.gated.off():
            teacher = self.gated.hidden(ids[None])[0, at - 1]
        student = self.gated.hidden(ids[None])[0, at - 1]
        retained = self.gated.retained()
        cross, ntp, kl = prediction_losses(self.gated.logits, student, teacher, ids[at])
        capacity = capacity_loss(retained, self.recipe.budget, self.recipe.whole)
        loss = 0.5 * cross + 0.5 * ntp + self.recipe.pressure * capacity
        held = retained[..., -1].mean().detach()  # tokens per KV head at the end of the sequence
        return {"loss": loss, "kl": kl, "next_token": ntp.detach(), "capacity": capacity.detach(), "retained": held}

    def advance(self) -> dict[str, Any]:
        """One step of the optimizer; returns what to log."""
        start, r = time.perf_counter(), self.recipe
        for group in self.optimizer.param_groups:
            group["lr"] = r.rate(self.step)
        sums: dict[str, float] = {}
        tokens = 0
        for example in self._examples_of(self.step):
            losses = self.losses(example)
            (losses["loss"] / r.accumulate).backward()
            tokens += len(example.ids)
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() / r.accumulate
        norm = torch.nn.utils.clip_grad_norm_(self.gated.gates.parameters(), r.clip).item()
        if not math.isfinite(norm):
            raise RuntimeError(f"the gradient is not finite at step {self.step + 1}: take a lower --lr, or --dtype float32")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        line = {"step": self.step, **sums, "gradient": norm, "lr": r.rate(self.step - 1), "tokens": tokens}
        return line | {"seconds": time.perf_counter() - start}

    def save(self, path: Path) -> None:
        """Write a checkpoint, whole or not at all."""
        state = {"step": self.step, "gates": self.gated.gates.state_dict(), "optimizer": self.optimizer.state_dict()}
        with replacing(path) as unfinished:
            torch.save(state | {"random": torch.get_rng_state()}, unfinished)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint."""
        state = torch.load(path, map_location=self._device, weights_only=True)
        self.gated.gates.load_state_dict(state["gates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        torch.set_rng_state(state["random"].cpu())

    def _examples_of(self, step: int) -> Iterator[Example]:
        """Every example once, in an order of the epoch's own, then again in another."""
        n = len(self.examples)
        for i in range(step * self.recipe.accumulate, (step + 1) * self.recipe.accumulate):
            epoch, at = divmod(i, n)
            yield self.examples[random.Random(f"{self.recipe.seed}/{epoch}").sample(range(n), n)[at]]


def settings_of(recipe: Recipe, **others: Any) -> dict[str, Any]:
    """What a run that goes on must have in common with the one before."""
    return json.loads(json.dumps(asdict(recipe) | others))
