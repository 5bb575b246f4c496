"""What a sequence holds, in a file: laprox_document_* as the server calls them."""

import errno
import os
import re
import struct
import subprocess
import sys

import devices
import document_fuzz
import engine
import numpy as np
import pytest
from document_fuzz import END, sealed, split
from gguf import GGUFReader
from state_fuzz import CONTEXT, KINDS, KV

TEXTS = {"title": "A report", "text": "Grüße, 世界 🦊", "settings": "{}", "empty": ""}
CACHES = [("llama", "f16"), ("llama", "q8_0"), ("llama", "q4_0"), ("iswa", "f16"), ("hybrid", "q8_0")]
WIDE = {"n_embd": 128, "head_dim": 64}  # quantised rows of 32 elements aren't whole words
FULL = {"policy": "full"}


def write(toy, tmp_path, rng, kind="llama", kv=KV, archive=False, n=120, **context):
    """The path of a document, and its tokens."""
    arch, shape = KINDS[kind]
    tokens = rng.integers(3, 512, n)
    with engine.Model(toy(arch, **shape), engine.params(**kv)) as model, engine.Context(model, **CONTEXT | context) as ctx:
        ctx.decode(tokens)
        ctx.compress()
        ctx.set_archive_in_states(archive)
        ctx.document_save(tmp_path / "a.kv", tokens, TEXTS)
    return tmp_path / "a.kv", tokens


@pytest.fixture
def document(toy, tmp_path, rng):
    return write(toy, tmp_path, rng)[0]


def refusal(path):
    with pytest.raises(engine.Refused) as refused:
        engine.Document(path)
    return str(refused.value)


# --- there and back --------------------------------------------------------------------------------------------------


def same(logits, others):
    """To the bit; on a device, whose kernels share out a row's entries by where they lie, nearly."""
    return np.array_equal(logits, others) if not devices.ROUNDS else np.abs(logits - others).max() < devices.AGAIN


@pytest.mark.parametrize("kind, cache", CACHES)
def test_a_document_answers_as_the_context_that_read_it(toy, tmp_path, rng, kind, cache):
    """In another process's place: another model object and another context, which evicts nothing."""
    arch, shape = KINDS[kind][0], KINDS[kind][1] | WIDE
    tokens, question = rng.integers(3, 512, 120), rng.integers(3, 512, 9)
    context = CONTEXT | {"type_k": cache}
    with engine.Model(toy(arch, **shape), engine.params(**KV)) as model, engine.Context(model, **context) as ctx:
        ctx.decode(tokens)
        ctx.compress()
        ctx.document_save(tmp_path / "a.kv", tokens, TEXTS)
        held, answer = ctx.held(), ctx.decode(question)
        fingerprint = model.fingerprint()
    document = engine.Document(tmp_path / "a.kv")
    assert document.tokens() == tokens.tolist()
    assert {key: document.get(key) for key in TEXTS} == TEXTS and document.get("fingerprint") == fingerprint
    assert document.get("nothing") is None and re.match(r"\d", document.get("ggml")) and document.get("llama.cpp")
    with engine.Model(toy(arch, **shape), engine.params(**FULL)) as model, engine.Context(model, **context) as ctx:
        ctx.decode([7, 8, 9])  # goes
        ctx.document_load(document)
        assert all(np.array_equal(ctx.held()[pair], held[pair]) for pair in held)
        assert ctx.pos_max() == 119 and engine.laprox("compressed_for", ctx.handle, 0) == 120
        assert same(ctx.decode(question), answer)
        ctx.document_load(document)  # the first question has left nothing behind
        assert same(ctx.decode(question), answer)
        ctx.document_load(document, seq=1)
        assert same(ctx.decode(question, seq=1), answer)


def test_an_archive_comes_along_where_it_is_asked_for(toy, tmp_path, rng):
    small, _ = write(toy, tmp_path, rng)
    n_small = small.stat().st_size
    path, tokens = write(toy, tmp_path, rng, archive=True)
    assert path.stat().st_size > 2 * n_small
    with engine.Model(toy("llama", **KINDS["llama"][1]), engine.params(**KV)) as model, engine.Context(model, **CONTEXT) as ctx:
        ctx.document_load(engine.Document(path))
        before = ctx.stats()
        assert before.archived_entries > 0
        ctx.decode(rng.integers(3, 512, 12))
        while (again := ctx.prompt_done()) is not None:
            ctx.decode(rng.integers(3, 512, 132 - again), pos=again)
        assert ctx.stats().entries_recalled > 0


