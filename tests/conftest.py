import functools
import os
import shutil
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small products: more threads only wait for each other

from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.register_assert_rewrite("policy_run", "served_documents")

import gguf_factory  # noqa: E402
from gguf import GGMLQuantizationType as QType  # noqa: E402

import laprox  # noqa: E402 - before any test imports llama_cpp


@pytest.fixture(autouse=True)
def _log_kept():
    """llama.cpp has one log; a test before may have run a command, which takes it."""
    if "engine" in sys.modules:
        sys.modules["engine"].keep_log()


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """toy(architecture, **changes to its Shape): the path of a small random GGUF, written once per session."""
    folder = tmp_path_factory.mktemp("gguf")
    made = {}

    def make(arch="llama", weights="F32", **changes):
        key = (arch, weights, *sorted(changes.items()))
        if key not in made:
            path = folder / f"{len(made)}-{arch}.gguf"
            made[key] = getattr(gguf_factory, f"write_{arch}")(path, weights=QType[weights], **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def chatting(toy):
    """chatting(kv, arch="llama", template=CHATML, shape=None, **kwargs): a laprox.Llama on a small random model that chats."""

    def make(kv, arch="llama", template=gguf_factory.CHATML, shape=None, **kwargs):
        kwargs = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "seed": 1, "verbose": False, **kwargs}
        return laprox.Llama(str(toy(arch, chat_template=template, **(shape or {}))), kv=kv, **kwargs)

    return make


@pytest.fixture(scope="session")
def real_model():
    """real_model(name): the path of a trained GGUF that `laprox` knows by name, downloaded once per machine.

    "smollm2-135m" (98 MB) writes English, "qwen2.5-coder-0.5b" (491 MB) also answers questions about a text. On one thread they
    read some 140 and 100 tokens per second, so texts are short, and what random weights can show is shown with `toy`.
    """
    from laprox import hub

    return functools.cache(hub.fetch)


@pytest.fixture(scope="session")
def stock_lib_dir():
    """An unpatched build of the same llama.cpp. Not optional: without it nothing shows that "off" is stock."""
    folder = os.environ.get("LAPROX_STOCK_LIB_DIR")
    if not folder:
        pytest.fail("set LAPROX_STOCK_LIB_DIR to the folder of an unpatched libllama (scripts/test does)")
    return folder


@pytest.fixture
def stock(stock_lib_dir, tmp_path):
    """stock(model, steps, **context options): run_steps() in a process of its own, with the unpatched library."""

    def run(model, steps, **context):
        import worker

        return worker.run_in_process(model, steps, context, tmp_path, lib_dir=stock_lib_dir)

    return run


@pytest.fixture
def rng(request):
    """The same numbers for a test whichever tests run before it."""
    return np.random.default_rng(sum(request.node.name.encode()))


@pytest.fixture
def counted(monkeypatch):
    """counted(llm): a list that grows by the length of every batch that it evaluates."""

    def count(llm):
        lengths, decode = [], llm._ctx.decode
        monkeypatch.setattr(llm._ctx, "decode", lambda batch: (lengths.append(batch.n_tokens()), decode(batch))[1])
        return lengths

    return count


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium, the machine's or Playwright's own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        try:
            browser = p.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium: apt install chromium, or playwright install chromium ({str(error).splitlines()[0]})")
        yield browser
        browser.close()
