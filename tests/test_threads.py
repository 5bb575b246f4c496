"""Contexts of one model on threads of their own, which share what the model has learned for scoring.

A call through ctypes lets go of Python's lock, so these threads do run at once. scripts/sanitize tsan runs this on a build that
sees every access to what they share.
"""

import threading

import engine
import numpy as np
import pytest


def at_once(*work):
    """What each of them returns; the first exception of any."""
    results, failed = [None] * len(work), []
    ready = threading.Barrier(len(work))

    def run(i):
        try:
            ready.wait()
            results[i] = work[i]()
        except BaseException as e:  # noqa: BLE001 - a thread's exceptions are nobody's
            failed.append(e)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return results


def conversation(model, seed, n_threads=1):
    """Everything a context does, from its making to its end: the entries it held and the logits it gave."""
    rng = np.random.default_rng(seed)
    seen = []
    with engine.Context(model, n_ctx=1024, n_batch=128, n_seq_max=2, n_threads=n_threads) as ctx:
        for n in (300, 1, 60):
            seen.append(ctx.decode(rng.integers(3, 512, n)))
            ctx.compress()
            seen += ctx.held().values()
        seen += ctx.score().values()
        assert ctx.seq_load(ctx.seq_save(0), 1)
        seen.append(ctx.decode([5, 6], seq=1))
        assert ctx.seq_rm(0, ctx.pos_max(), -1) and not ctx.seq_rm(0, 0, 1)
        ctx.seq_cp(0, 1)
        with pytest.raises(engine.Refused, match="sequence 7 doesn't exist"):  # of this thread, not of the other one
            ctx.compress(7)
        seen.append(ctx.decode([8], seq=1))
        ctx.clear()
    return seen


# what is computed once per model: Gram matrices, rows of the output projection from the file, nothing
@pytest.mark.parametrize("policy, weights, n_threads", [("laprox", "F32", 2), ("criticalkv", "Q4_0", 1), ("expected", "F32", 1)])
def test_contexts_at_once(toy, policy, weights, n_threads):
    """The same as one after the other, to the bit."""
    with engine.Model(toy(weights=weights), engine.params(policy=policy, budget="20%")) as model:
        together = at_once(*(lambda seed=seed: conversation(model, seed, n_threads) for seed in (1, 2, 3)))
        for seed, seen in enumerate(together, 1):
            alone = conversation(model, seed, n_threads)
            assert len(alone) == len(seen) and all(map(np.array_equal, alone, seen))


def test_settings_of_one_context_while_another_works(toy):
    """A context's own settings are its own."""
    rng = np.random.default_rng(0)
    with engine.Model(toy(), engine.params(budget="20%")) as model, engine.Context(model, n_ctx=1024) as ctx:

        def change():
            for budget in [20, 30, 40, 50] * 10:
                ctx.set_params(engine.params(budget=f"{budget}%", policy="laprox" if budget > 30 else "keydiff"))
                ctx.decode(rng.integers(3, 512, 12))
                ctx.compress()

        _, seen = at_once(change, lambda: conversation(model, 1))
        assert all(map(np.array_equal, conversation(model, 1), seen))
