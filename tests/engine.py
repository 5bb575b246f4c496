"""llama.cpp with laprox.h through ctypes, one thin class per handle; capi.py, whose names are here, too, has laprox.h's own.

The tests talk to the C API so that they see what llama-server sees: explicit batches, several sequences, states as
bytes. A refusal raises Refused with the reason that laprox_last_error() gives.
"""

from __future__ import annotations

import ctypes as c
import os
import re
from dataclasses import dataclass
from pathlib import Path

import devices
import llama_cpp.llama_cpp as L
import numpy as np
import pytest
from capi import (  # noqa: F401
    LaproxLook,
    LaproxStats,
    Params,
    Refused,
    ScorerCallback,
    _granted,
    allocators,
    float_p,
    int32_p,
    laprox,
    last_error,
    meanings,
    options,
    params,
    policies,
    scorers,
)

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "bf16": 30}

_log: list[str] = []
_scoring: list[int] = []


@L.llama_log_callback
def _keep_log(level, text, _user):
    if level in (3, 4, 5):  # warnings, errors, and what continues a line
        _log.append(text.decode(errors="replace"))
        del _log[:-20]
    elif said := re.match(rb"score_entries: .*: (\d+) graphs, (\d+) bytes of inputs, (\d+) of results", text):
        _scoring[:] = map(int, said.groups())


def keep_log() -> None:
    """From now on, recent_log() has it. (The command line takes it for itself.)"""
    L.llama_log_set(_keep_log, c.c_void_p(0))


keep_log()
L.llama_backend_init()
devices.prepare()


def recent_log() -> str:
    """What llama.cpp said last: the place to look when it answers with a null pointer."""
    return "".join(_log)


def scoring() -> dict[str, int]:
    """What the last scoring asked of the device: graphs, and bytes that crossed to it and back."""
    return dict(zip(("graphs", "bytes_in", "bytes_out"), _scoring))


class Full:
    """with Full(after=n) as device: the device has room for n more buffers, then for none; device.asked says how many were wanted.

    largest: In bytes; no buffer that is larger has room.
    """

    _allocate = c.CFUNCTYPE(c.c_void_p, c.c_void_p, c.c_size_t)

    def __init__(self, after: int = 1 << 30, largest: int = 1 << 62):
        self.after, self.largest, self.asked = after, largest, 0
        device = L._lib.ggml_backend_cpu_buffer_type
        device.restype = c.c_void_p
        # ggml's table of what a kind of memory can do: its name, then how to allocate
        self._place = c.c_void_p.from_address(device() + c.sizeof(c.c_void_p))

    def __enter__(self):
        if devices.BACKEND != "cpu":
            pytest.skip("only the CPU's memory can be made to look full")
        self._was = self._place.value
        allocate = self._allocate(self._was)

        def limited(kind, size):
            self.asked += 1
            return allocate(kind, size) if self.asked <= self.after and size <= self.largest else None

        self._limited = self._allocate(limited)
        self._place.value = c.cast(self._limited, c.c_void_p).value
        return self

    def __exit__(self, *_):
        self._place.value = self._was


class Model:
    def __init__(self, path: str | Path, kv: Params | None = None, n_gpu_layers: int = devices.GPU_LAYERS):
        p = L.llama_model_default_params()
        p.n_gpu_layers = n_gpu_layers
        self.handle = L.llama_model_load_from_file(str(path).encode(), p)
        if not self.handle:
            raise Refused(recent_log())
        vocab = L.llama_model_get_vocab(self.handle)
        self.n_vocab = L.llama_vocab_n_tokens(vocab)
        self.n_layer = L.llama_model_n_layer(self.handle)
        self.n_head = L.llama_model_n_head(self.handle)
        width = L.llama_model_n_embd(self.handle) // self.n_head
        self.head_dim = int(self.meta(self.meta("general.architecture") + ".attention.key_length", str(width)))
        self.set_params(kv)

    def set_params(self, kv: Params | None) -> None:
        if hasattr(L._lib, "laprox_api_version"):
            _granted(laprox("model_set_params", self.handle, kv.handle if kv else None))

    def meta(self, key: str, default: str | None = None) -> str:
        buf = c.create_string_buffer(256)
        found = L.llama_model_meta_val_str(self.handle, key.encode(), buf, len(buf)) >= 0
        assert found or default is not None, key
        return buf.value.decode() if found else default

    def fingerprint(self) -> str:
        text = c.create_string_buffer(17)
        _granted(laprox("model_fingerprint", self.handle, text))
        return text.value.decode()

    def check(self) -> None:
        _granted(laprox("model_check", self.handle))

    def close(self) -> None:
        if self.handle:
            L.llama_model_free(self.handle)
            self.handle = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


