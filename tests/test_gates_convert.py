"""`laprox convert-gates`: the authors' files become a sidecar, and nothing in them is executed."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile

import gates_factory as made
import numpy as np
import pytest
from gguf import GGUFReader

from laprox.gates import sidecar
from laprox.gates.convert import read_checkpoint
from laprox.gates.pickles import load_tensors


def convert(*arguments):
    return subprocess.run([sys.executable, "-m", "laprox", "convert-gates", *map(str, arguments)], capture_output=True, text=True)


# --- published files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["model.", "", "model.language_model.", "module.model."])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_every_value_arrives(tmp_path, kind, tied, prefix):
    theirs = made.published(kind=kind, tied=tied, prefix=prefix)
    weights = made.save(tmp_path / "w.pth", theirs)
    gates = read_checkpoint(weights, made.write_config(tmp_path / "c.json", kind=kind))
    assert (gates.kind, gates.training_budget, gates.model, gates.fingerprint) == (kind, 128, "somebody/model", None)
    assert gates.shared("gate_out.weight") == gates.shared("gate_out.bias") == tied
    for i, layer in enumerate(gates.layers):
        p = f"{prefix}layers.{i}.self_attn.retention_gate."
        pairs = [(layer.gate_in, "linear1.weight"), (layer.gate_in_bias, "linear1.bias"), (layer.gate_out_bias, "bias")]
        if kind == "rg10":
            pairs += [(layer.gate_mid, "linear2.weight"), (layer.gate_mid_bias, "linear2.bias"), (layer.gate_out, "linear3.weight")]
        else:
            pairs += [(layer.gate_out, "linear2.weight")]
        for ours, name in pairs:
            np.testing.assert_array_equal(ours, theirs[p + name])


def test_published_sizes(tmp_path):
    """One layer of each size as in Qwen3-4B: 2560 -> 512 (-> 512) -> 8."""
    sizes = dict(layers=2, n_embd=2560, hidden=512, heads=8)
    for kind in ("rg", "rg10"):
        gates = read_checkpoint(made.save(tmp_path / "w.pth", made.published(kind, **sizes)), made.write_config(tmp_path / "c.json", kind=kind, **sizes))
        assert (gates.n_embd, gates.hidden, gates.n_head_kv, len(gates.layers)) == (2560, 512, 8, 2)


@pytest.mark.parametrize("kind", made.STORAGES)
def test_types_of_storage(tmp_path, kind):
    tensors = {"a": made.bfloat16(np.linspace(-3, 3, 24).reshape(2, 3, 4)), "b": np.float32([[2.0]]), "c": np.zeros((0, 4), np.float32)}
    loaded = load_tensors(made.save(tmp_path / "w.pth", tensors, kind))
    for name, x in tensors.items():
        assert loaded[name].dtype == np.float32 and loaded[name].shape == x.shape
        np.testing.assert_allclose(loaded[name], x, rtol=1e-3 if kind == "f16" else 0)


def test_views_into_one_storage(tmp_path):
    """Strides and offsets, as of a transposed slice."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    items = {"t": made.tensor("0", (4, 3), (1, 4), n=12), "row": made.tensor("0", (4,), (1,), offset=4, n=12), "one": made.tensor("0", (), (), offset=7, n=12)}
    loaded = load_tensors(made.archive(tmp_path / "w.pth", made.program(items), {"0": base.tobytes()}))
    np.testing.assert_array_equal(loaded["t"], base.T)
    np.testing.assert_array_equal(loaded["row"], base[1])
    assert loaded["one"] == 7