def test_other_tools_can_look_into_it(document, rng):
    reader = GGUFReader(document)
    assert reader.get_field("general.architecture").contents() == "laprox-document"
    assert reader.get_field("laprox.document.text").contents() == TEXTS["text"]
    assert len(reader.get_field("laprox.document.tokens").contents()) == 120
    assert [(t.name, t.tensor_type.name) for t in reader.tensors] == [("state", "I8")]
    assert np.array_equal(reader.tensors[0].data.view(np.uint8), np.frombuffer(split(document.read_bytes())[1], np.uint8))


def test_it_takes_little_more_than_what_is_held(toy, tmp_path, rng):
    """120 tokens, of which 24 per head are held. The queries observed last aren't in it; where a policy needs them all, their sums."""
    entry = 2 * 2 * 2 * 32 * 4  # layers, heads, K and V, head size, float32
    for policy in ("laprox", "expected"):
        path, _ = write(toy, tmp_path, rng, kv=KV | {"policy": policy})
        sums = (policy == "expected") * 2 * 2 * 32 * (32 + 2) * 4  # layers, heads, of head size²
        assert 24 * entry < path.stat().st_size - sums < 24 * entry + 5000


def test_a_document_of_expected_attention_can_be_compressed_again(toy, tmp_path, rng):
    """Its policy needs the queries of all tokens, which only whoever read them has."""
    kv = KV | {"policy": "expected"}
    path, tokens = write(toy, tmp_path, rng, kv=kv)
    question, scores = rng.integers(3, 512, 9), []
    with engine.Model(toy("llama", **KINDS["llama"][1]), engine.params(**kv)) as model:
        for read in (True, False):
            with engine.Context(model, **CONTEXT) as ctx:
                if read:
                    ctx.decode(tokens)
                    ctx.compress()
                else:
                    ctx.document_load(engine.Document(path))
                ctx.decode(question)
                scores.append(ctx.score())
                ctx.compress()
    assert all(np.array_equal(scores[0][pair], scores[1][pair]) for pair in scores[0])


# --- what is refused -------------------------------------------------------------------------------------------------


def test_another_model(toy, document):
    with engine.Model(toy("llama", **KINDS["llama"][1] | {"seed": 1}), engine.params(**KV)) as model, engine.Context(model, **CONTEXT) as ctx:
        ctx.decode([1, 2, 3])
        with pytest.raises(engine.Refused, match=rf"made with another model \(fingerprint [0-9a-f]{{16}} there, {model.fingerprint()} here\)"):
            ctx.document_load(engine.Document(document))
        assert ctx.pos_max() == 2  # untouched


def test_a_size_for_which_keys_rotate_otherwise(toy, tmp_path, rng):
    tokens = rng.integers(3, 512, 120)
    with engine.Model(toy(longrope=512), engine.params(**KV)) as model:
        for made, n_ctx, accepted in [(512, 1024, "at most 512"), (1024, 512, "more than 512")]:
            with engine.Context(model, **CONTEXT | {"n_ctx": made, "n_seq_max": 1}) as ctx:
                ctx.decode(tokens)
                ctx.document_save(tmp_path / "a.kv", tokens, TEXTS)
                ctx.document_load(engine.Document(tmp_path / "a.kv"))
            with engine.Context(model, **CONTEXT | {"n_ctx": n_ctx, "n_seq_max": 1}) as ctx, pytest.raises(engine.Refused) as refused:
                ctx.document_load(engine.Document(tmp_path / "a.kv"))
            assert f"n_ctx is {n_ctx} here, for which this model rotates keys otherwise; accepted: {accepted}, as" in str(refused.value)


@pytest.mark.parametrize(
    "context, said",
    [
        ({"type_k": "bf16"}, "the K cache type is"),
        ({"type_k": "f32", "type_v": "f16"}, "the V cache type is"),
    ],
)
def test_another_layout(toy, document, context, said):
    with engine.Model(toy("llama", **KINDS["llama"][1]), engine.params(**KV)) as model, engine.Context(model, **CONTEXT | context) as ctx:
        ctx.decode([1, 2, 3])
        with pytest.raises(engine.Refused, match=said):
            ctx.document_load(engine.Document(document))
        assert ctx.pos_max() == -1


