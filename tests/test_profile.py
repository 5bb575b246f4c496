"""`laprox profile`: the table of LU-KV, measured on the engine."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import reference
from gguf_factory import CHATML
from policy_run import random_table, read_profile

from laprox import KVConfig, Llama, __version__, _core
from laprox.chat.loading import load_vocabulary
from laprox.cli import profile as command
from laprox.profile.contexts import QUESTIONS, read_contexts
from laprox.profile.measure import Profiler, Sample, min_keep, observing
from laprox.profile.table import choose

CONFIG = KVConfig(policy="laprox:uniform", window=16, sink=4, recent=16)
STEPS = 12
SHAPE = {"chat_template": CHATML, "n_ctx_train": 4096}
SETTINGS = {"kv_window": 16, "kv_recent": 16, "n_predict": STEPS, "threads": 1, "batch_size": 256}


@pytest.fixture(scope="module")
def model(toy):
    return toy(**SHAPE)


@pytest.fixture
def words(rng):
    """words(n): a text of so many words, of about four tokens each."""
    return lambda n: " ".join(f"w{i}" for i in rng.integers(0, 150, n))


@pytest.fixture
def data(tmp_path, words):
    path = tmp_path / "data.jsonl"
    lines = [{"context": words(n), "questions": [words(5) for _ in range(2)]} for n in (100, 80)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def load(path, kv, **kwargs):
    return Llama(str(path), kv=kv, n_ctx=1024, n_batch=256, n_threads=1, n_threads_batch=1, verbose=False, **kwargs)


def tokens(rng, n):
    return rng.integers(262, 512, n).tolist()


# --- the protocol ----------------------------------------------------------------------------------------------------


def value_norms(llm, net, layer, head):
    """|v_i W_h| of each query head that reads a KV head: [group, n]."""
    _, v = _core.entries(llm._ctx.ctx, layer, head)
    group = net.n_head // net.n_head_kv[layer]
    w_o = net.w[f"blk.{layer}.attn_output.weight"]
    of = lambda h: w_o[:, h * net.d : (h + 1) * net.d]  # noqa: E731
    return np.array([np.linalg.norm(v.astype(np.float64) @ of(head * group + i).T, axis=1) for i in range(group)])


def test_importance(model, rng):
    """The oracle by the book, from the cache's own entries and the queries of the drawn tokens."""
    context, question = tokens(rng, 300), tokens(rng, 20)
    llm = load(model, observing(CONFIG, STEPS))
    profiler = Profiler(llm, "laprox", CONFIG, STEPS)
    profiler.read(context)
    got = profiler.importance(question, seed=3)

    net = reference.Network(model)
    group = net.n_head // net.n_head_kv[0]
    for layer, heads in got.items():
        q, q_pos = _core.queries(llm._ctx.ctx, layer)
        first = len(context) + len(question)
        assert q_pos.tolist() == list(range(first, first + len(q_pos))) and 1 <= len(q_pos) <= STEPS
        for head, importance in enumerate(heads):
            k, _ = _core.entries(llm._ctx.ctx, layer, head)
            pos = llm.kv.positions(layer, head)
            assert pos.tolist() == list(range(llm.n_tokens))  # nothing is evicted
            norms = value_norms(llm, net, layer, head)
            want = np.zeros(len(pos))
            for i in range(group):
                logits = reference.attention_logits(q[:, head * group + i].astype(np.float64), k.astype(np.float64), q_pos[:, None] >= pos, net.scale)
                want = np.maximum(want, reference.softmax(logits).max(0) * norms[i])
            want = want[: len(context)]
            assert np.abs(importance - want).max() < 2e-3 * want.max()


def test_what_the_solver_is_given(model, rng, monkeypatch):
    context, question = tokens(rng, 200), tokens(rng, 10)
    llm = load(model, observing(CONFIG, STEPS))
    profiler = Profiler(llm, "laprox", CONFIG, STEPS)
    given = []
    monkeypatch.setattr(_core, "solve_profile", lambda *args: given.extend(args) or np.zeros((99, 6)))
    profiler.read(context)
    raw = llm.kv.scores()
    profiler.ask(question, seed=1)
    scores, utility, n, keep = given
    assert (n, keep) == (200, 20)

    assert len(scores) == len(utility) == 6
    heads = [head for layer in raw.values() for head in layer]
    for got, head in zip(scores, heads):
        assert np.allclose(got, reference.average_pool(head[4:-16]), rtol=1e-5)

    importance = profiler.importance(question, seed=1)  # drawn again, the same
    net = reference.Network(model)
    for layer, of_heads in importance.items():
        total = sum(value_norms(llm, net, layer, head)[:, : len(context)].sum() for head in range(2))
        for head, x in enumerate(of_heads):
            assert np.allclose(utility[2 * layer + head], x[4:-16] / total, rtol=2e-3)


