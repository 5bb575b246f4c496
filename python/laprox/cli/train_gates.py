"""`laprox train-gates`: retention gates for a model of your own."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laprox import extras
from laprox._upstream import MOST_THREADS
from laprox.chat import log
from laprox.chat.loading import load_weights
from laprox.cli.convert_gates import report
from laprox.cli.groups import grouped
from laprox.cli.progress import progress
from laprox.cli.running import Restart
from laprox.cli.show import notes
from laprox.files import Partial
from laprox.gates import files, sidecar
from laprox.gates.sidecar import KINDS, TYPES

if TYPE_CHECKING:
    from laprox.gates.training import Recipe, Trainer

CAPACITIES = {"global": True, "local": False}
DTYPES = ("auto", "float32", "bfloat16")
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"  # of an unfinished run


@dataclass(frozen=True)
class Training:
    """How gates are trained."""

    kind: Annotated[str, typer.Option("--gate", help="Kind of gates: rg10 (DBTrimKV) or rg (TRIM-KV).")] = "rg10"
    capacity: Annotated[str, typer.Option("--capacity", help="global: one budget for the whole model; local: one per KV head.")] = "global"
    budget: Annotated[int, typer.Option("--budget", "-M", min=1, help="Tokens per KV head that training aims at.")] = 128
    pressure: Annotated[float, typer.Option("--pressure", min=0.0, help="Weight of the capacity loss.")] = 1.0
    strictness: Annotated[
        float,
        typer.Option(
            "--strictness",
            min=1.0,
            help="1 = as in the papers. With more, an entry counts for longer than attention sees it, which suits heads that match sharply.",
        ),
    ] = 1.0
    hidden: Annotated[int, typer.Option("--hidden", min=1, help="Width of the gates.")] = 512
    bias: Annotated[float, typer.Option("--bias", help="Initial bias of the gates: with 18 nothing is forgotten at first; short runs want less.")] = (
        18.0
    )
    steps: Annotated[int, typer.Option("--steps", min=1, help="Number of steps of the optimizer.")] = 2000
    accumulate: Annotated[int, typer.Option("--accumulate", min=1, help="Number of sequences per step.")] = 1
    lr: Annotated[float, typer.Option("--lr", min=0.0, help="Highest learning rate.")] = 2e-4
    warmup: Annotated[
        int, typer.Option("--warmup", min=0, help="Steps until the learning rate is at its highest; then it falls along a cosine to a tenth.")
    ] = 100
    weight_decay: Annotated[float, typer.Option("--weight-decay", min=0.0, help="Weight decay of AdamW.")] = 1e-5
    seed: Annotated[int, typer.Option("--seed", "-s", min=0, help="Seed of the initial gates and of the order of the data.")] = 0

    def check(self) -> None:
        """Raises ValueError if a name is unknown."""
        for option, value, accepted in (("--gate", self.kind, KINDS), ("--capacity", self.capacity, CAPACITIES)):
            if value not in accepted:
                raise ValueError(f"{option} is {value!r}; accepted: {', '.join(accepted)}")

    def recipe(self) -> Recipe:
        """The same for the trainer."""
        from laprox.gates.training import Recipe

        values = asdict(self)
        return Recipe(whole=CAPACITIES[values.pop("capacity")], **values)


@dataclass(frozen=True)
class Computing:
    """Where and how it is computed."""

    chunk: Annotated[int, typer.Option("--chunk", min=1, help="Number of queries computed at once: fewer take less memory.")] = 128
    checkpoint_layers: Annotated[
        bool, typer.Option("--checkpoint-layers", help="Compute layers again instead of keeping what they computed: less memory for long sequences.")
    ] = False
    device: Annotated[str, typer.Option("--device", help='Where to train: "cpu", "cuda" ...; auto = a GPU if there is one.')] = "auto"
    dtype: Annotated[str, typer.Option("--dtype", help=f"Data type of the model: {', '.join(DTYPES)}; auto = its own. Gates are float32.")] = "auto"
    threads: Annotated[int, typer.Option("--threads", "-t", min=0, max=MOST_THREADS, help="Number of CPU threads; 0 = PyTorch's choice.")] = 0

    def model(self, folder: Path) -> Any:
        """The frozen model."""
        import torch
        from transformers import AutoModelForCausalLM

        if self.threads:
            torch.set_num_threads(self.threads)
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        frozen = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
        if self.checkpoint_layers:
            frozen.train().gradient_checkpointing_enable({"use_reentrant": False})
        return frozen


@grouped
def train_gates(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model: a Hugging Face folder (Llama, Qwen2, Qwen3).", show_default=False)],
    data: Annotated[
        list[Path],
        typer.Option(
            "--data",
            "-d",
            show_default=False,
            help='What to read; repeatable. A .jsonl file with lines of {"text": ...}, {"prompt": ..., "completion": ...} or '
            '{"messages": [...]}, or a text, Markdown, HTML or PDF file.',
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .gguf file to write.", show_default=False)],
    model: Annotated[
        Path | None, typer.Option("--model", "-m", help="The same model as GGUF: checked, and written down in the gates.", show_default=False)
    ] = None,
    length: Annotated[int, typer.Option("--length", min=2, help="Length of the longest sequence in tokens.")] = 8192,
    training: Training = Training(),
    init: Annotated[
        Path | None,
        typer.Option(
            "--init", help="Start from these gates (.gguf), such as those of the model that this one was fine-tuned from.", show_default=False
        ),
    ] = None,
    computing: Computing = Computing(),
    save_every: Annotated[int, typer.Option("--save-every", min=1, help="Number of steps between checkpoints.")] = 50,
    file_type: Annotated[str, typer.Option("--type", help=f"Type of the matrices in the file: {', '.join(TYPES)}.")] = "f16",
    restart: Restart = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show llama.cpp's log.")] = False,
) -> None:
    """Train retention gates (DBTrimKV, TRIM-KV) beside a frozen model. Interrupted, it goes on where it was."""
    # Everything that can be wrong is found before the long work starts.
    training.check()
    if computing.dtype not in DTYPES:
        raise ValueError(f"--dtype is {computing.dtype!r}; accepted: {', '.join(DTYPES)}")
    extras.need("train", "laprox train-gates")
    files.check_output(output, file_type, [*data, init, model])
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder}: not a Hugging Face folder, there is no config.json in it")
    log.record(verbose)
    weights = load_weights(model) if model else None

    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from laprox.gates.data import read_examples
    from laprox.gates.modules import Gated, fresh_gates
    from laprox.gates.training import Trainer, settings_of

    logging.disable_progress_bar()
    recipe = training.recipe()
    examples = read_examples(data, AutoTokenizer.from_pretrained(folder), length)
    frozen = computing.model(folder)
    torch.manual_seed(recipe.seed)
    gates = fresh_gates(frozen, recipe.kind, recipe.hidden, recipe.bias)
    if init:
        gates.start_from(sidecar.read(init))
    gated = Gated(frozen, gates.to(frozen.device), computing.chunk, recipe.strictness)
    trainer = Trainer(gated, recipe, examples)
    about: dict[str, Any] = {
        "training_budget": recipe.budget, "source": f"laprox train-gates, {recipe.steps} steps", "model": folder.resolve().name,
    }  # fmt: skip
    if model and weights:  # before the work, too: a GGUF of other sizes
        fitted = files.fitted(gated.gates.arrays(**about), model, weights)
        about |= {"model": fitted.model, "fingerprint": fitted.fingerprint}

    digest = hashlib.sha256(repr([(e.ids, e.supervised) for e in examples]).encode()).hexdigest()[:16]
    settings = settings_of(recipe, model=str(folder), data=digest, dtype=computing.dtype, init=init and str(init))
    partial = Partial(output, settings, restart)
    if CHECKPOINT in partial:
        trainer.load(partial.path(CHECKPOINT))
        _forget_after(trainer.step, partial.path(LOG))
        notes.print(f"Going on from step {trainer.step} of {recipe.steps}.", markup=False)
    try:
        _train(trainer, partial, save_every)
    except KeyboardInterrupt:
        notes.print(f"Stopped. What is finished is in {partial.folder}; the same command goes on with it.", markup=False)
        raise typer.Exit(130) from None
    trained = gated.gates.arrays(**about)
    files.save(output, trained, file_type)
    shutil.move(partial.path(LOG), output.with_name(f"{output.name}.{LOG}"))
    partial.remove()
    report(output, trained, file_type)


def _forget_after(step: int, log: Path) -> None:
    """Steps after the checkpoint are done, and logged, again."""
    lines = log.read_text().splitlines() if log.exists() else []
    log.write_text("".join(line + "\n" for line in lines if line.endswith("}") and json.loads(line)["step"] <= step))


def _train(trainer: Trainer, partial: Partial, save_every: int) -> None:
    """Raises KeyboardInterrupt after the step that ctrl-C fell into, and a checkpoint; at the second one at once."""
    steps, stop = trainer.recipe.steps, False

    def interrupted(*_: Any) -> None:
        nonlocal stop
        stop = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        with progress("training", steps, "steps", trainer.step) as update, open(partial.path(LOG), "a") as log:
            while trainer.step < steps:
                line = trainer.advance()
                print(json.dumps(line), file=log, flush=True)
                told = f"loss {line['loss']:.3f}, KL {line['kl']:.3f}, kept {line['retained']:.0f}"
                update(completed=trainer.step, description=told)
                if trainer.step % save_every == 0 or trainer.step == steps or stop:
                    trainer.save(partial.path(CHECKPOINT))
                if stop:
                    raise KeyboardInterrupt
    finally:
        signal.signal(signal.SIGINT, before)
