"""LU-KV's tables: found, read once, followed, and refused."""

import os
import shutil

import engine
import numpy as np
import pytest
from policy_run import random_table, write_profile


@pytest.fixture
def refused_profile(toy, rng):
    """refused_profile(path, policy): what is said about a profile, for a model and for a live context."""

    def ask(path, policy="lukv", model_path=None):
        said = []
        with engine.Model(model_path or toy(n_layer=2)) as model:
            with pytest.raises(engine.Refused) as refused:
                model.set_params(engine.params(policy, profile=path))
            said.append(str(refused.value))
            model.set_params(engine.params())
            with engine.Context(model) as ctx:
                with pytest.raises(engine.Refused) as refused:
                    ctx.set_params(engine.params(policy, profile=path))
                said.append(str(refused.value))
                ctx.decode(rng.integers(3, 512, 100))
                ctx.compress()
                assert ctx.stats().entries_held == 36 * 4 and ctx.get_params().get("policy") == "laprox"
        assert said[0] == said[1]
        return said[0]

    return ask


def test_absent_profiles(refused_profile, tmp_path):
    assert "none.gguf" in refused_profile(tmp_path / "none.gguf")
    message = refused_profile(None)
    assert "kv-profile.gguf" in message and "laprox profile" in message
    assert str(tmp_path) in refused_profile(tmp_path)  # a folder


@pytest.mark.parametrize("shape", [(99, 3, 2), (99, 2, 4), (99, 2, 1), (98, 2, 2), (99, 2), (99, 2, 2, 2), (2, 2, 99), (1,)])
def test_profiles_of_the_wrong_shape(refused_profile, tmp_path, shape):
    """Both shapes are named, in GGUF's order."""
    path = write_profile(tmp_path / "curve.gguf", np.full(shape, 0.5))
    message = refused_profile(path)
    has = str(list(shape[::-1]) + [1] * (3 - len(shape)))
    assert f"{path} has evicted of {has}; accepted: [2, 2, 99]" in message, message


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, np.int32, np.int8])
def test_types_of_profiles(toy, refused_profile, tmp_path, dtype):
    """Whatever is not understood is refused, not misread."""
    path = write_profile(tmp_path / "curve.gguf", np.full((99, 2, 2), 0.5), dtype)
    if dtype in (np.float64, np.float32):
        with engine.Model(toy(n_layer=2)) as model:
            model.set_params(engine.params("lukv", profile=path))
    else:
        message = refused_profile(path)
        assert "curve.gguf" in message and "accepted: f64, f32" in message, message


@pytest.mark.parametrize("value, reason", [(-0.01, "-0.01"), (1.01, "1.01"), (np.nan, "isn't a number"), (np.inf, "isn't a number")])
def test_shares_out_of_range(refused_profile, tmp_path, value, reason):
    table = np.full((99, 2, 2), 0.5)
    table[50, 1, 0] = value
    message = refused_profile(write_profile(tmp_path / "curve.gguf", table))
    assert "curve.gguf" in message and reason in message


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"architecture": "laprox-gates"}, 'has architecture "laprox-gates"; accepted: "laprox-profile"'),
        ({"version": 2}, "has format version 2; accepted: 1"),
        ({"crc32": 7}, "is damaged"),
        ({"name": "kept"}, "has no evicted"),
    ],
)
def test_files_that_are_no_profile(refused_profile, tmp_path, change, reason):
    path = write_profile(tmp_path / "curve.gguf", np.full((99, 2, 2), 0.5), **change)
    assert f"profile {path} {reason}" in refused_profile(path)


def test_damaged_profiles(refused_profile, toy, tmp_path):
    """Cut anywhere; another kind of file; a model."""
    path = write_profile(tmp_path / "curve.gguf", np.full((99, 2, 2), 0.5), scorer="laprox")
    data = path.read_bytes()
    for n in (0, 3, 5, 9, 60, 127, 128, 129, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:n])
        message = refused_profile(path)
        assert f"{path} is absent, truncated or not a GGUF" in message or f"{path} is truncated" in message and n > 129
    for other in (b"GGUX" + data[4:], b"x" * len(data), data[:4] + b"\x09" + data[5:]):
        path.write_bytes(other)
        assert f"{path} is absent, truncated or not a GGUF" in refused_profile(path)
    assert 'has architecture "llama"; accepted: "laprox-profile"' in refused_profile(toy(n_layer=2))


