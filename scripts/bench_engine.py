#!/usr/bin/env python3
"""How fast and how large the compressing cache is, on a GGUF with random weights of a real shape.

    .venv/bin/python scripts/bench_engine.py                       # Llama-3.2-1B's shape, Q4_0, 8,192 tokens: about half an hour
    .venv/bin/python scripts/bench_engine.py --quick               # 2,048 tokens: minutes
    .venv/bin/python scripts/bench_engine.py --shape 8b --tokens 32768 --gpu-layers 99 --cache f16 --cache q8_0
    .venv/bin/python scripts/bench_engine.py --policy laprox snapkv cake      # also what the others cost to score

Five configurations, each in a process of its own:

    stock    llama.cpp as it is (no policy)
    full     our cache with everything kept
    kept     our cache, compressed to the budget after the prompt; what is evicted is gone
    archived as kept, and what is evicted stays in an archive, as it does by default
    short    llama.cpp as it is, with a prompt as short as what `kept` holds: the limit

Machines are noisy, so the processes decode in turns, a few tokens each, and the ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

SHAPES = {
    "1b": dict(n_layer=16, n_embd=2048, n_head=32, n_head_kv=8, head_dim=64, n_ff=8192, n_vocab=128256, tied=True),
    "8b": dict(n_layer=32, n_embd=4096, n_head=32, n_head_kv=8, head_dim=128, n_ff=14336, n_vocab=128256, tied=False),
    "toy": dict(n_layer=4, n_embd=512, n_head=8, n_head_kv=2, head_dim=64, n_ff=1024, n_vocab=1024, tied=True),
}
CONFIGS = ("stock", "full", "kept", "archived", "short")
COMPRESSED = ("kept", "archived")


def model_path(args) -> Path:
    """The GGUF, made unless it is there."""
    import gguf_factory
    from gguf import GGMLQuantizationType as QType

    path = Path(args.models) / f"random-{args.shape}-{args.weights}.gguf"
    if path.exists():
        return path

    class Writer(gguf_factory._Writer):
        """Layers share their random blocks in memory; on disk each has its own."""

        @functools.cache
        def blocks(self, rows, cols, std):
            return gguf_factory.random_blocks(self.rng, self.shape.weights, rows, cols, std)

        def matrix(self, name, rows, cols, std):
            self.gguf.add_tensor(name, self.blocks(rows, cols, std), raw_dtype=self.shape.weights)

    print(f"writing {path}", file=sys.stderr)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    shape = gguf_factory.Shape(**SHAPES[args.shape], weights=QType[args.weights], n_ctx_train=131072, rope_base=500000.0)
    gguf_factory.write_llama(part, shape, writer=Writer)
    part.rename(path)
    return path


# --- one process per configuration -----------------------------------------------------------------------------------


def memory() -> dict[str, int]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    names = {"rss": "VmRSS", "rss_anon": "RssAnon", "peak_rss": "VmHWM"}
    return {name: int(fields[key].split()[0]) * 1024 for name, key in names.items()}


def serve(job: dict) -> None:
    """Answer commands, one JSON object per line: prefill, decode, memory."""
    import engine
    import numpy as np

    def settings(policy):
        prefill = "chunked" if job["chunked"] else "dense"
        return engine.params(policy=policy, budget=job["budget"], prefill=prefill, gates=job.get("gates"), archive="auto" if job["config"] == "archived" else "off")

    kv = None
    if job["config"] in ("full", *COMPRESSED):
        # Expected Attention sums up queries only where a context is made with it
        summed = [policy for policy in job["also"] if policy.startswith("expected")]
        kv = settings("full" if job["config"] == "full" else [*summed, job["policy"]][0])
    model = engine.Model(job["model"], kv, n_gpu_layers=job["gpu_layers"])
    n = job["tokens"]
    ctx = engine.Context(model, n_ctx=n + job["step"] + 256, n_batch=2048, n_ubatch=512, type_k=job["cache"], n_threads=job["threads"])
    tokens = np.random.default_rng(0).integers(3, 1000, n + job["step"])

    def stats():
        if not kv:
            return None
        s = ctx.stats()
        return {name: getattr(s, name) for name, _ in s._fields_}

    def timed(call, *args):
        wall, cpu = time.perf_counter(), time.process_time()
        call(*args)
        return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}

    def prefill():
        ctx.clear()
        out = timed(ctx.decode, tokens[:n]) | {"before": stats(), "memory_before": memory()}
        if job["config"] in COMPRESSED:
            out["score"] = {policy: score(policy) for policy in job["also"]}
            ctx.set_params(settings(job["policy"]))
            out["compress"] = timed(ctx.compress) | engine.scoring()
        return out | {"after": stats(), "memory": memory()}

    def score(policy):
        """What scoring everything costs, the second time: what is made once per model is there then."""
        ctx.set_params(settings(policy))
        return [timed(ctx.score) for _ in range(2)][1]

    def decode():
        out = timed(lambda: [ctx.decode([token]) for token in tokens[n:]])
        assert ctx.seq_rm(0, n, -1)
        return out | {"memory": memory()}

    for line in sys.stdin:
        print(json.dumps({"prefill": prefill, "decode": decode}[line.strip()]()), flush=True)


class Worker:
    def __init__(self, job: dict):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(job)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, command: str) -> dict:
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a benchmark process ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


# --- all of them -----------------------------------------------------------------------------------------------------


def measure(args, model: Path, cache: str) -> dict:
    """One cache type: prefill every configuration, then decode in turns."""
    job = {name: getattr(args, name) for name in ("budget", "chunked", "gpu_layers", "threads", "step")}
    job |= {"policy": args.policy[0], "also": args.policy if len(args.policy) > 1 else []}
    workers, results = {}, {}
    held = args.tokens
    for config in CONFIGS:
        n = held if config == "short" else args.tokens
        print(f"{cache}: {config}, {n} tokens", file=sys.stderr)
        workers[config] = Worker(job | {"config": config, "model": str(model), "tokens": n, "cache": cache})
        r = results[config] = {"tokens": n, "prefill": workers[config].ask("prefill")}
        if config == "kept":
            after = r["prefill"]["after"]
            held = max(1, round(after["entries_held"] * after["tokens_seen"] / after["entries_full"]))
    seconds = {config: [] for config in CONFIGS}
    for turn in range(args.turns + 1):
        for config in CONFIGS:
            r = workers[config].ask("decode")
            results[config]["memory"] = r["memory"]
            if turn:  # the first is a warm-up
                seconds[config].append(r["seconds"])
    for config in CONFIGS:
        workers[config].close()
        r = results[config]
        r["prefill_tokens_per_s"] = r["tokens"] / r["prefill"]["seconds"]
        r["decode_seconds"] = seconds[config]
        r["kv_bytes"] = kv_bytes(r, results["kept"])
        r["decode_tokens_per_s"] = args.step / statistics.median(seconds[config])

    def ratio(a, b):
        return statistics.median(y / x for x, y in zip(seconds[a], seconds[b]))

    kept = results["kept"]["prefill"]
    spent = kept["after"]
    return {
        "cache": cache,
        "configurations": results,
        "ratios": {
            "full_over_stock_decode": ratio("full", "stock"),
            "kept_over_stock_decode": ratio("kept", "stock"),
            "kept_over_short_decode": ratio("kept", "short"),
            "archived_over_kept_decode": ratio("archived", "kept"),
            "archived_over_kept_prefill": kept["seconds"] / results["archived"]["prefill"]["seconds"],
            "archived_over_kept_compression": kept["compress"]["seconds"] / results["archived"]["prefill"]["compress"]["seconds"],
            "full_over_stock_prefill": results["stock"]["prefill"]["seconds"] / results["full"]["prefill"]["seconds"],
            "compression_share_of_prefill": kept["compress"]["seconds"] / kept["seconds"],
            "compression_share_of_prefill_cpu": kept["compress"]["cpu_seconds"] / kept["cpu_seconds"],
            "kv_bytes_after_over_budget": spent["kv_bytes"] / (spent["kv_bytes_full"] * spent["entries_held"] / spent["entries_full"]),
        },
        "scoring": {name: kept["compress"][name] for name in ("graphs", "bytes_in", "bytes_out")},
        "compression_seconds": {k: spent[k + "_seconds"] for k in ("score", "select", "compact")},
        "score_share_of_prefill": {policy: t["seconds"] / kept["seconds"] for policy, t in kept["score"].items()},
    }


def kv_bytes(result: dict, kept: dict) -> dict[str, int]:
    """Allocated for the cache before and after compressing; for llama.cpp without us, what its rows take."""
    if result["prefill"]["before"]:
        return {when: result["prefill"][when]["kv_bytes"] for when in ("before", "after")}
    full = kept["prefill"]["after"]
    rows = round(full["kv_bytes_full"] * result["tokens"] / full["tokens_seen"])
    return {"before": rows, "after": rows}


def show(args, run: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    def mib(n):
        return f"{n / 2**20:.1f}" if n < 100 * 2**20 else f"{n / 2**20:.0f}"

    table = Table(title=f"{args.shape} {args.weights}, {args.tokens} tokens, {run['cache']} cache, {args.policy[0]} {args.budget}, {args.threads} threads")
    for name in ("", "tokens", "prefill tok/s", "decode tok/s", "KV MiB before", "after", "peak RSS MiB", "final RSS", "of it anonymous"):
        table.add_column(name, justify="left" if not name else "right")
    for config in CONFIGS:
        r = run["configurations"][config]
        kv, m = r["kv_bytes"], r["memory"]
        table.add_row(
            config, str(r["tokens"]), f"{r['prefill_tokens_per_s']:.1f}", f"{r['decode_tokens_per_s']:.2f}",
            mib(kv["before"]), mib(kv["after"]), mib(m["peak_rss"]), mib(m["rss"]), mib(m["rss_anon"]),
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    q = run["ratios"]
    console.print(f"decode, full : stock   {q['full_over_stock_decode']:.2f}")
    console.print(f"decode, kept : stock   {q['kept_over_stock_decode']:.2f}")
    console.print(f"decode, kept : short   {q['kept_over_short_decode']:.2f}")
    console.print(
        f"with an archive : without   decode {q['archived_over_kept_decode']:.2f}, prefill {q['archived_over_kept_prefill']:.2f},"
        f" compression {q['archived_over_kept_compression']:.2f}"
    )
    console.print(f"prefill, full : stock  {q['full_over_stock_prefill']:.2f}")
    s = run["compression_seconds"]
    console.print(
        f"compression            {100 * q['compression_share_of_prefill']:.2f} % of prefill,"
        f" {100 * q['compression_share_of_prefill_cpu']:.2f} % of its processor time (scoring {s['score']:.2f} s, selection {s['select']:.2f} s, compaction {s['compact']:.2f} s)"
    )
    c = run["scoring"]
    console.print(f"scoring                {c['graphs']} graphs, {mib(c['bytes_in'])} MiB of inputs, {mib(c['bytes_out'])} MiB of results")
    for policy, share in run["score_share_of_prefill"].items():
        console.print(f"scoring, {policy:<14}{100 * share:.2f} % of prefill")
    console.print(f"bytes after : entries kept, exactly stored  {q['kv_bytes_after_over_budget']:.2f}")


def parse(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="1b")
    p.add_argument("--weights", choices=("Q4_0", "Q8_0", "Q4_K", "Q6_K"), default="Q4_0")
    p.add_argument("--tokens", type=int, default=8192, help="length of the prompt")
    p.add_argument("--cache", action="append", choices=("f16", "bf16", "f32", "q8_0", "q4_0"), help="repeatable; default f16")
    p.add_argument("--policy", nargs="+", default=["laprox"], help="the first compresses; of several, all are timed at scoring")
    p.add_argument("--budget", default="5%")
    p.add_argument("--chunked", action="store_true", help="prefill through a small physical cache")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--gpu-layers", type=int, default=0)
    p.add_argument("--step", type=int, default=16, help="tokens decoded per turn")
    p.add_argument("--turns", type=int, default=8)
    p.add_argument("--quick", action="store_true", help="2,048 tokens, 4 turns")
    p.add_argument("--models", default=str(ROOT / "build" / "bench"), help="folder for the GGUF")
    p.add_argument("--json", type=Path, help="also write the results here")
    p.add_argument("--serve", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.quick:
        args.tokens, args.turns = min(args.tokens, 2048), min(args.turns, 4)
    return args


def main() -> None:
    args = parse()
    if args.serve:
        serve(json.loads(args.serve))
        return
    model = model_path(args)
    settings = {k: v for k, v in vars(args).items() if k not in ("serve", "json", "models", "cache")}
    out = {"settings": settings, "machine": {"processor": processor(), "cores": os.cpu_count()}, "runs": []}
    for cache in args.cache or ["f16"]:
        out["runs"].append(measure(args, model, cache))
        show(args, out["runs"][-1])
    text = json.dumps(out)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")


def processor() -> str:
    try:
        names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return names[0]
    except (OSError, IndexError):
        return platform.processor()


if __name__ == "__main__":
    main()
