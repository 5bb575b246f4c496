#!/usr/bin/env python3
"""What retention gates cost: prefill and decode with and without them, on a GGUF with random weights of a real shape.

    .venv/bin/python scripts/bench_gates.py                        # Llama-3.2-1B's shape, gates of the papers' size (rg10, 512)

Two processes take turns, so that a noisy machine disturbs both alike; the ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path

import bench_engine
import numpy as np


def gates_path(args, model: Path) -> Path:
    """Random gates for the model, made unless they are there."""
    from laprox.gates import sidecar

    shape = bench_engine.SHAPES[args.shape]
    path = model.with_name(f"{model.stem}-{args.kind}-{args.hidden}-{args.gate_type}.gguf")
    if path.exists():
        return path
    rng = np.random.default_rng(0)

    def matrix(rows, cols):
        return rng.normal(0, 0.02, (rows, cols)).astype(np.float32)

    def layer():
        deep, zeros = args.kind == "rg10", np.zeros(args.hidden, np.float32)
        return sidecar.Layer(
            gate_in=matrix(args.hidden, shape["n_embd"]),
            gate_in_bias=zeros,
            gate_mid=matrix(args.hidden, args.hidden) if deep else None,
            gate_mid_bias=zeros if deep else None,
            gate_out=matrix(shape["n_head_kv"], args.hidden),
            gate_out_bias=np.full(shape["n_head_kv"], 18, np.float32),
        )

    gates = sidecar.Gates(args.kind, "silu", [layer() for _ in range(shape["n_layer"])], source="random numbers")
    sidecar.write(path, gates, args.gate_type)
    return path


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=bench_engine.SHAPES, default="1b")
    p.add_argument("--weights", choices=("Q4_0", "Q8_0", "Q4_K", "Q6_K"), default="Q4_0")
    p.add_argument("--kind", choices=("rg", "rg10"), default="rg10")
    p.add_argument("--hidden", type=int, default=512)
    p.add_argument("--gate-type", choices=("f16", "q8_0", "q4_0", "f32"), default="q4_0")
    p.add_argument("--tokens", type=int, default=512, help="length of the prompt")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--gpu-layers", type=int, default=0)
    p.add_argument("--step", type=int, default=16, help="tokens decoded per turn")
    p.add_argument("--turns", type=int, default=5)
    p.add_argument("--models", default=str(bench_engine.ROOT / "build" / "bench"), help="folder for the GGUF")
    args = p.parse_args()

    model = bench_engine.model_path(args)
    job = {"config": "full", "model": str(model), "tokens": args.tokens, "cache": "f16", "budget": "100%", "chunked": False}
    job |= {"policy": "full", "also": []} | {name: getattr(args, name) for name in ("gpu_layers", "threads", "step")}
    workers = {"plain": bench_engine.Worker(job), "gated": bench_engine.Worker(job | {"gates": str(gates_path(args, model))})}
    spent = {(name, what): [] for name in workers for what in ("prefill", "decode")}
    for turn in range(args.turns + 1):
        for name, worker in workers.items():
            for what in ("prefill", "decode"):
                seconds = worker.ask(what)["seconds"]
                if turn:  # the first is a warm-up
                    spent[name, what].append(seconds)
        print(f"turn {turn} of {args.turns}", file=sys.stderr)
    for worker in workers.values():
        worker.close()
    for what in ("prefill", "decode"):
        ratio = statistics.median(b / a for a, b in zip(spent["plain", what], spent["gated", what]))
        print(f"{what:8} with gates : without  {ratio:.3f}")
    print(json.dumps({f"{name} {what}": values for (name, what), values in spent.items()}))


if __name__ == "__main__":
    main()
