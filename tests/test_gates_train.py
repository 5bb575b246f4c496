"""Training of retention gates. All of it needs PyTorch and transformers (the extra `train`), and is skipped without them."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time

import gates_forward
import numpy as np
import pytest
from gguf_factory import CHATML

torch = pytest.importorskip("torch", reason='training gates needs PyTorch: pip install -e ".[train]"')
pytest.importorskip("transformers", reason='training gates needs transformers: pip install -e ".[train]"')

from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from laprox.gates import sidecar  # noqa: E402
from laprox.gates.attention import retention_attention  # noqa: E402
from laprox.gates.data import Example, read_examples  # noqa: E402
from laprox.gates.losses import capacity_loss, prediction_losses  # noqa: E402
from laprox.gates.modules import Gated, GateStack, fresh_gates  # noqa: E402
from laprox.gates.training import Recipe, Trainer  # noqa: E402

torch.set_num_threads(1)

SIZES = dict(vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
MODELS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config), "qwen3": (Qwen3ForCausalLM, Qwen3Config)}


def small(name="llama", **changes):
    torch.manual_seed(0)
    model, config = MODELS[name]
    return model(config(**{**SIZES, "initializer_range": 0.3, **changes})).eval()


def gated(name="llama", kind="rg10", bias=3.0, hidden=16, chunk=5):
    model = small(name)
    return Gated(model, fresh_gates(model, kind, hidden, bias), chunk)


def sequence(n=40, seed=0):
    ids = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], n).tolist()
    return Example(ids, list(range(1, n)))


# --- attention -------------------------------------------------------------------------------------------------------


def naive(q, k, v, log_beta, scale):
    """softmax(q k + (t - i) log beta_i), one query and one head at a time, in float64."""
    q, k, v, log_beta = (x.double() for x in (q, k, v, log_beta))
    out, retained = torch.zeros_like(q), torch.zeros(*log_beta.shape, dtype=torch.float64)
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            ages = torch.arange(t, -1, -1, dtype=torch.float64)
            for h in range(q.shape[1]):
                logits = k[b, h // group, : t + 1] @ q[b, h, t] * scale + ages * log_beta[b, h // group, : t + 1]
                out[b, h, t] = logits.softmax(0) @ v[b, h // group, : t + 1]
            for h in range(k.shape[1]):
                retained[b, h, t] = (log_beta[b, h, : t + 1].exp() ** ages).sum()
    return out, retained


@pytest.mark.parametrize("chunk", [1, 7, 19, 64])
def test_attention_in_chunks_is_the_naive_one(chunk):
    torch.manual_seed(1)
    q, k, v = torch.randn(2, 4, 19, 8), torch.randn(2, 2, 19, 8), torch.randn(2, 2, 19, 8)
    log_beta = -torch.rand(2, 2, 19).exponential_() * 0.2
    log_beta[0, 0, 3], log_beta[1, 1, 5] = -1e-8, -30.0  # hardly forgotten, and at once
    expected, s = naive(q, k, v, log_beta, 0.3)
    output, retained = retention_attention(q, k, v, log_beta, 0.3, chunk)
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(retained, s.float(), rtol=1e-5, atol=1e-5)


def test_a_strict_capacity_counts_entries_for_longer():
    torch.manual_seed(1)
    q, k, v, log_beta = torch.randn(1, 4, 19, 8), torch.randn(1, 2, 19, 8), torch.randn(1, 2, 19, 8), -torch.rand(1, 2, 19)
    output, retained = retention_attention(q, k, v, log_beta, 0.3, 7, strictness=4.0)
    torch.testing.assert_close(output, retention_attention(q, k, v, log_beta, 0.3, 7)[0])
    torch.testing.assert_close(retained, naive(q, k, v, log_beta / 4, 0.3)[1].float(), rtol=1e-5, atol=1e-5)


def test_chunks_have_the_naive_gradient():
    torch.manual_seed(2)
    inputs = [torch.randn(1, 4, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8), -torch.rand(1, 2, 11)]

    def gradients(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output, retained = function(*leaves, 0.3)
        (output.sin().sum() + retained.square().sum()).backward()
        return [x.grad for x in leaves]

    for a, b in zip(gradients(lambda *x: retention_attention(*x, 4)), gradients(naive)):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-4)


def test_ages_of_a_million_stay_finite():
    log_beta = torch.tensor([[[-1e-8, -40.0]]])
    decay = (torch.tensor(1e6) * log_beta).exp()
    assert decay[0, 0, 0] == pytest.approx(math.exp(-0.01), rel=1e-5) and decay[0, 0, 1] == 0
    z = torch.tensor([18.0, 40.0, -40.0])
    got = torch.nn.functional.logsigmoid(z)
    np.testing.assert_allclose(got, gates_forward.log_sigmoid(z.numpy()), rtol=1e-6)
    assert got[0] == pytest.approx(-1.523e-8, rel=1e-3) and got[1] < 0


# --- losses ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False])
def test_the_hinge_is_the_papers(whole):
    rng = np.random.default_rng(0)
    s = rng.uniform(0, 9, (3, 1, 2, 12)).astype(np.float32)  # [layers, batch, KV heads, n]
    budget, over = 2.5, []
    for t in range(12):
        if whole:  # DBTrimKV: max(0, S_t - M L H) / max(t L H - M L H, 1)
            over.append(max(0, s[..., t].sum() - budget * 6) / max((t + 1) * 6 - budget * 6, 1))
        else:  # TRIM-KV: each head for itself
            over += [max(0, x - budget) / max(t + 1 - budget, 1) for x in s[..., t].ravel()]
    active = [x for x in over if x > 0]
    got = capacity_loss(torch.from_numpy(s), budget, whole)
    assert got.item() == pytest.approx(sum(active) / len(active), rel=1e-5)


def test_within_the_capacity_there_is_no_loss():
    assert capacity_loss(torch.ones(2, 1, 2, 9), 5, True) == 0 == capacity_loss(torch.ones(2, 1, 2, 9), 5, False)


@pytest.mark.parametrize("rows", [3, 100])
def test_prediction_losses(rows):
    torch.manual_seed(3)
    head, a, b, target = torch.randn(20, 8), torch.randn(10, 8), torch.randn(10, 8), torch.randint(20, (10,))
    cross, ntp, kl = prediction_losses(lambda h: h @ head.T, a, b, target, rows)
    q, p = (a @ head.T).log_softmax(-1), (b @ head.T).softmax(-1)
    assert cross.item() == pytest.approx(-(p * q).sum(-1).mean().item(), rel=1e-5)
    assert ntp.item() == pytest.approx(-q[range(10), target].mean().item(), rel=1e-5)
    assert kl.item() == pytest.approx((p * (p.log() - q)).sum(-1).mean().item(), rel=1e-4)


# --- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_without_gates_the_model_is_as_it_was(name):
    ids = torch.tensor([sequence(33).ids])
    expected = small(name)(ids).logits
    g = gated(name)
    with torch.no_grad():
        assert (g.logits(g.hidden(ids)) - expected).abs().max() > 1e-2
        with g.off():
            torch.testing.assert_close(g.logits(g.hidden(ids)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gates_that_forget_nothing_change_nothing(name):
    ids = torch.tensor([sequence(33).ids])
    g = gated(name, bias=60.0)
    with torch.no_grad():
        with g.off():
            expected = g.hidden(ids)
        torch.testing.assert_close(g.hidden(ids), expected, rtol=1e-4, atol=1e-4)
    s = g.retained()
    torch.testing.assert_close(s, torch.arange(1.0, 34.0).expand_as(s))


@pytest.mark.parametrize("name", MODELS)
def test_a_gate_reads_the_normed_input_of_its_block(name):
    """What the engine feeds it: the tensor attn_norm of its layer. Gates that forget change what later layers read."""
    g = gated(name, bias=1.0)
    ids, normed = torch.tensor([sequence(20).ids]), {}
    for i, layer in enumerate(g.model.model.layers):
        layer.input_layernorm.register_forward_hook(lambda _m, _a, output, i=i: normed.__setitem__(i, output))
    with torch.no_grad():
        g.hidden(ids)
        for i in range(3):
            log_beta = g.gates(i, normed[i])
            _, s = naive(torch.zeros(1, 4, 20, 16), torch.zeros(1, 2, 20, 16), torch.zeros(1, 2, 20, 16), log_beta, 1)
            torch.testing.assert_close(g.retained()[i], s.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_only_gates_learn(kind):
    g = gated(kind=kind)
    before = {n: p.clone() for n, p in g.model.named_parameters()}
    trainer = Trainer(g, Recipe(kind=kind, hidden=16, budget=4, steps=3, warmup=1, lr=1e-2), [sequence()])
    loss = trainer.losses(sequence())["loss"]
    loss.backward()
    assert all(p.grad is None for p in g.model.parameters())
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in g.gates.parameters())
    gates = {n: p.clone() for n, p in g.gates.named_parameters()}
    for _ in range(3):
        trainer.advance()
    assert all(torch.equal(p, before[n]) for n, p in g.model.named_parameters())
    assert all(not torch.equal(p, gates[n]) for n, p in g.gates.named_parameters())


@pytest.mark.parametrize("whole", [True, False])
def test_the_loss_falls_and_the_capacity_is_met(whole):
    g = gated(bias=6.0)
    trainer = Trainer(g, Recipe(hidden=16, budget=8, whole=whole, steps=60, warmup=5, lr=1e-2), [sequence(seed=i) for i in range(3)])
    lines = [trainer.advance() for _ in range(60)]
    first, last = (np.mean([line["loss"] for line in part]) for part in (lines[:6], lines[-6:]))
    assert last < first - 0.1
    assert lines[0]["retained"] > 30 and lines[-1]["retained"] < 16


def test_a_run_that_goes_on_is_the_run_that_never_stopped(tmp_path):
    recipe, data = Recipe(hidden=16, budget=8, steps=6, warmup=2, lr=1e-2, accumulate=2), [sequence(20 + i, seed=i) for i in range(5)]
    whole = Trainer(gated(), recipe, data)
    lines = [whole.advance() for _ in range(6)]
    first = Trainer(gated(), recipe, data)
    for _ in range(3):
        first.advance()
    first.save(tmp_path / "checkpoint.pt")
    second = Trainer(gated(bias=9.0), recipe, data)  # what it starts with is overwritten
    second.load(tmp_path / "checkpoint.pt")
    again = [second.advance() for _ in range(3)]
    assert [line["loss"] for line in again] == [line["loss"] for line in lines[3:]]
    for a, b in zip(whole.gated.gates.parameters(), second.gated.gates.parameters()):
        assert torch.equal(a, b)


def test_layers_computed_again_give_the_same():
    a, b = gated(), gated()
    b.model.train().gradient_checkpointing_enable({"use_reentrant": False})
    for g in (a, b):
        Trainer(g, Recipe(hidden=16, budget=4), [sequence()]).losses(sequence())["loss"].backward()
    for x, y in zip(a.gates.parameters(), b.gates.parameters()):
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_what_is_written_is_what_was_trained(kind, tmp_path):
    torch.manual_seed(4)
    g = GateStack(kind, 3, 32, 64, 2, "silu", 5.0)
    sidecar.write(tmp_path / "g.gguf", g.arrays(training_budget=7, source="test", model="m"), "f32")
    back = sidecar.read(tmp_path / "g.gguf")
    x = torch.randn(9, 32)
    for i in range(3):
        got = gates_forward.log_beta(back, i, x.numpy())
        np.testing.assert_allclose(got.T, g(i, x[None])[0].detach(), rtol=1e-5, atol=1e-9)
    assert (back.kind, back.training_budget, back.shared("gate_out.weight")) == (kind, 7, kind == "rg10")


@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_starting_from_other_gates(kind, tmp_path):
    sidecar.write(tmp_path / "g.gguf", GateStack(kind, 3, 32, 64, 2, "silu", 5.0).arrays(), "f32")
    gates, new = sidecar.read(tmp_path / "g.gguf"), GateStack(kind, 3, 32, 64, 2, "silu", 1.0)
    new.start_from(gates)
    for a, b in zip(new.arrays().layers, gates.layers):
        assert all(np.array_equal(t, b.tensors()[name]) for name, t in a.tensors().items())
    for other, reason in ((("rg", 4, 32, 64), ".* layers|kind"), (("rg10", 3, 32, 32), "hidden 64|kind"), ((kind, 3, 16, 64), "n_embd 32")):
        with pytest.raises(ValueError, match=f"the gates to start from have ({reason})"):
            GateStack(*other, 2, "silu", 1.0).start_from(gates)


def test_models_of_another_build_are_refused():
    qwen = small("qwen2", layer_types=["full_attention", "sliding_attention", "full_attention"], use_sliding_window=True, sliding_window=8)
    with pytest.raises(ValueError, match="without full attention"):
        fresh_gates(qwen, "rg", 16, 1.0)
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        fresh_gates(small(hidden_act="relu"), "rg", 16, 1.0)


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random Llama as a Hugging Face folder, with a tokenizer of bytes and a chat format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("hf")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHATML, eos_token="<|im_end|>")
    fast.save_pretrained(path)
    small(vocab_size=len(alphabet) + 2, max_position_embeddings=4096).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def gguf(toy):
    """A GGUF of the folder's sizes."""
    return toy(n_layer=3, n_embd=32, n_head=4, n_head_kv=2, head_dim=16, n_ff=48)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": "The badge of Mirel is 4821.\n\nWhat is the badge of Mirel?"}, {"role": "assistant", "content": "The badge of Mirel is 4821."},
                      {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No more."}]},
        {"prompt": "The badge of Mirel is", "completion": " 4821."},
        {"text": "The rain over Kelford stopped before noon. " * 9},
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_what_is_supervised(folder, data):
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    chat, pair, text = read_examples([data], tok, 400)
    said = "".join(tok.decode([chat.ids[i]]) for i in chat.supervised)
    assert said.split("<|im_end|>") == ["The badge of Mirel is 4821.", "\nNo more.", "\n"]
    assert tok.decode(chat.ids).count("<|im_start|>assistant\n") == 2
    assert tok.decode([pair.ids[i] for i in pair.supervised]) == " 4821."
    assert text.supervised == list(range(1, len(text.ids)))
    pieces = read_examples([data], tok, 150)[2:]
    assert [t for piece in pieces for t in piece.ids] == text.ids and len(pieces) == -(-len(text.ids) // 150)
    with pytest.raises(ValueError, match="line 1: .* tokens, more than --length 9"):
        read_examples([data], tok, 9)


@pytest.mark.parametrize("line", ["{}", "[]", '{"messages": [{"role": "user"}]}', '{"messages": [{"role": "user", "content": "x"}]}', "{"])
def test_lines_that_cannot_be_used_are_named(folder, tmp_path, line):
    from transformers import AutoTokenizer

    (tmp_path / "d.jsonl").write_text('{"text": "some words"}\n' + line + "\n")
    with pytest.raises(ValueError, match="d.jsonl line 2"):
        read_examples([tmp_path / "d.jsonl"], AutoTokenizer.from_pretrained(folder), 100)


def command(folder, data, output, *more):
    options = ["--hidden", "32", "--bias", "5", "--steps", "4", "--warmup", "1", "--lr", "1e-3", "-M", "8", "-t", "1", "--save-every", "2"]
    return [sys.executable, "-m", "laprox", "train-gates", str(folder), "-d", str(data), "-o", str(output), *options, *map(str, more)]


def test_train_gates_writes_a_sidecar(folder, gguf, data, tmp_path):
    out = tmp_path / "model.kv-gates.gguf"
    done = subprocess.run(command(folder, data, out, "--model", gguf), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    gates = sidecar.read(out)
    assert (gates.kind, gates.hidden, gates.training_budget, gates.model) == ("rg10", 32, 8, gguf.name)
    assert len(gates.fingerprint) == 16
    log = [json.loads(line) for line in (tmp_path / "model.kv-gates.gguf.log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == [1, 2, 3, 4]
    assert {"loss", "kl", "next_token", "capacity", "retained", "gradient", "lr", "tokens", "seconds"} <= log[0].keys()
    assert not (tmp_path / "model.kv-gates.gguf.partial").exists()

    again = tmp_path / "again.gguf"
    subprocess.run(command(folder, data, again, "--model", gguf), capture_output=True, check=True)
    assert again.read_bytes() == out.read_bytes()


def test_ctrl_c_and_going_on(folder, data, tmp_path):
    out, steps = tmp_path / "g.gguf", ("--steps", "4000")
    run = subprocess.Popen(command(folder, data, out, *steps), stderr=subprocess.PIPE, text=True)
    log = tmp_path / "g.gguf.partial" / "log.jsonl"
    end = time.monotonic() + 300
    while not (log.exists() and log.stat().st_size) and run.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    assert run.returncode == 130 and "goes on with it" in errors, errors
    done = len(log.read_text().splitlines())
    assert 1 <= done < 4000 and not out.exists()

    other = subprocess.run(command(folder, data, out, "--steps", "5"), capture_output=True, text=True)
    assert other.returncode == 1 and "its steps is 4000, now it is 5" in other.stderr
    run = subprocess.Popen(command(folder, data, out, *steps), stderr=subprocess.PIPE, text=True)
    while len(log.read_text().splitlines()) <= done and run.poll() is None:
        time.sleep(0.05)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=300)
    assert f"Going on from step {done} of 4000" in errors
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()][: done + 1] == list(range(1, done + 2))


@pytest.mark.parametrize(
    "options, reason",
    [
        (("--gate", "rg7"), "--gate is 'rg7'; accepted: rg, rg10"),
        (("--capacity", "half"), "--capacity is 'half'; accepted: global, local"),
        (("--type", "q2_k"), "--type is 'q2_k'; accepted: f16, q8_0, q4_0, f32"),
        (("-o", "gates.bin"), "gates.bin: gates are a .gguf file"),
        (("--length", "9"), "more than --length 9"),
    ],
)
def test_wrong_settings_are_refused(folder, data, tmp_path, options, reason):
    done = subprocess.run(command(folder, data, tmp_path / "g.gguf", *options), capture_output=True, text=True)
    assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_gguf_of_another_model_is_refused(folder, data, tmp_path, toy):
    done = subprocess.run(command(folder, data, tmp_path / "g.gguf", "--model", toy(n_layer=2)), capture_output=True, text=True)
    assert done.returncode == 1 and "the gates are for a model of layers 3, and" in done.stderr
    assert not list(tmp_path.iterdir())