def test_a_context_that_is_too_small(toy, tmp_path, rng):
    path, _ = write(toy, tmp_path, rng, kv=KV | FULL, n=400, n_ctx=1024)
    with engine.Model(toy("llama", **KINDS["llama"][1]), engine.params(**FULL)) as model:
        with engine.Context(model, n_ctx=256, n_batch=64) as ctx, pytest.raises(engine.Refused, match=r"-c, n_ctx\) of at least 512"):
            ctx.document_load(engine.Document(path))


def test_a_context_of_stock_llama_cpp(toy, tmp_path, document):
    with engine.Model(toy("llama", **KINDS["llama"][1])) as model, engine.Context(model, **CONTEXT) as ctx:
        ctx.decode([1, 2, 3])
        with pytest.raises(engine.Refused, match="without the compressing cache"):
            ctx.document_load(engine.Document(document))
        with pytest.raises(engine.Refused, match="without the compressing cache"):
            ctx.document_save(tmp_path / "b.kv", [1, 2, 3])


def test_a_sequence_that_is_not_there(toy, document):
    with engine.Model(toy("llama", **KINDS["llama"][1]), engine.params(**KV)) as model, engine.Context(model, **CONTEXT) as ctx:
        for seq in (-1, 2, 1000):
            with pytest.raises(engine.Refused, match="doesn't exist; accepted: 0 to 1"):
                ctx.document_load(engine.Document(document), seq)
            with pytest.raises(engine.Refused, match="doesn't exist; accepted: 0 to 1"):
                ctx.document_save(document, [1], seq=seq)


def test_another_llama_cpp_or_laprox(document):
    good = document.read_bytes()
    for key, said in (("version", "has version 77; accepted: 1"), ("layout", "another llama.cpp, whose states have version 77")):
        at = good.index(f"laprox.document.{key}".encode()) + len(f"laprox.document.{key}") + 4
        document.write_bytes(sealed(good[:at] + struct.pack("<I", 77) + good[at + 4 : -END]))
        assert said in refusal(document)


def test_other_files(toy, document, tmp_path):
    good = document.read_bytes()
    assert refusal(tmp_path / "no.kv") == os.strerror(errno.ENOENT)
    assert refusal(tmp_path) == refusal("/dev/null") == "it is not a file"
    for data in (b"", b"GGUF", b"text " * 100, good[:30]):
        document.write_bytes(data)
        assert "not a document that laprox wrote" in refusal(document)
    assert re.search(r"a GGUF of version 3 with \d+ tensors and \d+ keys, such as a model", refusal(toy()))
    head, state, padding = split(good)
    document.write_bytes(sealed(head.replace(b"laprox-document", b"laprox-decument") + state + padding))
    assert refusal(document) == "it is not a document that laprox wrote, but another GGUF"