class Document:
    """A file of what a sequence holds, freed with the object."""

    def __init__(self, path: str | Path):
        self.handle = laprox("document_open", os.fsencode(path))
        _granted(self.handle)

    def __del__(self):
        laprox("document_free", self.handle)

    def get(self, key: str) -> str | None:
        text = laprox("document_get", self.handle, key.encode())
        return None if text is None else text.decode()

    def tokens(self) -> list[int]:
        n = laprox("document_tokens", self.handle, None, 0)
        out = (c.c_int32 * n)()
        assert laprox("document_tokens", self.handle, out, n) == n
        return list(out)


@dataclass
class Entries:
    """What one KV head holds, in ascending positions."""

    pos: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Context:
    def __init__(
        self,
        model: Model,
        n_ctx: int = 512,
        n_batch: int = 512,
        n_ubatch: int | None = None,
        n_seq_max: int = 1,
        type_k: str = "f32",
        type_v: str | None = None,
        flash_attn: bool | None = True,  # None: llama.cpp decides
        kv_unified: bool = False,
        swa_full: bool = False,
        n_threads: int = 1,
        embeddings: bool = False,
        other: Context | None = None,  # the target's, of a draft that reads its cache
    ):
        p = L.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n_ctx, n_batch, n_ubatch or n_batch, n_seq_max
        p.type_k, p.type_v = TYPES[type_k], TYPES[type_v or type_k]
        p.flash_attn_type = -1 if flash_attn is None else int(flash_attn)
        p.kv_unified, p.swa_full, p.embeddings = kv_unified, swa_full, embeddings
        p.n_threads = p.n_threads_batch = n_threads
        p.ctx_other = other.handle if other else None
        self.model, self.n_batch = model, n_batch
        del _log[:]
        self.handle = L.llama_init_from_model(model.handle, p)
        if not self.handle:
            raise Refused(recent_log())
        self.mem = L.llama_get_memory(self.handle)
        self._batch = L.llama_batch_init(n_batch, 0, n_seq_max)
        self._layers: list[tuple[int, int]] | None = None
        self._scorer = None
        self._again: dict[int, int] = {}  # by sequence: what prompt_done() said last

    def close(self) -> None:
        if self.handle:
            L.llama_batch_free(self._batch)
            L.llama_free(self.handle)
            self.handle = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    # --- decoding ---

    def submit(self, tokens: list[tuple[int, int, tuple[int, ...]]], outputs: list[int] | None = None) -> np.ndarray:
        """One llama_decode over (token, position, sequences); logits of the tokens at `outputs` (default: the last)."""
        b, n = self._batch, len(tokens)
        wanted = {range(n)[i] for i in (outputs if outputs is not None else [-1])}
        for i, (token, pos, seqs) in enumerate(tokens):
            b.token[i], b.pos[i], b.n_seq_id[i], b.logits[i] = token, pos, len(seqs), i in wanted
            for s, seq in enumerate(seqs):
                b.seq_id[i][s] = seq
        b.n_tokens = n
        rc = L.llama_decode(self.handle, b)
        if rc != 0:
            raise Refused(f"llama_decode returned {rc}: {recent_log()}")
        rows = [np.ctypeslib.as_array(L.llama_get_logits_ith(self.handle, i), (self.model.n_vocab,)) for i in sorted(wanted)]
        return np.array(rows)

    def decode(self, tokens, seq: int = 0, pos: int | None = None, all_logits: bool = False) -> np.ndarray:
        """Append tokens to a sequence, a batch at a time. Logits of the last token, or of each."""
        if pos is None:
            pos = self.pos_max(seq) + 1
        rows = []
        for start in range(0, len(tokens), self.n_batch):
            part = [(int(t), pos + start + i, (seq,)) for i, t in enumerate(tokens[start : start + self.n_batch])]
            rows.append(self.submit(part, range(len(part)) if all_logits else None))
        return np.concatenate(rows) if all_logits else rows[-1][-1]

    def reserve_again(self) -> None:
        """What a LoRA, a control vector or another sampler makes llama.cpp do."""
        apply = L._lib.llama_set_adapter_cvec
        apply.restype, apply.argtypes = c.c_int32, [c.c_void_p, c.c_void_p, c.c_size_t, c.c_int32, c.c_int32, c.c_int32]
        assert apply(self.handle, None, 0, 0, 0, 0) == 0

    def train(self) -> None:
        """llama_opt_init with everything a parameter."""

        class Options(c.Structure):
            _fields_ = [("n_ctx_train", c.c_uint32), ("param_filter", c.c_void_p), ("param_filter_ud", c.c_void_p)]
            _fields_ += [("get_opt_pars", c.c_void_p), ("get_opt_pars_ud", c.c_void_p), ("optimizer_type", c.c_int)]

        self._filter = c.CFUNCTYPE(c.c_bool, c.c_void_p, c.c_void_p)(lambda _tensor, _user: True)
        init = L._lib.llama_opt_init
        init.restype, init.argtypes = None, [c.c_void_p, c.c_void_p, Options]
        init(self.handle, self.model.handle, Options(0, c.cast(self._filter, c.c_void_p), None, None, None, 0))

    def abort_after(self, n: int | None) -> None:
        """Let the host program's abort callback allow n more operations on the CPU, then none; None: as many as there are."""
        if devices.BACKEND != "cpu":
            pytest.skip("only the CPU asks the host program whether to go on")
        left = n

        def stop(_user) -> bool:
            nonlocal left
            left -= 1
            return left < 0

        self._abort = L.ggml_abort_callback(stop if n is not None else 0)
        L.llama_set_abort_callback(self.handle, self._abort, None)

    def graphs_reused(self) -> int:
        """How often llama.cpp could run the graph of the batch before."""
        return L.llama_perf_context(self.handle).n_reused

    # --- llama_memory ---

    def seq_rm(self, seq: int, p0: int = -1, p1: int = -1) -> bool:
        return bool(L.llama_memory_seq_rm(self.mem, seq, p0, p1))

    def seq_cp(self, src: int, dst: int, p0: int = -1, p1: int = -1) -> None:
        L.llama_memory_seq_cp(self.mem, src, dst, p0, p1)

    def seq_keep(self, seq: int) -> None:
        L.llama_memory_seq_keep(self.mem, seq)

    def seq_add(self, seq: int, p0: int, p1: int, delta: int) -> None:
        L.llama_memory_seq_add(self.mem, seq, p0, p1, delta)

    def seq_div(self, seq: int, p0: int, p1: int, d: int) -> None:
        L.llama_memory_seq_div(self.mem, seq, p0, p1, d)

    def clear(self) -> None:
        L.llama_memory_clear(self.mem, True)

    def pos_min(self, seq: int = 0) -> int:
        return L.llama_memory_seq_pos_min(self.mem, seq)

    def pos_max(self, seq: int = 0) -> int:
        return L.llama_memory_seq_pos_max(self.mem, seq)

    def can_shift(self) -> bool:
        return bool(L.llama_memory_can_shift(self.mem))

    # --- states ---

    def size(self) -> int:
        return L.llama_state_get_size(self.handle)

    def seq_size(self, seq: int = 0) -> int:
        return L.llama_state_seq_get_size(self.handle, seq)

    def save(self) -> bytes:
        buf = (c.c_uint8 * self.size())()
        return bytes(buf[: L.llama_state_get_data(self.handle, buf, len(buf))])

    def load(self, data: bytes) -> bool:
        buf = (c.c_uint8 * len(data)).from_buffer_copy(data)
        return L.llama_state_set_data(self.handle, buf, len(data)) > 0

    def seq_save(self, seq: int = 0) -> bytes:
        buf = (c.c_uint8 * self.seq_size(seq))()
        return bytes(buf[: L.llama_state_seq_get_data(self.handle, buf, len(buf), seq)])

    def seq_load(self, data: bytes, seq: int = 0) -> bool:
        buf = (c.c_uint8 * len(data)).from_buffer_copy(data)
        return L.llama_state_seq_set_data(self.handle, buf, len(data), seq) > 0

    # --- laprox ---

    def document_save(self, path: str | Path, tokens, texts: dict[str, str] | None = None, seq: int = 0) -> None:
        ids, n = (c.c_int32 * len(tokens))(*map(int, tokens)), len(texts or {})
        keys, values = ((c.c_char_p * n)(*[t.encode() for t in some]) for some in ((texts or {}).keys(), (texts or {}).values()))
        _granted(laprox("document_save", self.handle, seq, os.fsencode(path), ids, len(tokens), keys, values, n))

    def document_load(self, document: Document, seq: int = 0) -> None:
        _granted(laprox("document_load", self.handle, seq, document.handle))

    def set_params(self, kv: Params) -> None:
        _granted(laprox("set_params", self.handle, kv.handle))

    def set_seq_params(self, seq: int, kv: Params | None) -> None:
        _granted(laprox("seq_set_params", self.handle, seq, kv.handle if kv else None))

    def get_params(self) -> Params:
        handle = laprox("get_params", self.handle)
        _granted(handle)
        return Params(handle)

    def compress(self, seq: int = 0) -> None:
        _granted(laprox("compress", self.handle, seq))

    def probe(self, n_text: int, n_prefix: int, first: int, last: int, every: int = 0, stride: int = 0, seq: int = 0) -> None:
        _granted(laprox("probe", self.handle, seq, c.byref(LaproxLook(n_text, n_prefix, first, last, every, stride))))

    def probe_found(self, seq: int = 0) -> int:
        """For found_free(), by laprox()."""
        found = laprox("probe_found", self.handle, seq)
        _granted(found)
        return found

    def probe_again(self, found: int, seq: int = 0) -> None:
        _granted(laprox("probe_again", self.handle, seq, found))

    def bias(self, il: int, head: int, seq: int = 0) -> float:
        return laprox("bias", self.handle, seq, il, head)

    def prompt_done(self, seq: int = 0, most: int = 1 << 20) -> int | None:
        """The first position that is to be evaluated again; None: none."""
        again = c.c_int32(self._again.get(seq, -1))
        _granted(laprox("prompt_done", self.handle, seq, most, c.byref(again)))
        self._again[seq] = again.value
        return None if again.value < 0 else again.value

    def mark(self, seq: int = 0) -> None:
        """What is evaluated from now on can be taken back."""
        _granted(laprox("mark", self.handle, seq))

    def set_archive_in_states(self, on: bool) -> None:
        _granted(laprox("set_archive_in_states", self.handle, on))

    def set_scorer(self, score) -> None:
        """score(seq, layer, head, positions) -> scores, or None to refuse; None takes it away."""

        def call(_ctx, seq, il, head, pos, n, out, _user):
            scores = score(seq, il, head, np.ctypeslib.as_array(pos, (n,)).copy())
            if scores is not None:
                np.ctypeslib.as_array(out, (n,))[:] = scores
            return scores is not None

        callback = score and ScorerCallback(call)
        _granted(laprox("set_scorer", self.handle, c.cast(callback, c.c_void_p) if callback else None, None))
        self._scorer = callback  # not before the engine has let go of the other one

    def tail_begin(self, seq: int = 0) -> int:
        pos = laprox("tail_begin", self.handle, seq)
        _granted(pos >= 0)
        return pos

    def stats(self, seq: int = 0) -> LaproxStats:
        out = LaproxStats()
        _granted(laprox("get_stats", self.handle, seq, c.byref(out)))
        return out

    def layers(self) -> list[tuple[int, int]]:
        """(layer, KV heads) of what is compressed."""
        if self._layers is None:
            n = laprox("layers", self.handle, None, None, 0)
            il, heads = (c.c_int32 * n)(), (c.c_int32 * n)()
            laprox("layers", self.handle, il, heads, n)
            self._layers = list(zip(il, heads))
        return self._layers

    def pairs(self) -> list[tuple[int, int]]:
        """Every compressed (layer, KV head)."""
        return [(il, h) for il, n in self.layers() for h in range(n)]

    def positions(self, il: int, head: int, seq: int = 0) -> np.ndarray:
        n = laprox("positions", self.handle, seq, il, head, None, 0)
        _granted(n >= 0)
        out = np.empty(n, np.int32)
        laprox("positions", self.handle, seq, il, head, out.ctypes.data_as(int32_p), n)
        return out

    def held(self, seq: int = 0) -> dict[tuple[int, int], np.ndarray]:
        return {pair: self.positions(*pair, seq) for pair in self.pairs()}

    def score(self, seq: int = 0) -> dict[tuple[int, int], np.ndarray]:
        _granted(laprox("score", self.handle, seq))
        return {pair: self.scores(*pair, seq) for pair in self.pairs()}

    def scores(self, il: int, head: int, seq: int = 0, what: str = "scores") -> np.ndarray:
        n = laprox(what, self.handle, seq, il, head, None, 0)
        _granted(n >= 0)
        out = np.empty(n, np.float32)
        laprox(what, self.handle, seq, il, head, out.ctypes.data_as(float_p), n)
        return out

    def finished_scores(self, il: int, head: int, seq: int = 0) -> np.ndarray:
        return self.scores(il, head, seq, "finished_scores")

    def entries(self, il: int, head: int, seq: int = 0) -> Entries:
        d = self.model.head_dim
        pos = self.positions(il, head, seq)
        k, v = np.empty((len(pos), d), np.float32), np.empty((len(pos), d), np.float32)
        n = laprox("entries", self.handle, seq, il, head, k.ctypes.data_as(float_p), v.ctypes.data_as(float_p), len(pos))
        _granted(n == len(pos))
        return Entries(pos, k, v)

    def queries(self, il: int, seq: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """The observed queries [n, n_head, head_dim] and their positions, oldest first."""
        n = laprox("queries", self.handle, seq, il, None, None, 0)
        _granted(n >= 0)
        q, pos = np.empty((n, self.model.n_head, self.model.head_dim), np.float32), np.empty(n, np.int32)
        laprox("queries", self.handle, seq, il, q.ctypes.data_as(float_p), pos.ctypes.data_as(int32_p), n)
        return q, pos
