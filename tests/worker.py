"""Steps on one context, here or in a process of its own (for the unpatched library, for memory, for crashes).

    run_steps(model, [["decode", tokens], ["greedy", 20], ["seq_rm", 0, 4, 90]], context={"n_ctx": 512})

returns one result per step. As a program: worker.py JOB.pickle RESULT.pickle
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np


def run_steps(model, steps, context, kv=None):
    import engine

    results = []
    with engine.Model(model, engine.params(**kv) if kv else None) as m, engine.Context(m, **context) as ctx:
        for name, *args in steps:
            results.append(STEPS[name](ctx, *args))
    return results


def _greedy(ctx, first, n, seq=0):
    """Feed `first`, then what the model answers, n tokens in all: logits [n, n_vocab]."""
    rows, token = [], first
    for _ in range(n):
        rows.append(ctx.decode([token], seq))
        token = int(rows[-1].argmax())
    return np.array(rows)


def rss_bytes() -> int:
    """Resident memory now."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


STEPS = {
    "decode": lambda ctx, tokens, seq=0: ctx.decode(tokens, seq, all_logits=True),
    "prompt": lambda ctx, tokens, seq=0: ctx.decode(tokens, seq),
    "submit": lambda ctx, tokens: ctx.submit(tokens, range(len(tokens))),
    "greedy": _greedy,
    "compress": lambda ctx, seq=0: ctx.compress(seq),
    "held": lambda ctx, seq=0: ctx.held(seq),
    "stats": lambda ctx, seq=0: {name: getattr(ctx.stats(seq), name) for name, _ in ctx.stats(seq)._fields_},
    "seq_rm": lambda ctx, *args: ctx.seq_rm(*args),
    "seq_cp": lambda ctx, *args: ctx.seq_cp(*args),
    "clear": lambda ctx: ctx.clear(),
    "save": lambda ctx: ctx.save(),
    "load": lambda ctx, data: ctx.load(data),
    "seq_save": lambda ctx, seq=0: ctx.seq_save(seq),
    "seq_load": lambda ctx, data, seq=0: ctx.seq_load(data, seq),
    "rss": lambda ctx: rss_bytes(),
    "peak_rss": lambda ctx: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
}


def run_in_process(model, steps, context, folder, kv=None, lib_dir=None):
    """run_steps() in a fresh interpreter; lib_dir chooses the libllama."""
    job, out = Path(folder) / "job.pickle", Path(folder) / "result.pickle"
    job.write_bytes(pickle.dumps((str(model), steps, context, kv)))
    env = dict(os.environ)
    if lib_dir:
        env["LLAMA_CPP_LIB_PATH"] = str(lib_dir)
    done = subprocess.run([sys.executable, __file__, str(job), str(out)], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr[-4000:]}"
    return pickle.loads(out.read_bytes())


if __name__ == "__main__":
    job = pickle.loads(Path(sys.argv[1]).read_bytes())
    Path(sys.argv[2]).write_bytes(pickle.dumps(run_steps(*job)))