def test_flipped_bits_of_profiles(toy, tmp_path, rng):
    """Wherever one is, in sizes, too, which ggml would take memory for: refused, or what it changed isn't read."""
    path = write_profile(tmp_path / "curve.gguf", random_table(rng, 2, 2), scorer="laprox")
    data = path.read_bytes()
    n_head = len(data) - 99 * 2 * 2 * 8
    flips = [(at, bit) for at in range(n_head) for bit in range(8)]
    flips += [(int(at), int(rng.integers(8))) for at in rng.integers(n_head, len(data), 50)]
    with engine.Model(toy(n_layer=2)) as model:
        for second, (at, bit) in enumerate(flips):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            path.write_bytes(broken)
            os.utime(path, (second, second))  # another file each time
            try:
                model.set_params(engine.params("lukv", profile=path))
            except engine.Refused as refused:
                assert str(path) in str(refused)
            else:
                assert at < n_head


def test_profiles_of_others(toy, refused_profile, tmp_path):
    """Both models, both scorers are named. Without texts there is nothing to compare."""
    table, path = np.full((99, 2, 2), 0.5), tmp_path / "curve.gguf"
    with engine.Model(toy(n_layer=2)) as model, engine.Model(toy(n_layer=2, seed=1)) as other:
        mine, theirs = model.fingerprint(), other.fingerprint()
    write_profile(path, table, model="another one", model_fingerprint=theirs, scorer="laprox")
    message = refused_profile(path)
    assert theirs in message and mine in message and "another one" in message
    write_profile(path, table, model="toy", model_fingerprint=mine, scorer="keydiff")
    message = refused_profile(path)
    assert "keydiff" in message and "laprox" in message and "keydiff:profile" in message
    assert "keydiff" in refused_profile(path, "snapkv:profile")

    with engine.Model(toy(n_layer=2)) as model:
        model.set_params(engine.params("keydiff:profile", profile=path))
        write_profile(path, table, model="toy", model_fingerprint=mine, scorer="laprox")
        model.set_params(engine.params("lukv", profile=path))
        write_profile(path, table)
        for policy in ("lukv", "snapkv:profile", "keydiff:profile"):
            model.set_params(engine.params(policy, profile=path))


def test_a_profile_is_read_once(toy, rng, tmp_path):
    """Settings come with each request; the file is read again where it was replaced."""
    tables = [random_table(rng, 2, 2) for _ in range(3)]
    path = write_profile(tmp_path / "curve.gguf", tables[0])
    time = path.stat().st_mtime_ns

    def shares(budget):
        ctx.set_params(engine.params("lukv", budget, profile=path))
        ctx.clear()
        ctx.decode(tokens)
        ctx.compress()
        return np.array([len(pos) / 400 for pos in ctx.held().values()])

    def as_in(table, row):
        return pytest.approx(1 - table[row].ravel(), abs=1 / 400)

    tokens = rng.integers(3, 512, 400)
    with engine.Model(toy(n_layer=2), engine.params()) as model, engine.Context(model) as ctx:
        assert shares("40%") == as_in(tables[0], 59)
        path.write_bytes(bytes(path.stat().st_size))  # would be refused
        os.utime(path, ns=(time, time))
        assert shares("50%") == as_in(tables[0], 49)
        os.utime(path, ns=(time, time + 10**9))
        with pytest.raises(engine.Refused, match="curve.gguf"):
            shares("50%")
        write_profile(path, tables[1])
        os.utime(path, ns=(time, time + 2 * 10**9))
        assert shares("40%") == as_in(tables[1], 59)
        write_profile(path, tables[2], scorer="laprox")  # longer by a text
        os.utime(path, ns=(time, time + 2 * 10**9))
        assert shares("40%") == as_in(tables[2], 59)
        path.unlink()
        with pytest.raises(engine.Refused, match="curve.gguf"):
            shares("50%")


def test_profile_beside_the_model(toy, rng, tmp_path):
    """Found by name, and followed: heads hold what the row of the budget says, less what is protected."""
    path = shutil.copy(toy(n_layer=2), tmp_path / "model.gguf")
    table = random_table(rng, 2, 2)
    write_profile(tmp_path / "model.kv-profile.gguf", table)
    with engine.Model(path, engine.params("lukv", "40%")) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        for (il, h), pos in ctx.held().items():
            assert abs(len(pos) - 400 * (1 - table[59, il, h])) <= 1