@pytest.mark.parametrize("scorer", ["snapkv", "keydiff", "expected", "cake", "tova", "rkv"])
def test_every_row_evicts_its_share(model, rng, scorer):
    config = replace(CONFIG, policy=f"{scorer}:uniform")
    llm = load(model, observing(config, STEPS))
    profiler = Profiler(llm, scorer, config, STEPS)
    n = 300
    profiler.read(tokens(rng, n))
    shares = profiler.ask(tokens(rng, 10), seed=0)
    assert shares.shape == (99, 6)
    kept = min_keep(config, n) / n
    for row, percent in zip(shares, range(1, 100)):
        if percent / 100 <= 1 - kept:
            assert row.sum() * n == pytest.approx(round(percent / 100 * 6 * n), abs=0.51)
            assert row.max() <= 1 - kept + 1e-9
        else:
            assert np.allclose(row, percent / 100)  # out of reach
    assert np.ptp(shares[79]) > 0.02  # heads differ
    assert (np.diff(shares, axis=0) >= -1e-9)[: int(100 * (1 - kept)) - 1].all()


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def curve(model, data, tmp_path):
    path = tmp_path / "curve.gguf"
    command.profile(model, [data], path, **SETTINGS)
    return path


def test_the_file(model, curve):
    table, texts = read_profile(curve)
    assert table.shape == (99, 3, 2) and table.dtype == np.float64
    assert np.allclose(table.mean((1, 2)), np.arange(1, 100) / 100, atol=1e-2)
    assert not curve.with_name("curve.gguf.partial").exists()
    llm = load(model, CONFIG)
    assert texts["model"] == model.name and texts["model_fingerprint"] == _core.model_fingerprint(llm._model.model)
    assert (texts["scorer"], texts["window"], texts["sink"], texts["recent"]) == ("laprox", "16", "4", "16")
    assert (texts["samples"], texts["tokens"], texts["cache"], texts["laprox"]) == ("4", str(STEPS), "f16, f16", __version__)


@pytest.mark.parametrize("budget", ["10%", "35%", "60"])
def test_lukv_keeps_the_budget(model, curve, rng, budget):
    n = 400
    llm = load(model, replace(CONFIG, policy="lukv", profile=curve, budget=budget, min_tokens=0))
    llm.eval(tokens(rng, n))
    llm.kv.compress()
    want = int(budget) * 6 if budget.isdigit() else round(float(budget[:-1]) / 100 * n * 6)
    assert llm.kv.stats().entries_held == want


def test_an_interrupted_run_goes_on(model, data, curve, tmp_path, monkeypatch, capsys):
    again = tmp_path / "again.gguf"
    ask, left = Profiler.ask, [1, 2, 99]  # questions until ctrl-C

    def interrupted(self, question, seed):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return ask(self, question, seed)

    monkeypatch.setattr(Profiler, "ask", interrupted)
    for _ in range(2):
        with pytest.raises(command.typer.Exit):
            command.profile(model, [data], again, **SETTINGS)
        assert not again.exists()
        assert "the same command goes on" in capsys.readouterr().err.replace("\n", " ")
        left.pop(0)

    with pytest.raises(ValueError, match="its tokens is 12, now it is 7"):
        command.profile(model, [data], again, **SETTINGS | {"n_predict": 7})
    command.profile(model, [data], again, **SETTINGS)
    assert again.read_bytes() == curve.read_bytes()
    assert not again.with_name("again.gguf.partial").exists()


def test_restart(model, data, curve, tmp_path):
    partial = curve.with_name("curve.gguf.partial")
    partial.mkdir()
    (partial / "settings.json").write_text('{"scorer": "snapkv"}')
    with pytest.raises(ValueError, match="--restart"):
        command.profile(model, [data], curve, **SETTINGS)
    before = curve.read_bytes()
    command.profile(model, [data], curve, **SETTINGS, restart=True)
    assert curve.read_bytes() == before


