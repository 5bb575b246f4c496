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
    assert "none.npy" in refused_profile(tmp_path / "none.npy")
    message = refused_profile(None)
    assert "kv-profile.npy" in message and "laprox profile" in message
    assert str(tmp_path) in refused_profile(tmp_path)  # a folder


@pytest.mark.parametrize("shape", [(99, 3, 2), (99, 2, 4), (99, 2, 1), (98, 2, 2), (99, 2), (99, 2, 2, 1), (2, 2, 99), (0,), ()])
def test_profiles_of_the_wrong_shape(refused_profile, tmp_path, shape):
    """Both shapes are named: the model's where the file's is that of some model."""
    path = write_profile(tmp_path / "curve.npy", np.full(shape, 0.5))
    message = refused_profile(path)
    assert str(path) in message and (str(shape) in message or str(list(shape)) in message), message
    assert ("[99, 2, 2]" if len(shape) == 3 and shape[0] == 99 else "(99, layers, KV heads)") in message, message


@pytest.mark.parametrize("dtype", ["<f8", "<f4", ">f8", "<f2", "<i4", "?", "<c16", "<U3"])
def test_types_of_profiles(toy, refused_profile, tmp_path, dtype):
    """Whatever is not understood is refused, not misread."""
    table = np.full((99, 2, 2), 0.5)
    path = write_profile(tmp_path / "curve.npy", table.astype(dtype))
    if dtype in ("<f8", "<f4"):
        with engine.Model(toy(n_layer=2)) as model:
            model.set_params(engine.params("lukv", profile=path))
    else:
        message = refused_profile(path)
        assert "curve.npy" in message and "float" in message, message


@pytest.mark.parametrize("value", [-0.01, 1.01, np.nan, np.inf])
def test_shares_out_of_range(refused_profile, tmp_path, value):
    table = np.full((99, 2, 2), 0.5)
    table[50, 1, 0] = value
    assert "curve.npy" in refused_profile(write_profile(tmp_path / "curve.npy", table))


def test_damaged_profiles(refused_profile, toy, tmp_path):
    """Cut anywhere in what is needed; another kind of file; the wrong order."""
    path = tmp_path / "curve.npy"
    np.save(path, np.full((99, 2, 2), 0.5))
    data = path.read_bytes()
    for n in (0, 5, 9, 60, 127, 128, 129, len(data) - 1):
        path.write_bytes(data[:n])
        assert "curve.npy" in refused_profile(path)
    for other in (b"\x93NUMPX" + data[6:], b"x" * len(data), toy(n_layer=2).read_bytes()[:5000], data[:6] + b"\x09" + data[7:]):
        path.write_bytes(other)
        assert "curve.npy" in refused_profile(path)
    np.save(path, np.asfortranarray(np.random.default_rng(0).random((99, 2, 2))))
    assert "curve.npy" in refused_profile(path)


def test_profiles_of_others(toy, refused_profile, tmp_path):
    """Both models, both scorers are named. Without notes there is nothing to compare."""
    table, path = np.full((99, 2, 2), 0.5), tmp_path / "curve.npy"
    with engine.Model(toy(n_layer=2)) as model, engine.Model(toy(n_layer=2, seed=1)) as other:
        mine, theirs = model.fingerprint(), other.fingerprint()
    write_profile(path, table, model="another one", fingerprint=theirs, scorer="laprox")
    message = refused_profile(path)
    assert theirs in message and mine in message and "another one" in message
    write_profile(path, table, model="toy", fingerprint=mine, scorer="keydiff")
    message = refused_profile(path)
    assert "keydiff" in message and "laprox" in message and "keydiff:profile" in message
    assert "keydiff" in refused_profile(path, "snapkv:profile")

    with engine.Model(toy(n_layer=2)) as model:
        model.set_params(engine.params("keydiff:profile", profile=path))
        write_profile(path, table, model="toy", fingerprint=mine, scorer="laprox")
        model.set_params(engine.params("lukv", profile=path))
        write_profile(path, table)
        for policy in ("lukv", "snapkv:profile", "keydiff:profile"):
            model.set_params(engine.params(policy, profile=path))


def test_a_profile_is_read_once(toy, rng, tmp_path):
    """Settings come with each request; the file is read again where it was replaced."""
    tables = [random_table(rng, 2, 2) for _ in range(3)]
    path = write_profile(tmp_path / "curve.npy", tables[0])
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
        with pytest.raises(engine.Refused, match="curve.npy"):
            shares("50%")
        write_profile(path, tables[1])
        os.utime(path, ns=(time, time + 2 * 10**9))
        assert shares("40%") == as_in(tables[1], 59)
        write_profile(path, tables[2], scorer="laprox")  # longer by its notes
        os.utime(path, ns=(time, time + 2 * 10**9))
        assert shares("40%") == as_in(tables[2], 59)
        path.unlink()
        with pytest.raises(engine.Refused, match="curve.npy"):
            shares("50%")


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_profile_beside_the_model(toy, rng, tmp_path, version):
    """Found by name, and followed: heads hold what the row of the budget says, less what is protected."""
    path = shutil.copy(toy(n_layer=2), tmp_path / "model.gguf")
    table = random_table(rng, 2, 2)
    with open(tmp_path / "model.kv-profile.npy", "wb") as f:
        np.lib.format.write_array(f, table, version)
    with engine.Model(path, engine.params("lukv", "40%")) as model, engine.Context(model) as ctx:
        ctx.decode(rng.integers(3, 512, 400))
        ctx.compress()
        for (il, h), pos in ctx.held().items():
            assert abs(len(pos) - 400 * (1 - table[59, il, h])) <= 1
