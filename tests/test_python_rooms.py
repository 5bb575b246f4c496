"""What the rooms of the package share: files, tokens, loading, options."""

import inspect
from dataclasses import dataclass
from typing import Annotated, get_args

import pytest
import typer

from laprox import KVConfig
from laprox.chat.loading import Loader
from laprox.chat.tokens import check_context, n_shared, read, text_of, tokens_of
from laprox.cli.groups import grouped
from laprox.files import Partial, check_same_run, replacing


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as unfinished:
        assert unfinished.parent == path.parent
        unfinished.write_text("after")
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_run_that_goes_on_has_its_settings(tmp_path):
    output = tmp_path / "out.bin"
    partial = Partial(output, {"seed": 1, "data": ("a", "b")})
    partial.path("1").touch()
    again = Partial(output, {"seed": 1, "data": ["a", "b"]})
    assert "1" in again and "2" not in again and again.folder == tmp_path / "out.bin.partial"
    with pytest.raises(ValueError, match="its seed is 1, now it is 2.* --restart to begin anew"):
        Partial(output, {"seed": 2, "data": ["a", "b"]})
    assert "1" not in Partial(output, {"seed": 2}, restart=True)
    (again.folder / "settings.json").write_text("{")  # cut off
    with pytest.raises(ValueError, match="its seed is null, now it is 2"):
        Partial(output, {"seed": 2})
    again.remove()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"x is of another run: its a is \[1\], now it is null"):
        check_same_run("x", {"a": [1]}, {})


def test_tokens_that_prompts_share():
    assert n_shared([1, 2, 3]) == 3 and n_shared([1, 2, 3], [1, 2, 4], [1, 2, 3, 4]) == 2
    assert n_shared([1], [2]) == 0 == n_shared([], [1]) and n_shared([1, 2], [1, 2, 3]) == 2


def test_a_context_that_is_too_small_is_refused():
    for wanted, trained in ((0, 0), (0, 100), (100, 50)):
        check_context("a text", 100, wanted, trained, "shorten it")
    with pytest.raises(ValueError, match=r"a text: 1,000 tokens, .* too many for -c 999 \(at least 1000\)"):
        check_context("a text", 1000, 999, 0, "shorten it")
    with pytest.raises(ValueError, match=r"trained for 999: shorten it \(or insist: --length 1000\)"):
        check_context("a text", 1000, 0, 999, "shorten it", "--length")


def test_a_model_from_its_options(toy):
    loader = Loader(toy(), threads=1, batch_size=64, type_k=8, type_v=8)
    tokens = [1, *tokens_of(loader.vocabulary, "the <s> quick brown fox " * 8)]
    assert 1 not in tokens[1:] and "the <s> quick" in text_of(loader.vocabulary, tokens) and tokens_of(loader.vocabulary, "") == []
    llm = loader.open(512, KVConfig(budget="20%"), n_ubatch=32)
    assert (llm.n_threads, llm.n_threads_batch, llm.n_batch, llm.kv.config.budget) == (1, 1, 64, "20%")
    assert llm.context_params.type_k == llm.context_params.type_v == 8 and llm.context_params.n_ubatch == 32
    assert list(read(llm, tokens))[-2:] == [len(tokens) // 64 * 64, len(tokens)] and llm.n_tokens == len(tokens)
    assert loader.open(512, None, flash_attn=True).kv_config is None


@dataclass(frozen=True)
class Pair:
    """Two options."""

    one: Annotated[int, typer.Option("--one")] = 1
    two: Annotated[str, typer.Option("--two")] = "2"


def test_options_that_belong_together():
    called = []

    @grouped
    def command(first: str, pair: Pair = Pair(), last: bool = False) -> None:
        """What it does."""
        called.append((first, pair, last))

    parameters = inspect.signature(command).parameters
    assert list(parameters) == ["first", "one", "two", "last"] and command.__doc__ == "What it does."
    assert get_args(parameters["one"].annotation)[0] is int and parameters["two"].default == "2"
    command("a", two="3")
    command(first="b", one=5, last=True)
    assert called == [("a", Pair(1, "3"), False), ("b", Pair(5, "2"), True)]