@pytest.mark.parametrize(
    "change, message",
    [
        ({"scorer": "nonesuch"}, "--scorer is 'nonesuch'; accepted: .*laprox"),
        ({"scorer": "criticalkv"}, "--scorer is 'criticalkv'; accepted: .*laprox"),
        ({"output": "curve.npy"}, "curve.npy: the table is a .gguf file"),
        ({"output": "no/such/curve.gguf"}, "curve.gguf can't be written: No such file"),
        ({"lines": ['{"context": "x", "questions": ["y"]}', "{"]}, "data.jsonl line 2: not JSON"),
        ({"lines": ["", "[]"]}, "data.jsonl line 2: not an object"),
        ({"lines": ['{"context": "x"}']}, 'data.jsonl line 1: "questions" must be'),
        ({"lines": ['{"context": " ", "questions": ["y"]}']}, 'data.jsonl line 1: "context" must be'),
        ({"lines": ['{"context": "x y z", "questions": ["y"]}']}, "data.jsonl line 1: the context is .* tokens, .* at least 40"),
        ({"length": 200}, "data.jsonl line 1: the context is .* tokens, more than 200"),
        ({"lines": [""]}, "data.jsonl: there is nothing in it"),
        ({"kv_window": 0}, "window"),
    ],
)
def test_refused_before_the_work(model, data, tmp_path, change, message):
    if lines := change.pop("lines", None):
        data.write_text("\n".join(lines))
    settings = SETTINGS | {"output": tmp_path / change.pop("output", "curve.gguf")} | change
    with pytest.raises(ValueError, match=message):
        command.profile(model, [data], **settings)
    assert not (tmp_path / "curve.gguf").exists() and not list(tmp_path.glob("*.partial"))


def test_a_context_longer_than_the_model_was_trained_for(toy, data, tmp_path):
    with pytest.raises(ValueError, match="trained for 256: take shorter ones"):
        command.profile(toy(**SHAPE | {"n_ctx_train": 256}), [data], tmp_path / "curve.gguf", **SETTINGS)


def test_a_model_that_cannot_be_compressed(toy, data, tmp_path):
    with pytest.raises(ValueError, match="ALiBi"):
        command.profile(toy("alibi"), [data], tmp_path / "curve.gguf", **SETTINGS)


def test_other_models_and_scorers_refuse_the_curve(toy, curve):
    with pytest.raises(ValueError, match="this model is another one"):
        load(toy(**SHAPE, seed=5), replace(CONFIG, policy="lukv", profile=curve))
    with pytest.raises(ValueError, match="made for scorer laprox"):
        load(toy(**SHAPE), replace(CONFIG, policy="snapkv:profile", profile=curve))
    with pytest.raises(ValueError, match="this model is another one"):
        load(toy(**SHAPE, n_layer=2), replace(CONFIG, policy="lukv", profile=curve))


def test_layers_that_are_not_compressed_get_the_uniform_share(toy, words, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"context": words(60), "questions": ["why?"]}))
    command.profile(toy("gemma2", chat_template=CHATML), [data], tmp_path / "curve.gguf", **SETTINGS)
    table, _ = read_profile(tmp_path / "curve.gguf")
    uniform = np.arange(1, 100)[:, None] / 100
    assert np.array_equal(table[:, 0], np.tile(uniform, 2)) and np.array_equal(table[:, 2], table[:, 0])
    assert not np.allclose(table[:80, 1], table[:80, 0])


