"""A trained model on a device keeps what it keeps on the CPU, and answers as it does."""

import devices
import engine
import llama_cpp.llama_cpp as L
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(devices.BACKEND == "cpu", reason="compares a device with the CPU: scripts/test --backend")

TEXT = """The lighthouse of Carrow stands on a rock three miles off the coast. It was built in 1871 by Ada Millbrook, who had
never seen the sea before. Its lamp burned whale oil until the winter of 1902, when the keeper, a man named Tobias Finch,
exchanged it for a mirror and an arc light that he had bought from a bankrupt theatre. The fishermen complained that the
new light frightened the herring. In the village, the baker, Mrs. Oduya, kept a ledger of every ship that passed; it holds
14,212 names, and the last is the Grey Heron, which sank on the ninth of May with a cargo of glass eyes. """
QUESTION = "\nQuestion: Who exchanged the lamp of the lighthouse, and when?\nAnswer:"


def tokens(model, text):
    vocab, data = L.llama_model_get_vocab(model.handle), text.encode()
    out = (L.llama_token * (len(data) + 8))()
    n = L.llama_tokenize(vocab, data, len(data), out, len(out), True, True)
    assert n > 0
    return list(out[:n])


def read_and_answer(path, cache, layers):
    """What each head keeps of the text, its scores, and the answer's tokens with their logits."""
    kv = engine.params(budget="20%", recent=16)
    with engine.Model(path, kv, n_gpu_layers=layers) as model, engine.Context(model, n_ctx=512, type_k=cache) as ctx:
        ctx.decode(tokens(model, TEXT + QUESTION))
        scores = ctx.score()
        logits, answer = ctx.decode(tokens(model, "\n")), []
        ctx.compress()
        held = ctx.held()
        for _ in range(12):
            answer.append((int(logits.argmax()), logits))
            logits = ctx.decode([answer[-1][0]])
    return scores, held, answer


@pytest.mark.parametrize("cache", ["f16", "q8_0"])
def test_the_device_agrees_with_the_cpu(real_model, cache):
    path = real_model("qwen2.5-coder-0.5b")
    (scores, held, answer), (wanted_scores, wanted_held, wanted_answer) = (read_and_answer(path, cache, n) for n in (devices.GPU_LAYERS, 0))
    errors = [np.abs(scores[pair] - want) / np.abs(want).max() for pair, want in wanted_scores.items()]
    assert np.median(np.concatenate(errors)) < 1e-2
    both = sum(len(np.intersect1d(held[pair], want)) for pair, want in wanted_held.items())
    assert both > 0.99 * sum(map(len, wanted_held.values()))
    for (token, logits), (wanted, wanted_logits) in zip(answer, wanted_answer):
        if token != wanted:  # only where the CPU itself can hardly tell them apart
            assert wanted_logits[wanted] - wanted_logits[token] < 2 * np.abs(logits - wanted_logits).max()
            break