def test_what_pytorch_itself_writes(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    theirs = {name: torch.from_numpy(x) for name, x in made.published().items()}
    theirs = {name: x.bfloat16() if i % 2 else torch.nn.Parameter(x.half()) for i, (name, x) in enumerate(theirs.items())}
    theirs["model.layers.0.self_attn.retention_gate.linear1.weight"] = torch.randn(64, 32).T  # not contiguous
    torch.save(theirs, tmp_path / "w.pth")
    loaded = load_tensors(tmp_path / "w.pth")
    assert loaded.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(loaded[name], x.detach().float().numpy())


# --- files that must not get further ---------------------------------------------------------------------------------


def call(module, function, *arguments):
    """A pickled call: what __reduce__ gives."""
    return made.name(module, function) + made.group(*arguments) + b"R"


MALICIOUS = {
    "os.system": lambda path: call("os", "system", made.text(f"touch {path}")),
    "posix.system": lambda path: call("posix", "system", made.text(f"touch {path}")),
    "builtins.eval": lambda path: call("builtins", "eval", made.text(f"open({str(path)!r}, 'w')")),
    "builtins.getattr": lambda path: call("builtins", "getattr", made.name("collections", "OrderedDict"), made.text("__init__")),
    "pathlib.Path": lambda path: call("pathlib", "Path", made.text(str(path))),
    "numpy.load": lambda path: call("numpy", "load", made.text(str(path))),
    "torch.storage._load_from_bytes": lambda path: call("torch.storage", "_load_from_bytes", made.text("x")),
    "laprox.gates.pickles._load": lambda path: call("laprox.gates.pickles", "_load", made.text(str(path))),
}


@pytest.mark.parametrize("asked", MALICIOUS)
def test_a_malicious_pickle_is_refused_and_does_nothing(tmp_path, asked):
    touched = tmp_path / "touched"
    good = made.tensor("0", (2,), (1,))
    items = {"model.layers.0.self_attn.retention_gate.bias": good, "x": MALICIOUS[asked](touched)}
    path = made.archive(tmp_path / "w.pth", made.program(items), {"0": made.stored(np.ones(2), "f32")})
    done = convert(path, "--config", made.write_config(tmp_path / "c.json"), "-o", tmp_path / "g.gguf")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == f"laprox: {path}: it asks for {asked}, which is not a tensor: refused, nothing was executed\n"
    assert not touched.exists() and not (tmp_path / "g.gguf").exists()


def test_a_pickle_cannot_change_what_reads_it(tmp_path):
    """BUILD sets attributes of what it is given."""
    for target in (made.name("torch._utils", "_rebuild_tensor_v2"), made.name("collections", "OrderedDict")):
        build = target + b"}" + made.text("__call__") + made.number(1) + b"sb"
        path = made.archive(tmp_path / "w.pth", made.program({"x": build}), {})
        with pytest.raises(ValueError, match="damaged|only tensors"):
            load_tensors(path)
    assert type(load_tensors(made.save(tmp_path / "w.pth", {"a": np.ones((2, 2))}))["a"]) is np.ndarray


REFUSED = {
    "no zip": (lambda p: p.write_bytes(b"\x80\x02}q\x00."), "not a file of torch.save in its zip format"),
    "empty": (lambda p: p.write_bytes(b""), "not a file of torch.save in its zip format"),
    "other zip": (lambda p: zipfile.ZipFile(p, "w").writestr("a/b", "c"), "there is no data.pkl"),
    "compressed": (lambda p: made.archive(p, made.program({}), {}, zipfile.ZIP_DEFLATED), "compressed"),
    "half a pickle": (lambda p: made.archive(p, made.program({"a": made.tensor("0", (2,), (1,))})[:-30], {"0": b"\0" * 8}), "damaged|pickle"),
    "no pickle": (lambda p: made.archive(p, b"\xff\xfe", {}), "pickle|damaged|load key"),
    "a list": (lambda p: made.archive(p, b"\x80\x02].", {}), "holds a list"),
    "a number": (lambda p: made.archive(p, made.program({"a": made.number(1)}), {}), "only tensors with names"),
    "no storage": (lambda p: made.archive(p, made.program({"a": made.tensor("7", (2,), (1,))}), {}), "data/7"),
    "short storage": (lambda p: made.archive(p, made.program({"a": made.tensor("0", (2,), (1,))}), {"0": b"\0" * 4}), "has 1 values, and should have 2"),
    "beyond": (lambda p: made.archive(p, made.program({"a": made.tensor("0", (3,), (1,), n=2)}), {"0": b"\0" * 8}), "reaches beyond"),
    "offset": (lambda p: made.archive(p, made.program({"a": made.tensor("0", (2,), (1,), 1, 2)}), {"0": b"\0" * 8}), "reaches beyond"),
    "negative": (lambda p: made.archive(p, made.program({"a": made.tensor("0", (2,), (-1,), 1, 2)}), {"0": b"\0" * 8}), "not described as"),
    "huge": (lambda p: made.archive(p, made.program({"a": made.tensor("0", (2**30, 2**30), (0, 0), 0, 2)}), {"0": b"\0" * 8}), "reaches beyond"),
    "missing": (lambda p: None, "No such file"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_damaged_and_foreign_files(tmp_path, what):
    write, reason = REFUSED[what]
    write(tmp_path / "w.pth")
    with pytest.raises(ValueError, match=reason) as error:
        load_tensors(tmp_path / "w.pth")
    assert str(error.value).startswith(str(tmp_path / "w.pth"))


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_an_interrupted_download(tmp_path, cut):
    path = made.save(tmp_path / "w.pth", made.published())
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
    with pytest.raises(ValueError, match="w.pth: "):
        load_tensors(path)


def test_flipped_bits_are_noticed_or_harmless(tmp_path, rng):
    """The zip's checksums cover every byte of every member."""
    path = made.save(tmp_path / "w.pth", {"a": np.arange(64, dtype=np.float32)})
    data = bytearray(path.read_bytes())
    for at in rng.integers(0, len(data), 200):
        broken = bytearray(data)
        broken[at] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        try:
            np.testing.assert_array_equal(load_tensors(path)["a"], np.arange(64))
        except ValueError:
            pass


# --- configuration and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"retention_gate": "rg2"}, r"retention_gate is 'rg2'; accepted: rg, rg10"),
        ({"retention_gate": None}, r"retention_gate is None"),
        ({"hidden_act": "relu"}, r"hidden_act is 'relu'"),
        ({"hidden_size": 128}, r"layers.0.*linear1.weight is 32 x 64, and .* says 32 \(retention_gate_intermediate_size\) x 128 \(hidden_size\)"),
        ({"retention_gate_intermediate_size": 16}, r"linear1.weight is 32 x 64, and .* says 16"),
        ({"num_key_value_heads": 4}, r"linear3.weight is 2 x 32, and .* says 4 \(num_key_value_heads\) x 32"),
        ({"num_hidden_layers": 4}, r"layers.3.retention_gate.linear1.weight is missing"),
        ({"num_hidden_layers": 2}, r"has gates of layer 2, and .* says 2 layers"),
        ({"num_hidden_layers": "3"}, r"num_hidden_layers is '3', not a size"),
        ({"retention_gate": "rg"}, r"linear2.weight is 32 x 32, and .* says 2"),
    ],
)
def test_a_configuration_of_another_model(tmp_path, changes, reason):
    weights = made.save(tmp_path / "w.pth", made.published())
    with pytest.raises(ValueError, match=reason):
        read_checkpoint(weights, made.write_config(tmp_path / "c.json", **changes))


def test_text_config_counts(tmp_path):
    """Models that see keep the language model's sizes one level down."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"hidden_size": 7, "text_config": made.config()}))
    assert read_checkpoint(made.save(tmp_path / "w.pth", made.published()), path).n_embd == 64


@pytest.mark.parametrize("text, reason", [("{", "not JSON"), ("[]", "not an object"), (None, "No such file")])
def test_no_configuration(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=f"c.json: .*{reason}"):
        read_checkpoint(made.save(tmp_path / "w.pth", made.published()), tmp_path / "c.json")


def test_names_that_are_not_understood_are_listed(tmp_path):
    tensors = made.published() | {"model.layers.0.self_attn.retention_gate.rope_bias": np.ones(2), "lm_head.weight": np.ones((2, 2))}
    with pytest.raises(ValueError, match="not understood: model.layers.0.self_attn.retention_gate.rope_bias, lm_head.weight"):
        read_checkpoint(made.save(tmp_path / "w.pth", tensors), made.write_config(tmp_path / "c.json"))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    tensors = made.published()
    tensors["model.layers.1.self_attn.retention_gate.linear2.bias"][3] = value
    with pytest.raises(ValueError, match="layers.1.self_attn.retention_gate.linear2.bias has 1 values that are not finite"):
        read_checkpoint(made.save(tmp_path / "w.pth", tensors), made.write_config(tmp_path / "c.json"))


# --- the sidecar -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["all", "weight", "bias", "nothing"])
@pytest.mark.parametrize("kind", ["rg", "rg10"])
def test_what_is_stored(tmp_path, kind, share):
    """What all layers share bit for bit is stored once."""
    tensors = made.published(kind, tied=True)
    last = "linear3.weight" if kind == "rg10" else "linear2.weight"
    for i in range(3):
        p = f"model.layers.{i}.self_attn.retention_gate."
        if share in ("bias", "nothing"):
            tensors[p + last] = made.bfloat16(tensors[p + last] + i)
        if share in ("weight", "nothing"):
            tensors[p + "bias"] = made.bfloat16(tensors[p + "bias"] + i)
    gates = read_checkpoint(made.save(tmp_path / "w.pth", tensors), made.write_config(tmp_path / "c.json", kind=kind))
    sidecar.write(tmp_path / "g.gguf", gates, "f32")
    names = {t.name: list(map(int, t.shape)) for t in GGUFReader(tmp_path / "g.gguf").tensors}
    expected = {}
    for i in range(3):
        expected |= {f"blk.{i}.gate_in.weight": [64, 32], f"blk.{i}.gate_in.bias": [32]}
        if kind == "rg10":
            expected |= {f"blk.{i}.gate_mid.weight": [32, 32], f"blk.{i}.gate_mid.bias": [32]}
        expected |= {} if share in ("all", "weight") else {f"blk.{i}.gate_out.weight": [32, 2]}
        expected |= {} if share in ("all", "bias") else {f"blk.{i}.gate_out.bias": [2]}
    expected |= {"gate_out.weight": [32, 2]} if share in ("all", "weight") else {}
    expected |= {"gate_out.bias": [2]} if share in ("all", "bias") else {}
    assert names == expected


@pytest.mark.parametrize("kind, error", [("f32", 0.0), ("f16", 5e-4), ("q8_0", 5e-3), ("q4_0", 0.09)])
def test_types(tmp_path, kind, error):
    """Relative to the largest weight. Biases stay float32: z is near 18, where a rounded bias would show."""
    gates = made.random_gates(3, 64, 2, seed=1)
    sidecar.write(tmp_path / "g.gguf", gates, kind)
    back = sidecar.read(tmp_path / "g.gguf")
    for a, b in zip(gates.layers, back.layers):
        for name, x in a.tensors().items():
            y = b.tensors()[name]
            assert np.abs(x - y).max() <= (0 if "bias" in name else error) * np.abs(x).max()


def test_rows_that_do_not_fill_blocks(tmp_path):
    gates = made.random_gates(2, 48, 2)
    with pytest.raises(ValueError, match="gate_in.weight has rows of 48, and q8_0 needs a multiple of 32: use f16"):
        sidecar.write(tmp_path / "g.gguf", gates, "q8_0")
    with pytest.raises(ValueError, match="'q5_k'; accepted: f16, q8_0, q4_0, f32"):
        sidecar.write(tmp_path / "g.gguf", gates, "q5_k")


def test_the_command(tmp_path, toy):
    model = toy(n_layer=3, n_embd=256, n_head_kv=2)
    weights, config = tmp_path / "trimkv_weights.pth", tmp_path / "config.json"
    made.save(weights, made.published(n_embd=256))
    made.write_config(config, n_embd=256)
    done = convert(weights, "--model", model, "--type", "q8_0", "-o", tmp_path / "g.gguf")  # config.json lies beside it
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "rg10 gates of 3 layers, 256 -> 32 -> 2 KV heads, last projection shared by all layers; q8_0" in done.stderr
    gates = sidecar.read(tmp_path / "g.gguf")
    assert gates.model == model.name and len(gates.fingerprint) == 16 and gates.training_budget == 128
    assert gates.source == "trimkv_weights.pth (DBTrimKV)"

    done = convert(weights, "--config", config, "-o", tmp_path / "h.gguf")
    assert done.returncode == 0 and "--model MODEL.gguf writes it down" in done.stderr
    assert sidecar.read(tmp_path / "h.gguf").model == "somebody/model"


def test_the_command_with_another_model(tmp_path, toy):
    weights = made.save(tmp_path / "w.pth", made.published())
    config, out = made.write_config(tmp_path / "c.json"), tmp_path / "g.gguf"
    model = toy(n_layer=3, n_embd=256, n_head_kv=2)
    for options, reason in (
        (("--model", model), f"the gates are for a model of embedding length 64, and {model} has 256"),
        (("--model", weights), "w.pth"),
        (("--type", "q2_k"), "--type is 'q2_k'; accepted: f16, q8_0, q4_0, f32"),
        (("-o", tmp_path / "g.bin"), "gates are a .gguf file"),
        (("-o", tmp_path / "no" / "g.gguf"), "can't be written"),
    ):
        done = convert(weights, "--config", config, *(() if "-o" in options else ("-o", out)), *options)
        assert done.returncode == 1 and reason in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert not out.exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "model"])
def test_reading_back_a_damaged_sidecar(tmp_path, toy, damage):
    path = tmp_path / "g.gguf"
    sidecar.write(path, made.random_gates(2, 64, 2), "f16")
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flip":
        data[-100] ^= 4
        path.write_bytes(data)
    else:
        path = toy()
    with pytest.raises(ValueError, match=str(path)):
        sidecar.read(path)
