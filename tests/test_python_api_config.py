"""KVConfig, and how laprox.Llama takes it."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from laprox import KVConfig, Llama, _core
from laprox.config import described


def test_fields_are_the_engines_rows():
    rows = _core.options()
    assert [field.name for field in dataclasses.fields(KVConfig)] == [row.name for row in rows]
    params = KVConfig().params()
    for row in rows:
        assert params.get(row.name) == row.initial
        assert " ".join(f"{row.name}: {described(row.name)}".split()) in " ".join(KVConfig.__doc__.split())


def test_the_tables_in_docs_are_current():
    script = Path(__file__).parent.parent / "scripts" / "docs_options"
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "field, value, text",
    [("window", 16, "16"), ("floor", 0.25, "0.25"), ("floor", 1, "1"), ("prefill", "chunked", "chunked"), ("policy", "snapkv:ada", "snapkv:ada"),
     ("policy", None, "off"), ("gates", Path("a") / "b.gguf", str(Path("a") / "b.gguf")), ("gates", None, ""), ("min_tokens", np.int64(7), "7")],
)  # fmt: skip
def test_values_as_the_engine_reads_them(field, value, text):
    assert KVConfig(**{field: value}).params().get(field) == text


@pytest.mark.parametrize(
    "budget, parsed",
    [
        ("5%", ("fraction", 0.05)),
        (0.05, ("fraction", 0.05)),
        ("0.05", ("fraction", 0.05)),
        (1.0, ("fraction", 1.0)),
        ("100%", ("fraction", 1.0)),
        (2048, ("tokens", 2048)),
        ("2048", ("tokens", 2048)),
        (1, ("tokens", 1)),
        ("512MiB", ("bytes", 512 << 20)),
        ("1GB", ("bytes", 1e9)),
    ],
)
def test_budgets(budget, parsed):
    assert _core.parse_budget(KVConfig(budget=budget, sink=0, recent=1).params().get("budget")) == pytest.approx(parsed)


@pytest.mark.parametrize("budget", ["0", 0, 0.0, "-3%", -3, -0.5, "abc", "", "%", "5 %%", "nan", "inf", float("nan"), 1.5, "101%",
                                    None, True, b"5%", [5], "5%\0", "1e400", "MiB", "5％"])
def test_no_budgets(budget):
    with pytest.raises(ValueError, match="^kv budget"):
        KVConfig(budget=budget)


@pytest.mark.parametrize("name, least, most", [("window", 1, 1024), ("sink", 0, 2**20), ("recent", 1, 2**20), ("min_tokens", 0, 2**30)])
def test_numbers_out_of_range(name, least, most):
    for value in (least, most):
        assert getattr(KVConfig(**{name: value}, policy="full"), name) == value
    for value in (least - 1, most + 1, 2**31, 10**30, 1.0, "32", None, True):
        with pytest.raises(ValueError, match=rf"^kv {name} is .*; accepted: an integer from {least} to {most}$"):
            KVConfig(**{name: value})


@pytest.mark.parametrize("value", [-0.1, 1.01, float("nan"), "0.5", None, True])
def test_shares_out_of_range(value):
    with pytest.raises(ValueError, match="^kv floor is .*; accepted: a number from 0 to 1$"):
        KVConfig(floor=value)


def test_settings_that_do_not_go_together():
    """Before a model is loaded."""
    with pytest.raises(ValueError, match='^kv budget is "20" .less than the 36 tokens .*kv sink 4 and kv recent 32.; accepted: at least 36'):
        KVConfig(budget=20)
    assert KVConfig(budget=20, recent=8).on and not KVConfig(budget=20, policy=None).on


def test_unknown_policy_names_the_known():
    with pytest.raises(ValueError, match='^kv policy is "snap"; accepted: off, laprox.*; <scorer> or <scorer>:<allocator>'):
        KVConfig(policy="snap")


def test_unknown_prefill_names_the_known():
    with pytest.raises(ValueError, match='^kv prefill is "lazy"; accepted: dense, chunked$'):
        KVConfig(prefill="lazy")


@pytest.mark.parametrize("policy", ["laprox\0", "", 7, [], "LAPROX"])
def test_hostile_policies(policy):
    with pytest.raises(ValueError, match="^kv policy"):
        KVConfig(policy=policy)


def test_off_has_one_name():
    assert KVConfig(policy="off") == KVConfig(policy=None)
    assert not KVConfig(policy="off").on


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        KVConfig().budget = "10%"


# --- as keywords of Llama --------------------------------------------------------------------------------------------


def load(path, **kwargs):
    return Llama(str(path), n_ctx=512, verbose=False, **kwargs)


def test_keywords_change_single_settings(toy):
    llm = load(toy(), kv=KVConfig(sink=2), kv_budget="10%", kv_window=16)
    assert llm.kv.config == KVConfig(sink=2, budget="10%", window=16)


@pytest.mark.parametrize("off", [{"kv": None}, {"kv_policy": None}, {"kv_policy": "off"}, {"kv": KVConfig(policy="off")}])
def test_off(toy, off):
    llm = load(toy(), **off)
    assert llm.kv_config is None
    with pytest.raises(RuntimeError, match="not compressed"):
        llm.kv


def test_typos_are_noticed(toy):
    with pytest.raises(TypeError, match="unknown keyword kv_buget; accepted: kv_budget, kv_policy"):
        load(toy(), kv_buget="10%")


def test_kv_overrides_is_llama_cpps(toy):
    assert load(toy(), kv_overrides={"general.name": "other"}).metadata["general.name"] == "toy"


def test_contradictions(toy):
    with pytest.raises(ValueError, match="kv=None .* kv_budget"):
        load(toy(), kv=None, kv_budget="10%")
    with pytest.raises(ValueError, match="flash_attn=False: the compressing cache needs flash attention; kv=None"):
        load(toy(), flash_attn=False)
    with pytest.raises(ValueError, match="embedding=True .* kv=None"):
        load(toy(), embedding=True)
    with pytest.raises(ValueError, match="vocab_only=True .* kv=None"):
        load(toy(), vocab_only=True)


@pytest.mark.parametrize("kv", [{"budget": "10%"}, "10%", 0.1, False, KVConfig])
def test_settings_of_another_type(toy, kv):
    with pytest.raises(ValueError) as refused:
        load(toy(), kv=kv)
    assert str(refused.value) == f"kv is {kv!r}; accepted: a laprox.KVConfig, or None for stock llama.cpp"


def test_what_is_refused_works_without_compression(toy):
    assert load(toy(), kv=None, flash_attn=False).context_params.flash_attn_type == 0
    assert load(toy(), kv=None, vocab_only=True).tokenize(b"a")
    assert len(load(toy("embedder"), kv=None, embedding=True).embed("abc")) > 0


@pytest.mark.parametrize("arch, reason", [("alibi", "ALiBi"), ("embedder", "causally"), ("mamba", "full attention cache")])
def test_models_that_cannot_be_compressed(toy, arch, reason):
    with pytest.raises(ValueError, match=f"{reason}.*kv=None loads it uncompressed"):
        load(toy(arch))


def test_a_budget_larger_than_the_context(toy):
    with pytest.raises(ValueError, match="larger than the context"):
        load(toy(), kv_budget=4096)


def test_a_budget_smaller_than_what_is_protected(toy):
    with pytest.raises(ValueError, match="never evicted"):
        load(toy(), kv_budget=8)


def test_a_missing_file_keeps_its_own_reason(toy, tmp_path):
    with pytest.raises(ValueError):
        load(toy(), kv_budget=4096)  # leaves a reason behind
    with pytest.raises(ValueError, match="^Model path does not exist"):
        load(tmp_path / "no.gguf")


@pytest.mark.filterwarnings("error")
def test_a_refused_instance_closes_quietly(toy):
    with pytest.raises(ValueError):
        load(toy(), kv_budget="abc")
    with pytest.raises(ValueError):
        load(toy(), kv_budget=4096)
