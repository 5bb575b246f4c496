"""Sequences that aren't neighbours are evaluated in one pass, with the results they have alone."""

import engine
import numpy as np
import pytest
from devices import TOLERANCE


def generate(context, seqs, n, start):
    """n steps of a token each for all of `seqs` at once: the logits of the last step."""
    for i in range(n):
        logits = context.submit([(5 + s, start + i, (s,)) for s in seqs], list(range(len(seqs))))
    return logits


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("policy", ["full", "laprox"])
def test_graphs_are_reused_and_results_are_those_of_each_alone(toy, rng, arch, unified, policy):
    prompts = {s: rng.integers(3, 512, 150) for s in range(4)}
    kv = engine.params(policy, budget="30%")

    def run(seqs):
        with engine.Model(toy(arch), kv) as model, engine.Context(model, n_ctx=1024, n_seq_max=4, kv_unified=unified) as context:
            for s in seqs:
                context.decode(prompts[s], seq=s)
                context.compress(s)
            generate(context, seqs, 1, 150)
            before = context.graphs_reused()
            logits = generate(context, seqs, 20, 151)
            return logits, context.graphs_reused() - before

    alone = {s: run([s])[0][0] for s in range(4)}
    for seqs in ([0, 1], [0, 2], [3, 1], [0, 3, 2]):
        logits, reused = run(seqs)
        assert reused >= 19, (seqs, reused)
        for row, s in zip(logits, seqs, strict=True):
            np.testing.assert_allclose(row, alone[s], atol=2 * TOLERANCE)


def test_a_token_of_several_sequences_is_refused(toy, rng):
    with engine.Model(toy(), engine.params()) as model, engine.Context(model, n_ctx=512, n_seq_max=3, kv_unified=True) as context:
        with pytest.raises(engine.Refused):
            context.submit([(5, 0, (0, 2))], [0])
        context.decode(rng.integers(3, 512, 20), seq=2)
        assert context.pos_max(2) == 19 and context.pos_max(0) == -1