def test_a_bit_anywhere(document, rng):
    """And a byte less, or more."""
    good = document.read_bytes()
    ends = [good[:-1], good[:-8], good[:-END], good[: len(good) // 2], good + b"\0", good + bytes(32), good + good[-END:]]
    for data in ends:
        document.write_bytes(data)
        assert refusal(document) == "the document is damaged: it was cut off or changed, as its checksum shows"
    for at in [*range(24, 200), *rng.integers(24, len(good), 200).tolist(), *range(len(good) - END, len(good))]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        document.write_bytes(bad)
        assert "its checksum shows" in refusal(document), at
    for at in range(24):
        bad = bytearray(good)
        bad[at] ^= 1 << int(rng.integers(8))
        document.write_bytes(bad)
        assert refusal(document)


def test_texts_that_are_none(document):
    """With the checksum made right: what a server would send as JSON is UTF-8, and what is printed drives no terminal."""
    head, state, padding = split(document.read_bytes())
    text = "世界".encode()
    for bad in (b"\xff\xfe\xfd\xfc\xfb\xfa", b"\xed\xa0\x80abc", b"\xc0\x80abcd", b"\xf0\x80\x80\x80ab", b"\xf5\x80\x80\x80ab", b"abcde\xe4"):
        assert len(bad) == len(text)
        document.write_bytes(sealed(head.replace(text, bad) + state + padding))
        assert refusal(document) == "the document is damaged: a text in it is not UTF-8"
    fingerprint = engine_fingerprint(head)
    document.write_bytes(sealed(head.replace(fingerprint, b"\x1b[2J" + fingerprint[4:]) + state + padding))
    assert refusal(document) == "the document is damaged: it has no fingerprint"


def engine_fingerprint(head):
    return re.search(rb"laprox\.document\.fingerprint.{12}([0-9a-f]{16})", head, re.DOTALL)[1]


def test_tokens_of_another_text(toy, document):
    """Forged: one token less than the state has, and one that the vocabulary doesn't have."""
    data = document.read_bytes()
    head, state, padding = split(data)
    at = head.index(b"laprox.document.tokens") + len("laprox.document.tokens") + 4 + 4
    assert struct.unpack_from("<Q", head, at) == (120,)
    fewer = head[:at] + struct.pack("<Q", 112) + head[at + 8 : at + 8 + 4 * 112] + head[at + 8 + 4 * 120 :]
    unknown = head[: at + 8] + struct.pack("<i", 512) + head[at + 12 :]
    negative = head[: at + 8] + struct.pack("<i", -1) + head[at + 12 :]
    with engine.Model(toy("llama", **KINDS["llama"][1]), engine.params(**KV)) as model, engine.Context(model, **CONTEXT) as ctx:
        for forged, said in ((fewer, "its state is not of its tokens"), (unknown, "more tokens in its vocabulary")):
            document.write_bytes(sealed(forged + state + padding))
            with pytest.raises(engine.Refused, match=said):
                ctx.document_load(engine.Document(document))
            assert ctx.pos_max() == -1
    document.write_bytes(sealed(negative + state + padding))
    assert refusal(document) == "the document is damaged: it has no tokens, or one below 0"


@pytest.mark.parametrize("kind", KINDS)
def test_spoilt_documents(toy, tmp_path, kind):
    target = document_fuzz.Target(toy, kind, tmp_path, seed=1)
    target.takes_own()
    seen = {target.step().partition(" at ")[0] for _ in range(300)}
    target.takes_own()
    target.close()
    assert len(seen) == 20  # every way to spoil one, forged and not


# --- writing ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def context(toy):
    with engine.Model(toy("llama", **KINDS["llama"][1]), engine.params(**KV)) as model, engine.Context(model, **CONTEXT) as ctx:
        ctx.decode([4, 5, 6])
        yield ctx


def test_tokens_that_are_not_the_sequences(context, tmp_path):
    for tokens in ([], [4, 5], [4, 5, 6, 7]):
        with pytest.raises(engine.Refused, match=rf"holds 3 positions, and {len(tokens)} tokens are given"):
            context.document_save(tmp_path / "a.kv", tokens)
    with pytest.raises(engine.Refused, match="holds 0 positions"):
        context.document_save(tmp_path / "a.kv", [], seq=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["", "Title", "a b", "ü", "fingerprint", "ggml", "tokens", "version", "layout", "llama.cpp"])
def test_keys(context, tmp_path, key):
    with pytest.raises(engine.Refused, match=f'a text\'s key is "{re.escape(key)}"; accepted: lower-case'):
        context.document_save(tmp_path / "a.kv", [4, 5, 6], {key: "x"})
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(context, tmp_path, monkeypatch):
    (tmp_path / "a.kv").write_text("before")
    (tmp_path / "folder").mkdir()
    with pytest.raises(engine.Refused, match="it can't be written: it is a folder"):
        context.document_save(tmp_path / "folder", [4, 5, 6])
    for path, said in ((tmp_path / "no" / "a.kv", errno.ENOENT), (tmp_path / "a.kv" / "b.kv", errno.ENOTDIR), ("/proc/a.kv", errno.ENOENT)):
        with pytest.raises(engine.Refused, match=f"it can't be written: {os.strerror(said)}"):
            context.document_save(path, [4, 5, 6])
    with pytest.raises(engine.Refused, match=os.strerror(errno.ENAMETOOLONG)):
        context.document_save(tmp_path / ("a" * 300), [4, 5, 6])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.kv", "folder"] and (tmp_path / "a.kv").read_text() == "before"


@pytest.mark.skipif(devices.BACKEND == "vulkan", reason="the driver writes files of its own, and the limit ends it")
def test_a_full_disk(toy, tmp_path):
    """A limit on the size of files stands for one: the system says so in the middle of writing."""
    (tmp_path / "a.kv").write_text("before")
    script = f"""
import resource, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
import engine
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with engine.Model({str(toy())!r}, engine.params()) as model, engine.Context(model) as ctx:
    ctx.decode(range(3, 200))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        ctx.document_save({str(tmp_path / "a.kv")!r}, range(3, 200))
    except engine.Refused as refusal:
        print(refusal)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"it can't be written: {os.strerror(errno.EFBIG)}\n", done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["a.kv"] and (tmp_path / "a.kv").read_text() == "before"