def test_from_the_shell(model, words, tmp_path):
    (tmp_path / "notes.txt").write_text(words(60))
    args = ["-m", "laprox", "profile", model, "-d", tmp_path / "notes.txt", "-o", tmp_path / "c.gguf", "--max-samples", "2", "--predict", "4", "-t", "1"]
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "2 questions about 1 contexts" in done.stderr.replace("\n", " ") and "overall, by layer" in done.stderr
    assert read_profile(tmp_path / "c.gguf")[0].shape == (99, 3, 2)
    ask = ["-m", "laprox", "chat", model, "-d", tmp_path / "notes.txt", "--ask", "w1?", "-n", "4", "-t", "1", "--json", "--kv-min-tokens", "0"]
    ask += ["--kv-policy", "lukv", "--kv-profile", tmp_path / "c.gguf", "--kv-budget", "30%"]
    answered = subprocess.run([sys.executable, *map(str, ask)], capture_output=True, text=True, timeout=300)
    assert answered.returncode == 0, answered.stderr
    numbers = json.loads(answered.stdout)
    assert numbers["entries_held"] < 0.4 * numbers["entries_full"]
    done = subprocess.run([sys.executable, *map(str, args), "--scorer", "x"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("laprox: --scorer is 'x'")


# --- published curves --------------------------------------------------------------------------------------------------


@pytest.fixture
def curves(rng, tmp_path):
    """curves(table): as the authors publish them; random ones, if none is given."""

    def make(table=None):
        np.save(tmp_path / "curves.npy", random_table(rng, 3, 2) if table is None else table)
        return tmp_path / "curves.npy"

    return make


@pytest.mark.parametrize("of", [np.asarray, np.asfortranarray, np.float32, np.float16, lambda table: table.astype(">f8")])
def test_published_curves(model, rng, curves, tmp_path, of):
    """Bit for bit, whatever NumPy stored them as."""
    table = of(random_table(rng, 3, 2))
    command.profile(model, convert=curves(table), output=tmp_path / "curve.gguf")
    got, texts = read_profile(tmp_path / "curve.gguf")
    assert got.dtype == np.float64 and np.array_equal(got, table)
    llm = load(model, CONFIG)
    fingerprint = _core.model_fingerprint(llm.model)
    assert texts == {"model": model.name, "model_fingerprint": fingerprint, "scorer": "laprox", "source": "curves.npy", "laprox": __version__}


def test_converted_curves_are_of_their_model_and_scorer(toy, model, curves, tmp_path):
    output = tmp_path / "curve.gguf"
    command.profile(model, convert=curves(), output=output, scorer="snapkv")
    load(model, replace(CONFIG, policy="snapkv:profile", profile=output))
    with pytest.raises(ValueError, match="made for scorer snapkv"):
        load(model, replace(CONFIG, policy="lukv", profile=output))
    with pytest.raises(ValueError, match="this model is another one"):
        load(toy(**SHAPE, seed=5), replace(CONFIG, policy="snapkv:profile", profile=output))


@pytest.mark.parametrize(
    "table, message",
    [
        (np.full((98, 3, 2), 0.5), r"expected a profile of shape \(99, layers, KV heads\)"),
        (np.full((99, 6), 0.5), r"expected a profile of shape \(99, layers, KV heads\)"),
        (np.full((99, 2, 2), 0.5), "the table is of 2 layers with 2 KV heads; accepted: 3 layers with 2 KV heads"),
        (np.full((99, 3, 1), 0.5), "the table is of 3 layers with 1 KV heads; accepted: 3 layers with 2 KV heads"),
        (np.full((99, 3, 2), 1.5), "evicts the share 1.5.*; accepted: 0 to 1"),
        (np.full((99, 3, 2), np.nan), "evicts the share .*nan"),
        (np.zeros((99, 3, 2), np.int64), "elements of type int64; accepted: float64"),
        (np.zeros((99, 3, 2), object), "allow_pickle"),
    ],
)
def test_curves_that_do_not_fit(model, curves, tmp_path, table, message):
    with pytest.raises(ValueError, match=f"curves.npy: .*{message}"):
        command.profile(model, convert=curves(table), output=tmp_path / "curve.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.npy"]


def test_what_is_no_curve(model, curves, tmp_path):
    path, output = curves(), tmp_path / "curve.gguf"
    whole = path.read_bytes()
    for n in (0, 5, 60, len(whole) - 1):
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError, match="curves.npy: "):
            command.profile(model, convert=path, output=output)
    with pytest.raises(FileNotFoundError, match="absent.npy"):
        command.profile(model, convert=tmp_path / "absent.npy", output=output)
    with pytest.raises(ValueError, match="curve.npy: the table is a .gguf file"):
        command.profile(model, convert=path, output=tmp_path / "curve.npy")
    with pytest.raises(ValueError, match="--scorer is 'x'; accepted: .*laprox"):
        command.profile(model, convert=path, output=output, scorer="x")
    for more in ({}, {"data": [path], "convert": path}, {"types": True, "convert": path}):
        with pytest.raises(command.typer.BadParameter, match="--data, .* --convert: one of both"):
            command.profile(model, output=output, **more)
    assert not output.exists()


def test_converted_from_the_shell(model, curves, tmp_path):
    args = ["-m", "laprox", "profile", model, "--convert", curves(), "-o", tmp_path / "c.gguf"]
    done = subprocess.run([sys.executable, *map(str, args)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "3 layers of 2 KV heads, for the scorer laprox" in done.stderr.replace("\n", " ")
    done = subprocess.run([sys.executable, *map(str, args[:4]), "-o", "c.gguf"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "--data" in done.stderr


# --- data ------------------------------------------------------------------------------------------------------------


def test_documents_are_read_in_pieces(model, words, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(words(300))
    vocabulary = load_vocabulary(model)
    count = lambda text: len(vocabulary.tokenize(text.encode(), add_bos=False, special=False))  # noqa: E731
    contexts = read_contexts([path], count, 0, 300)
    assert len(contexts) >= count(path.read_text()) / 300
    assert contexts[0].source.endswith(f"a.txt part 1 of {len(contexts)}")
    assert " ".join(c.text for c in contexts) == path.read_text()
    assert all(count(c.text) <= 300 and c.questions == QUESTIONS for c in contexts)
    (whole,) = read_contexts([path], count, 0, 5000)
    assert whole.source == str(path)


def test_questions_are_taken_evenly():
    samples = [Sample("a", [1], [[1], [2], [3]]), Sample("b", [2], [[4]]), Sample("c", [3], [[5], [6]])]
    taken = lambda n: [(s.name, len(s.questions)) for s in choose(samples, n)]  # noqa: E731
    assert taken(2) == [("a", 1), ("b", 1)]
    assert taken(5) == [("a", 2), ("b", 1), ("c", 2)]
    assert taken(200) == [("a", 3), ("b", 1), ("c", 2)]
