"""What a budget in bytes is spent on: fewer entries or coarser ones, by a measured table."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_factory import CHATML
from test_cli import fails, run

from laprox import KVConfig, Llama, _core
from laprox.cache_types import CACHE_TYPES, FILE, ROOM, Auto, Table, Types, choose, default_table, loss_at
from laprox.chat.loading import load_weights
from laprox.eval.bench import plan_policies
from laprox.eval.bench import run as run_eval
from laprox.eval.jobs import Job, encode
from laprox.eval.metrics import kl_divergence
from laprox.eval.reader import Reader, Setting, plain, probes, recalls, types_of
from laprox.eval.rows import Rows
from laprox.eval.tasks import Question, Sample
from laprox.eval.trials import Trials
from laprox.profile.types import SHARES, TYPES
from laprox.read.document import Document
from laprox.sizes import shape_of, small_context

TYPED = [Types("f16", "f16"), Types("q8_0", "q8_0"), Types("q8_0", "q4_0"), Types("q4_0", "q4_0")]


# --- the rule --------------------------------------------------------------------------------------------------------


def test_between_two_shares_and_beyond_them(rng):
    shares = np.sort(rng.uniform(0.02, 1, 6))
    losses = np.sort(rng.uniform(0, 2, 6))[::-1]
    measured = dict(zip(shares, losses))
    for share in rng.uniform(shares[0], shares[-1], 50):
        assert np.isclose(loss_at(measured, share), np.interp(np.log(share), np.log(shares), losses))
    slope = (losses[1] - losses[0]) / np.log(shares[1] / shares[0])
    assert np.isclose(loss_at(measured, shares[0] / 3), losses[0] - slope * np.log(3))
    assert loss_at(measured, 1.0) == pytest.approx(losses[-1])


def test_more_entries_never_count_as_worse():
    measured = {0.1: 0.5, 0.2: 0.7, 0.5: 0.3, 1.0: 0.4}  # noise
    along = [loss_at(measured, share) for share in np.linspace(0.05, 1, 200)]
    assert (np.diff(along) <= 1e-12).all() and loss_at(measured, 0.2) == 0.5 and loss_at(measured, 1.0) == 0.3


def test_the_best_of_all_is_chosen(rng):
    """Against every pair that fits, each by itself."""
    winners = set()
    for _ in range(200):
        losses = {types: dict(zip(SHARES + (1.0,), np.sort(rng.uniform(0, 2, 5))[::-1])) for types in TYPED}
        sizes = dict(zip(TYPED, (100.0, 53.1, 40.6, 28.1)))
        n, budget = int(rng.integers(500, 5000)), float(rng.uniform(30_000, 400_000))
        by_hand = {}
        for types, of_token in sizes.items():
            share = min(1.0, (budget - ROOM * of_token) / of_token / n)
            if share > 0:
                by_hand[types] = share, loss_at(losses[types], share)
        choice = choose(losses, budget, n, sizes)
        assert (choice.share, choice.loss) == pytest.approx(by_hand[choice.types])
        assert choice.loss == pytest.approx(min(loss for _, loss in by_hand.values()))
        assert [choice.types, *(other.types for other in choice.others)] == sorted(by_hand, key=lambda types: by_hand[types][1])
        winners.add(choice.types)
    assert winners == set(TYPED)


def test_where_everything_fits_nothing_is_coarser_than_it_has_to_be():
    table = default_table()
    sizes = dict(zip(TYPED, (100.0, 53.1, 40.6, 28.1)))
    for losses in (table.seen, table.unseen):
        choice = choose(losses, 1e9, 1000, sizes)
        assert choice.types == Types("f16", "f16") and choice.share == 1 and choice.loss == 0


def test_what_can_not_be_chosen():
    losses = {Types("q8_0", "q8_0"): {0.5: 1.0, 1.0: 0.1}}
    with pytest.raises(ValueError, match=r"a budget of 100 bytes has no room .* accepted: more than 2,240"):
        choose(losses, 100, 1000, {Types("q8_0", "q8_0"): 10.0})
    with pytest.raises(ValueError, match="nothing was measured of f16; measured: q8_0"):
        choose(losses, 1e9, 1000, {Types(): 10.0})


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_default_table():
    """Of each of its types, everything was measured; and coarser ones cost something."""
    table = default_table()
    for losses in (table.seen, table.unseen):
        assert len(losses) > 1 and set(losses) <= set(TYPES) and all(set(of) == {*SHARES, 1.0} for of in losses.values())
        assert all(of[0.05] > of[0.5] > of[1.0] >= 0 for of in losses.values())
        assert [of[1.0] for of in losses.values()] == sorted({of[1.0] for of in losses.values()}) and losses[Types()][1.0] == 0


def test_a_table_is_what_was_written(tmp_path):
    (tmp_path / "t.json").write_text(default_table().text())
    assert Table.load(tmp_path / "t.json") == default_table()


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"seen": {"q9": {"100%": 1}}}, "'q9' is no type of a cache"),
        ({"seen": {"q8_0": {"0%": 1}}}, "a share is '0%'"),
        ({"seen": {"q8_0": {"0.5": 1}}}, "a share is '0.5'"),
        ({"seen": {"q8_0": {"50%": -1}}}, "a loss is -1"),
        ({"seen": {"q8_0": {"50%": "x"}}}, "a loss is 'x'"),
        ({"seen": {"q8_0": {}}}, "types without a loss"),
        ({"seen": []}, "no table of losses"),
        ({"unseen": None}, "no table of losses"),
        ({"model": ...}, "model"),
    ],
)
def test_tables_that_are_none(tmp_path, change, reason):
    data = json.loads(default_table().text()) | change
    path = tmp_path / "t.json"
    path.write_text(json.dumps({name: value for name, value in data.items() if value is not ...}))
    with pytest.raises(ValueError, match=reason) as refused:
        Table.load(path)
    assert str(path) in str(refused.value)


# --- a Llama ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(toy, tmp_path):
    """One that may have a table beside it."""
    path = tmp_path / "model.gguf"
    path.symlink_to(toy(chat_template=CHATML, n_ctx_train=4096))
    return path


def beside(model, best, fingerprint=None):
    """A table in which some types lose nothing."""
    weights = load_weights(model)
    losses = {types: {0.01: 0.0 if types == best else 1.0, 1.0: 0.0 if types == best else 1.0} for types in TYPED}
    made = Table("m", fingerprint or _core.model_fingerprint(weights.model), losses, losses)
    model.with_suffix(FILE).write_text(made.text())


def load(model, **settings):
    settings = {"kv": KVConfig(budget="600KiB", min_tokens=0), "n_ctx": 1024, "n_threads": 1, "verbose": False} | settings
    return Llama(str(model), **settings)


@pytest.mark.parametrize("best", TYPED, ids=str)
def test_a_cache_has_the_types_that_lose_least(model, best, rng):
    beside(model, best)
    llm = load(model, type_k="auto", type_v="auto")
    assert llm.kv.choice.types == best
    assert (llm.context_params.type_k, llm.context_params.type_v) == (CACHE_TYPES[best.k].ggml, CACHE_TYPES[best.v].ggml)
    llm.eval(rng.integers(262, 512, 1000).tolist())
    llm.kv.compress()
    stats = llm.kv.stats()
    assert stats.kv_bytes <= 600 * 1024 and llm.kv.choice.share == pytest.approx(stats.entries_held / stats.entries_full, rel=0.25)


def test_one_of_both_may_be_given(model):
    beside(model, Types())
    assert load(model, type_k=CACHE_TYPES["q8_0"].ggml, type_v="auto").kv.choice.types.k == "q8_0"
    assert load(model, type_k="auto", type_v=CACHE_TYPES["q8_0"].ggml).kv.choice.types == Types("q8_0", "q8_0")
    assert load(model).kv.choice is None
    with pytest.raises(ValueError, match="type_k='q4_0', type_v='f16': nothing|type_k='q5_0', type_v='auto': nothing was measured of such a pair"):
        load(model, type_k=CACHE_TYPES["q5_0"].ggml, type_v="auto")


def test_the_text_decides_not_the_context(model):
    """A short text fits into a budget as it is, whatever there is room for."""
    assert load(model, type_k=Auto(100), type_v=Auto(100)).kv.choice.types == Types()
    assert load(model, type_k="auto", type_v="auto", n_ctx=4096).kv.choice.types != Types()


def test_before_any_question_another_table_counts(model):
    beside(model, Types("q8_0", "q8_0"))
    path = model.with_suffix(FILE)
    data = json.loads(path.read_text())
    data["unseen"]["q4_0"], data["unseen"]["q8_0"] = data["unseen"]["q8_0"], data["unseen"]["q4_0"]
    path.write_text(json.dumps(data))
    for unseen, best in ((False, "q8_0"), (True, "q4_0")):
        assert str(load(model, type_k=Auto(1000, unseen), type_v=Auto(1000, unseen)).kv.choice.types) == best


def test_it_is_told(model, capfd):
    load(model, type_k="auto", type_v="auto", verbose=True)
    assert "laprox: 600KiB for 1,024 tokens: " in capfd.readouterr().err


@pytest.mark.parametrize(
    "settings, reason",
    [
        ({"kv": KVConfig(budget="20%")}, 'type_k="auto" divides a budget in bytes, and here is kv_budget=\'20%\'; accepted with it: kv_budget="64MiB"'),
        ({"kv": KVConfig(budget=2048)}, "here is kv_budget=2048"),
        ({"kv": None}, "here is kv=None"),
        ({"kv_budget": "1KiB"}, "a budget of 1,024 bytes has no room for entries of any type"),
    ],
)
def test_budgets_that_can_not_be_divided(model, settings, reason):
    with pytest.raises(ValueError, match=reason):
        load(model, type_k="auto", type_v="auto", **settings)


def test_tables_of_other_models(model):
    beside(model, Types(), "0123456789abcdef")
    with pytest.raises(ValueError, match=f"model{FILE} was made for another model, m"):
        load(model, type_k="auto")
    assert load(model).kv.choice is None  # nobody asked


def test_sizes(toy):
    for name in ("llama", "gemma2"):
        weights = load_weights(Path(toy(name)))
        _core.model_set_params(weights.model, KVConfig().params())
        context = small_context(weights)
        shape = shape_of(context.ctx)
        by_hand = [(n, *_core.head_shape(context.ctx, layer)[1:]) for layer, n in _core.layers(context.ctx)]
        assert shape == (len(by_hand), sum(n for n, _, _ in by_hand), sum(n * k for n, k, _ in by_hand), sum(n * v for n, _, v in by_hand))


# --- commands --------------------------------------------------------------------------------------------------------


def test_read_and_chat(model, tmp_path):
    beside(model, Types("q8_0", "q4_0"))
    text, path = tmp_path / "notes.txt", tmp_path / "a.kv"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    auto = ["-ctk", "auto", "-ctv", "auto", "-t", "1", "--kv-budget", "600KiB"]
    done = run("read", model, text, "-o", path, *auto)
    assert done.returncode == 0 and "600KiB: q8_0/q4_0 holds " in done.stderr and "f16 (" in done.stderr, done.stderr
    made = Document(path)
    assert (made.settings["cache_type_k"], made.settings["cache_type_v"]) == ("q8_0", "q4_0")
    asked = run("ask", path, "who?", "-t", "1", "--temp", "0", "-n", "4")
    assert asked.returncode == 0, asked.stderr
    for regime in ("aware", "agnostic"):
        done = run("chat", model, "-d", text, "--ask", "who?", "-n", "4", "--temp", "0", "--regime", regime, *auto)
        assert done.returncode == 0 and "600KiB: q8_0/q4_0 holds " in done.stderr, done.stderr
    assert "cache types that it was made with" in fails("chat", "-d", path, "--ask", "?", "-ctk", "auto", "--kv-budget", "1MiB")


def test_commands_that_have_no_bytes_to_divide(model, tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("x " * 100)
    for command in (["read", model, text, "-o", tmp_path / "a.kv"], ["chat", model, "-d", text, "--ask", "?"]):
        assert "--cache-type-v auto divides a budget in bytes, and here is --kv-budget 20%" in fails(*command, "-ctv", "auto")
        assert "--cache-type-k is 'q9'; accepted: f32, f16, bf16, q8_0, q4_0, auto" in fails(*command, "-ctk", "q9")
    assert "here is --kv-policy off" in fails("chat", model, "-d", text, "--ask", "?", "-ctk", "auto", "--kv-policy", "off")


def test_a_table_of_ones_own(model, tmp_path):
    words = " ".join(f"w{i % 37}" for i in range(150))
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"context": words, "questions": ["w3?", "w5?", "w7?"]}))
    output = model.with_suffix(FILE)
    done = run("profile", model, "--types", "-d", data, "-o", output, "--max-samples", "2", "-t", "1", "--kv-recent", "4")
    assert done.returncode == 0 and "2 questions about 1 contexts" in done.stderr, done.stderr
    table = Table.load(output)
    assert list(table.seen) == list(table.unseen) == TYPED == list(TYPES)
    assert table.seen[Types()][1.0] == 0 < table.seen[Types("q4_0", "q4_0")][1.0] == table.unseen[Types("q4_0", "q4_0")][1.0]
    rows = Rows.load(output.with_suffix(".jsonl"))
    key = ("types", 0, 0)
    of = [rows[(*key, i, "aware", "laprox@q8_0", "20%")]["kl"] for i in range(2)]
    assert table.seen[Types("q8_0", "q8_0")][0.2] == pytest.approx(np.mean(of), abs=1e-4)
    before = output.read_bytes()
    output.unlink()
    again = run("profile", model, "--types", "-d", data, "-o", output, "--max-samples", "2", "-t", "1", "--kv-recent", "4")
    assert again.returncode == 0 and "read after" not in again.stderr and output.read_bytes() == before
    assert load(model, type_k="auto", type_v="auto").kv.choice is not None
    for wrong, said in ((["-o", tmp_path / "x.npy"], f"the table is a {FILE} file"), (["-o", output, "-ctk", "q8_0"], "no -ctk")):
        assert said in fails("profile", model, "--types", "-d", data, *wrong)


# --- policies by types, in `laprox eval` -----------------------------------------------------------------------------


def test_names():
    assert types_of("laprox@q8_0") == Types("q8_0", "q8_0") and types_of("kvzip@refit@q8_0/q4_0") == Types("q8_0", "q4_0")
    assert types_of("kvzip@refit") is types_of("laprox") is types_of(None) is None
    assert plain("kvzip@refit@q8_0") == "kvzip" and probes("kvzip@refit@q4_0") and recalls("laprox@recall@q8_0")
    with pytest.raises(ValueError, match="'q9' is no type of a cache"):
        plain("laprox@q8_0/q9")


def test_coarse_caches_are_compared_with_the_fine_one(model, tmp_path):
    """Rows of policies by types, against contexts driven by hand; also where a run goes on and has to read the fine one again."""
    weights = load_weights(model, vocab_only=True)
    asked = tuple(Question("types", text, (), "any", predict=6) for text in ("w1?", "w2 w3?"))
    job = Job("types", 0, 0, *encode(weights, Sample(" ".join(f"w{i % 31}" for i in range(120)), asked)))

    def open_llm(policy, types):
        ggml = {} if types is None else {"type_k": CACHE_TYPES[types.k].ggml, "type_v": CACHE_TYPES[types.v].ggml}
        return load(model, kv=KVConfig(policy=policy, min_tokens=0, recent=4, archive="off"), n_ctx=1024, **ggml)

    def measured(rows, policies):
        run_eval(plan_policies(rows, [job], policies, ["20%", "100%"], ["aware"], open_llm), rows, weights, lambda label, n: None)
        return rows

    header = {"kind": "eval", "settings": {}}
    rows = measured(Rows(tmp_path / "a.jsonl", header), ["laprox", "laprox@q4_0"])
    later = measured(measured(Rows(tmp_path / "b.jsonl", header), ["laprox"]), ["laprox", "laprox@q4_0"])
    drop = ("score_ms", "rest_ms", "read_ms")
    stripped = [{key: {n: v for n, v in row.items() if n not in drop} for key, row in of} for of in (rows, later)]
    assert stripped[0] == stripped[1]
    fine, coarse = (Reader(open_llm("laprox", types)) for types in (None, Types("q4_0", "q4_0")))
    for reader in (fine, coarse):
        reader.read(job.opening, job.head)
    for i, prompt in enumerate(job.prompts):
        along, answer = fine.answer(fine.start(prompt.tokens), 6)
        for name, setting in (("full@q4_0", Setting(None, "")), ("laprox@q4_0", Setting("laprox", "20%"))):
            now, _ = coarse.compare(coarse.start(prompt.tokens, setting), answer, 6)
            cell = (name, "20%") if setting.policy else (name, "")
            got = rows[("types", 0, 0, i, "aware" if setting.policy else "", *cell)]["kl"]
            assert got == pytest.approx(np.mean([kl_divergence(*pair) for pair in zip(along, now)]), abs=2e-4) and got > 0
        assert rows[("types", 0, 0, i, "aware", "laprox@q4_0", "100%")]["kl"] == pytest.approx(rows[("types", 0, 0, i, "", "full@q4_0", "")]["kl"], abs=1e-4)
    with pytest.raises(ValueError, match="the full cache comes first"):
        Trials(coarse, job.prompts, str).measure(0, replace(Setting("laprox", "20%"), coarse=True))
