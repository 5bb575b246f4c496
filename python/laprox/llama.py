"""llama_cpp.Llama with a compressing KV cache."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import llama_cpp
import numpy as np
import numpy.typing as npt

from laprox import _core, functions, hub, templates
from laprox._upstream import LlamaModel, LlamaState, Parent
from laprox.cache_types import AUTO, CACHE_TYPES, Auto, Choice, choose, given_types, name_of, table_for
from laprox.config import KVConfig
from laprox.keywords import check_compatible, take_config
from laprox.kv import KV
from laprox.policy import Policy, Scorer
from laprox.reuse import common_prefix, contains
from laprox.sizes import shape_of, small_context
from laprox.threads import InUse

if TYPE_CHECKING:
    from laprox.read.document import Document

_DEFAULT = KVConfig()


class _Prompt(NamedTuple):
    n_cached: int  # its tokens that have been evaluated before


class Llama(Parent):
    """`llama_cpp.Llama` whose KV cache keeps only the entries that matter. Everything else is the parent's.

    A prompt is cached whole; when it is in, and before the first sampled token is evaluated, the cache is compressed
    with the prompt's end (the question) as observation window. What comes afterwards stays exact until it is more than
    `min_tokens` tokens: follow-ups are answered from what is held, and only then does the end of the next prompt compress
    again. `llm.kv` shows what is held.
    """

    _scorer: Scorer | None = None  # of the laprox.Policy in force; the engine borrows it
    _choice: Choice | None = None  # of the types that were to be chosen
    _document: Document | None = None  # prompts that begin with its tokens start from it
    _full_for_document = False  # the policy, which nobody asked for
    _without_functions: bytes | None = None  # the prompt of a chat that has functions, as it would be without
    _closed = False

    def __init__(
        self,
        model_path: str,
        *,
        kv: KVConfig | None = _DEFAULT,
        flash_attn: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """Load a model.

        Args:
            model_path: A GGUF file.
            kv: The compressing cache; None is stock llama.cpp.
            flash_attn: As in llama_cpp; None means on where the compressing cache is, which needs it.
            **kwargs: Those of `llama_cpp.Llama`, and every field of KVConfig as `kv_<field>` (`kv_budget="10%"`). `type_k` and
                `type_v` may be "auto": with a budget in bytes, the types that lose least of a text that fills the context, or
                of one that a `laprox.cache_types.Auto` tells of. `llm.kv.choice` says which these are.

        Raises:
            ValueError: A setting is out of range, the file can't be loaded, or this model can't be compressed; says why.
        """
        self._in_use = InUse()  # before anything is refused: close() needs it
        kv = take_config(kv, kwargs)
        if kv is not None:
            check_compatible(flash_attn, kwargs)
        self._types = given_types(kwargs, kv.budget if kv else None)

        self.kv_config = kv  # None: stock llama.cpp
        self._pid = os.getpid()
        self._takes_broken_template = kwargs.get("chat_format") is not None or kwargs.get("chat_handler") is not None
        self._in_prompt: _Prompt | None = None  # set while the next eval() completes a prompt
        self._tokens_reread = 0  # by the last prompt
        self._resumed = False  # it went back to the loaded document, whose counts begin anew
        self._params_set = False
        try:
            super().__init__(model_path, flash_attn=kv is not None if flash_attn is None else flash_attn, **kwargs)
            self._fit_arrays()
            if kv is not None:
                self._use_scorer_of(kv.policy)
        except BaseException as error:
            self.close()
            if self._params_set and isinstance(error, ValueError) and (reason := _core.last_error()):
                raise ValueError(f"{model_path}: {reason}") from error
            raise

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        additional_files: list[str] | None = None,
        local_dir: str | os.PathLike[str] | None = None,
        local_dir_use_symlinks: bool | str = "auto",
        cache_dir: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> Llama:
        """Load a model from a Hugging Face repository, downloading it if it isn't here.

        Args:
            repo_id: "user/model".
            filename: The file's path in the repository, or a pattern that it alone matches (`"*q4_k_m.gguf"`).
            additional_files: Further files or patterns to put beside it. The parts of a split GGUF come by themselves.
            local_dir: Where to put the files, instead of huggingface_hub's cache.
            local_dir_use_symlinks: Accepted, and without effect, as in today's huggingface_hub.
            cache_dir: Another cache than huggingface_hub's own.
            **kwargs: Those of `Llama`.

        Raises:
            MissingExtra: huggingface_hub isn't installed.
            ValueError: No file matches, or several do; or what `Llama` raises.
            DownloadError: The repository isn't there or can't be reached.
        """
        # The parent's passes huggingface_hub an argument that it no longer has.
        if filename is None:
            raise ValueError("filename is None; accepted: a file's path in the repository, or a pattern")
        path = hub.fetch_matching(repo_id, filename, additional_files or (), local_dir, cache_dir)
        return cls(model_path=str(path), **kwargs)

    @property
    def kv(self) -> KV:
        """The compressing cache: statistics, positions, scores. Raises LaproxError when it is off."""
        if self.kv_config is None:
            raise _core.LaproxError("the KV cache of this Llama is not compressed: make it with kv=KVConfig(...)")
        return KV(self)

    def _before_context(self, model: LlamaModel) -> None:
        self._check_templates(model)
        if self.kv_config is not None:
            try:
                _core.model_set_params(model.model, self.kv_config.params())
            except _core.LaproxError as error:
                raise ValueError(f"{self.model_path}: {error} (kv=None loads it uncompressed)") from None
            self._params_set = True
            self._choose_types(model)

    def _choose_types(self, model: LlamaModel) -> None:
        """Of the cache that is going to be made, where they are to be chosen."""
        autos = [given for given in self._types if isinstance(given, Auto)]
        if not autos or self.kv_config is None:
            return
        small = small_context(model)
        shape = shape_of(small.ctx)
        del small  # before the large one is made
        table = table_for(Path(self.model_path), _core.model_fingerprint(model.model))
        losses = table.unseen if autos[0].unseen else table.seen
        k, v = (None if isinstance(given, Auto) else name_of(given) for given in self._types)
        sizes = {types: shape.bytes_per_token(types) for types in losses if k in (None, types.k) and v in (None, types.v)}
        if not sizes:
            raise ValueError(
                f"type_k={k or AUTO!r}, type_v={v or AUTO!r}: nothing was measured of such a pair; accepted: {', '.join(map(str, losses))}, or types without auto"
            )
        _, budget = _core.parse_budget(str(self.kv_config.budget))
        n_tokens = autos[0].tokens or self.context_params.n_ctx or model.n_ctx_train()
        self._choice = choose(losses, budget, n_tokens, sizes)
        self.context_params.type_k, self.context_params.type_v = (CACHE_TYPES[name].ggml for name in (self._choice.types.k, self._choice.types.v))
        if self.verbose:
            print(f"laprox: {self.kv_config.budget} for {n_tokens:,} tokens: {self._choice}", file=sys.stderr)

    def _check_templates(self, model: LlamaModel) -> None:
        """The parent compiles every chat template, used or not. One that is broken is told of, or left out where none is used."""
        metadata = model.metadata()
        for name in [name for name in metadata if name.startswith("tokenizer.chat_template")]:
            try:
                templates.check(metadata[name])
            except ValueError as error:
                if not self._takes_broken_template:
                    raise ValueError(f"{self.model_path}: {error}; chat_format=\"chatml\", say, does without it") from None
                del metadata[name]
        model.metadata = lambda: dict(metadata)  # type: ignore[method-assign]

    def _use_scorer_of(self, policy: object, then: Callable[[], None] = lambda: None) -> None:
        """Have the engine ask this policy, if it is one of Python, and then do something; if that fails, the one before."""
        before = self._scorer
        scorer = Scorer(policy) if isinstance(policy, Policy) else None
        if scorer is not None:
            _core.set_scorer(self.ctx, scorer)
        try:
            then()
        except BaseException:
            _core.set_scorer(self.ctx, before)
            raise
        if scorer is None and before is not None:
            _core.set_scorer(self.ctx, None)
        self._scorer = scorer

    @property
    def _cached(self) -> npt.NDArray[np.intc]:
        """The tokens that have been evaluated."""
        return self.input_ids[: self.n_tokens]

    def _count(self) -> None:
        """Take n_tokens back to what there is: what interrupted a call, Ctrl-C say, may have left what it took back counted."""
        if self.kv_config is None:  # nothing is taken back
            return
        n_seen = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.ctx), 0) + 1
        if self.n_tokens > n_seen:
            self.n_tokens = n_seen
            self._forget_logits()

    def _cut(self, begin: int) -> bool:
        """Let go of what is cached from this position on. False, and nothing has changed, where the cache can't."""
        return llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(self.ctx), 0, begin, -1)

    def _check_usable(self) -> None:
        """Raises LaproxError if this Llama is closed, or of a process that this one was forked from."""
        if self._closed:
            raise _core.LaproxError("this Llama is closed")
        if self._pid != os.getpid():
            raise _core.LaproxError(
                "this Llama was loaded before the process forked, and llama.cpp's threads stayed behind: "
                'load it in the new process, or start that with multiprocessing.get_context("spawn")'
            )

    def _check_not_scoring(self) -> None:
        if self._scorer is not None and self._scorer.running:
            raise _core.LaproxError("a Llama can't be used inside score() of its policy: read `head` instead")

    def close(self) -> None:
        """Free the model and the cache. What else is called afterwards raises LaproxError."""
        if self._closed or getattr(self, "_pid", 0) not in (0, os.getpid()):  # a forked process has nothing to free
            return
        self._check_not_scoring()
        with self._in_use:
            if self._scorer is not None and self.ctx is not None:
                _core.set_scorer(self.ctx, None)
            self._scorer = None
            self._closed = True
            super().close()

    def reset(self) -> None:
        """Forget everything evaluated."""
        if self._closed:
            return
        self._check_not_scoring()
        with self._in_use:
            super().reset()
            if self.kv_config is not None:  # the parent would leave the entries in memory until the next eval()
                self._cut(0)

    def eval(self, tokens: Sequence[int]) -> None:
        """Evaluate tokens after those already evaluated.

        Raises:
            LaproxError: This Llama is closed.
            ValueError: They do not fit into the context.
            RuntimeError: They found no room in the cache; caused by what a `laprox.Policy` raised, if it did.
        """
        self._check_usable()
        with self._in_use:
            self._eval(tokens)

    def _eval(self, tokens: Sequence[int]) -> None:
        self._count()
        prompt, self._in_prompt = self._in_prompt, None
        if self.n_tokens + len(tokens) > self.n_ctx():
            raise ValueError(f"Requested tokens ({self.n_tokens + len(tokens)}) exceed context window of {self.n_ctx()}")
        if self.kv_config is None:
            return super().eval(tokens)
        self._check_not_scoring()
        if prompt is not None:  # the parent starts over where layers can't be cut back
            self._tokens_reread += max(0, prompt.n_cached - self.n_tokens)

        if not self._goes_on(tokens) or not self._cut(self.n_tokens):
            # n_tokens was taken back into what the cache was compressed for, or of what nothing can be cut off: start over.
            self._tokens_reread += self.n_tokens
            tokens = [*self._cached.tolist(), *tokens]
            self.reset()

        if prompt is None:
            self._eval_scored(tokens)
            return
        self._eval_prompt(tokens)
        self.kv.prompt_done()

    def _eval_prompt(self, tokens: Sequence[int]) -> None:
        """Of which the last `recall_tokens` can be taken back, where entries may come back for them."""
        assert self.kv_config is not None
        stats = _core.stats(self.ctx)
        if not self._goes_back() and self._compressed_for == 0 and stats["entries_held"] < stats["entries_full"]:
            n_before = max(0, len(tokens) - self.kv_config.recall_tokens)
            if n_before:
                self._eval_scored(tokens[:n_before])
            _core.mark(self.ctx)
            tokens = tokens[n_before:]
        if tokens:
            self._eval_scored(tokens)

    def _goes_back(self) -> bool:
        """Whether all layers can let go of what came last, and have what is before."""
        all_windows = llama_cpp.llama_model_n_swa(self.model) == 0 or self.context_params.swa_full
        return all_windows and not llama_cpp.llama_model_is_hybrid(self.model)

    @property
    def _compressed_for(self) -> int:
        """Length of the prompt that entries were last chosen for; 0: all are held, or can come back."""
        return _core.compressed_for(self.ctx) if self.kv_config is not None else 0

    def _recalls_by_queries(self) -> bool:
        """Whether entries come back for a prompt by the queries of its last tokens, which can be cut off and evaluated again."""
        if self.kv_config is None or not isinstance(self.kv_config.policy, str) or not _core.policy_probes(self.kv_config.policy):
            return False
        if self.chat_handler is not None:  # what it put there, images say, isn't among the tokens
            return False
        model = self.model
        stays = llama_cpp.llama_model_n_swa(model) or llama_cpp.llama_model_is_recurrent(model) or llama_cpp.llama_model_is_hybrid(model)
        stats = _core.stats(self.ctx)
        return not stays and stats["entries_held"] < stats["entries_full"] and self._compressed_for == 0

    def _prompt_done(self, ctx: int, last: int | None) -> tuple[int | None, list[int]]:
        """Tokens that were taken back, to be evaluated again on what the cache holds now, and the position of the first."""
        # What a chat handler put there, images say, isn't among the tokens.
        first = _core.prompt_done(ctx, 0 if self.chat_handler is not None else self.n_tokens, last)
        if first is None:
            return None, []
        again, self.n_tokens = self._cached[first:].tolist(), first
        self._forget_logits()  # the logits are of what was taken back
        return first, again

    def _goes_on(self, tokens: Sequence[int]) -> bool:
        """Whether what is cached, with `tokens` after it, contains the whole prompt that the cache was compressed for."""
        if self.n_tokens >= self._compressed_for:
            return True
        return contains(tokens, self.input_ids[self.n_tokens : self._compressed_for], self._as_text)

    def _as_text(self, tokens: list[int]) -> bytes:
        return self.detokenize(tokens, special=True)

    def _eval_scored(self, tokens: Sequence[int]) -> None:
        """The parent's eval(). A batch that finds no room is compressed by a policy, which can't raise through llama.cpp."""
        try:
            with _core.Meanwhile():
                super().eval(tokens)
        except RuntimeError as refusal:
            error = self._scorer.take_error() if self._scorer else None
            if error is None:
                raise
            if not isinstance(error, Exception):  # KeyboardInterrupt
                raise error
            raise RuntimeError(f"{refusal}: {_core.last_error()}") from error
        error = self._scorer.take_error() if self._scorer else None
        if error is None:
            return
        if not isinstance(error, Exception):
            raise error
        if self._scorer and self._scorer.first_warning():
            warnings.warn(
                f"{self._scorer.name}.score() failed and the cache was not compressed: {error!r}", RuntimeWarning, stacklevel=4
            )

    def generate(self, tokens: Sequence[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        """`llama_cpp.Llama.generate`, which compresses the cache when the prompt is in.

        A compressed cache is reused for a prompt that contains the whole one it was compressed for. Any other is read again
        from its start, and `llm.kv.stats().tokens_reread` says so.

        Raises:
            LaproxError: This Llama is closed.
            ValueError: The prompt is empty, or a grammar can't be parsed.
        """
        return self._in_use.steps(self._generate(list(tokens), *args, **kwargs))

    def _generate(self, tokens: list[int], *args: Any, **kwargs: Any) -> Generator[int, Sequence[int] | None, None]:
        self._check_usable()
        reset = kwargs.get("reset", args[6] if len(args) > 6 else True)
        if not tokens and (reset or self.n_tokens == 0):
            raise ValueError("the prompt is empty; accepted: at least one token")
        self._check_sampling(*args, **kwargs)
        self._tokens_reread = 0
        self._count()
        if reset:
            self._resume_document(tokens)
        if reset and self._compressed_for:
            if not contains(tokens, self.input_ids[: self._compressed_for], self._as_text):
                self._tokens_reread = common_prefix(self._cached, tokens)
                self.reset()
        # the parent evaluates what is left of it in one eval(), then token by token
        n_cached = common_prefix(self._cached, tokens[:-1]) if reset else self.n_tokens
        if n_cached < self.n_tokens and self._recalls_by_queries():
            # an answer has taken the place of the prompt's queries, by which entries come back: they are made again
            self.n_tokens = n_cached = min(n_cached, max(1, len(tokens) - self.kv.config.window))
        this_prompt = self._in_prompt = _Prompt(n_cached)
        try:
            with self._protecting_functions(tokens):
                yield from super().generate(tokens, *args, **kwargs)
        finally:
            if self._in_prompt is this_prompt:  # it failed before that
                self._in_prompt = None

    @functools.wraps(Parent.create_chat_completion)
    def create_chat_completion(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        chat = super().create_chat_completion
        if self.kv_config is None or self.kv_config.policy == "full":
            return chat(*args, **kwargs)
        without = functions.prompt_without(self, inspect.signature(chat).bind(*args, **kwargs).arguments)
        with self._telling_functions_from(without):
            reply = chat(*args, **kwargs)
        return reply if without is None or isinstance(reply, dict) else self._streamed(reply, without)

    def _streamed(self, chunks: Iterator[Any], without: bytes) -> Iterator[Any]:
        with self._telling_functions_from(without):  # nothing is evaluated before the first chunk is asked for
            yield from chunks

    @contextlib.contextmanager
    def _telling_functions_from(self, without: bytes | None) -> Iterator[None]:
        """In here, prompts have functions which one with this text hasn't."""
        before, self._without_functions = self._without_functions, without
        try:
            yield
        finally:
            self._without_functions = before

    @contextlib.contextmanager
    def _protecting_functions(self, prompt: list[int]) -> Iterator[None]:
        """In here, what a prompt says of functions is held, beside the budget."""
        ranges = functions.protected(self, prompt, self._without_functions) if self._without_functions is not None else []
        if not ranges:
            yield
            return
        config = self.kv.config
        protect = ",".join([*filter(None, [config.protect]), *(f"{first}-{end}" for first, end in ranges)])
        _core.set_params(self.ctx, replace(config, protect=protect).params())
        try:
            yield
        finally:
            if not self._closed:
                _core.set_params(self.ctx, self.kv.config.params())

    def load_document(self, path: str | os.PathLike[str] | Document) -> Document:
        """Hold a text that was read before (`laprox read`), and only it, without reading it again.

        From then on, every prompt that begins with its tokens, as those of `Document.prompt` do, starts from the same state; one
        that goes on with what is cached, as a follow-up does, goes on. Where this Llama has the settings that it has by default,
        nothing is evicted any more. With `logits_all`, the logits and logprobs of its tokens are NaN.

        Args:
            path: The file, or what is opened of it.

        Raises:
            LaproxError: It is of another model, chat template, cache type, RoPE setting, LoRA adapter or llama.cpp, or there is no
                room for it: nothing is held then. It can't be opened, is no document, or damaged: nothing has changed.
        """
        from laprox.read.document import Document  # the room builds on this class

        self._check_usable()
        self._check_not_scoring()
        document = path if isinstance(path, Document) else Document(path)
        with self._in_use:
            return self._hold(document)

    def _hold(self, document: Document) -> Document:
        kv = self.kv
        self._document = None
        self.reset()
        if self._full_for_document:
            kv.set(policy=_DEFAULT.policy)
        try:
            document.check(self)
            self._start_from(document)
            document.bind(self)
        except BaseException:
            self.reset()
            raise
        if kv.config == _DEFAULT and not document.has_archive:  # nobody asked for its twenty percent
            kv.set(policy="full")
            self._full_for_document = True
        self._document = document
        return document

    def _start_from(self, document: Document) -> None:
        n = len(document.tokens)
        self.n_tokens = 0  # what is cached isn't that any more, also where this is interrupted
        self._forget_logits()
        document.load(self.ctx)
        self._forget_scores(n)
        self.input_ids[:n] = document.tokens
        self.n_tokens = n

    def _resume_document(self, tokens: list[int]) -> None:
        """Start from the loaded document where a prompt is about it and doesn't go on with all that is cached."""
        self._resumed = False
        if self._document is None or tokens[: len(self._document.tokens)] != self._document.tokens:
            return
        goes_on = len(self._document.tokens) <= self.n_tokens < len(tokens)
        if not goes_on or common_prefix(self._cached, tokens) < self.n_tokens:
            self._start_from(self._document)
            self._resumed = True

    def save_state(self, archive: bool = False) -> LlamaState:
        """What is cached, compressed as it is.

        Args:
            archive: With everything that was evicted, as large as an uncompressed state. Without it, a later prompt can't
                bring back what this one doesn't hold.
        """
        self._check_usable()
        with self._in_use:
            self._count()
            if self.kv_config is None:
                return super().save_state()
            _core.set_archive_in_states(self.ctx, archive)
            try:
                with self._only_written_scores():
                    return super().save_state()
            finally:
                _core.set_archive_in_states(self.ctx, False)

    def load_state(self, state: LlamaState) -> None:
        """Continue from a saved state, compressed as it was.

        Raises:
            LaproxError: The state is not of this model and these cache types, or longer than the context; nothing is kept of it.
        """
        self._check_usable()
        self._check_not_scoring()
        if state.n_tokens > self.n_ctx():
            raise _core.LaproxError(f"the saved state has {state.n_tokens} tokens, the context has room for {self.n_ctx()}")
        with self._in_use, self._only_written_scores():
            state = self._fitted(state)
            try:
                with _core.Meanwhile():
                    super().load_state(state)
            except BaseException as error:
                self.reset()  # the parent counts its tokens before they are there
                if self.kv_config is None or not isinstance(error, RuntimeError):
                    raise
                raise _core.LaproxError(f"{error}: {_core.last_error() or 'it was saved by another model or cache'}") from None

    def __getstate__(self) -> dict[str, Any]:
        kv = self.kv_config
        return {**super().__getstate__(), "kv": replace(kv, policy=_DEFAULT.policy) if kv and self._full_for_document else kv}
