"""The options by which commands run a model and draw answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from laprox.cache_types import Auto
from laprox.chat import log
from laprox.chat.loading import Loader
from laprox.chat.session import Sampling
from laprox.cli import options

Restart = Annotated[bool, typer.Option("--restart", help="Start anew instead of going on with an interrupted run.")]


@dataclass(frozen=True)
class Running:
    """How the model runs."""

    threads: options.Threads = 0
    gpu_layers: options.GPULayers = 0
    batch_size: options.BatchSize = 512
    verbose: options.Verbose = False

    def loader(self, model: Path, type_k: int | Auto | None = None, type_v: int | Auto | None = None) -> Loader:
        """Loads the model so, and from now on llama.cpp's log is shown or kept. Types are of cached keys and values."""
        log.record(self.verbose)
        return Loader(model, self.verbose, self.threads, self.gpu_layers, self.batch_size, type_k, type_v)


@dataclass(frozen=True)
class Answers(Sampling):
    """How answers are drawn."""

    n_predict: options.Predict = Sampling.n_predict
    temperature: options.Temperature = Sampling.temperature
    top_k: options.TopK = Sampling.top_k
    top_p: options.TopP = Sampling.top_p
    seed: options.Seed = Sampling.seed
