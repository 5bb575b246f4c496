"""-hf and from_pretrained: a GGUF of a Hugging Face repository, chosen as llama.cpp chooses it."""

import json
import os
import random
import subprocess
import sys

import pytest
from hub_server import Hub
from test_hub import closed_port

from laprox import Llama, hub
from laprox.cli import downloading, serve
from laprox.extras import MissingExtra
from laprox.hub.repositories import Listed, choose, find_file, parts_of

huggingface_hub = pytest.importorskip("huggingface_hub", reason='needs huggingface_hub: pip install "laprox[hub]"')

REPO = "user/model-GGUF"


@pytest.fixture(scope="module")
def gguf(toy):
    return toy().read_bytes()


@pytest.fixture
def served(gguf):
    files = {"README.md": b"hello", "model-Q4_K_M.gguf": gguf, "model-Q8_0.gguf": gguf + b"\0", "mmproj-F16.gguf": b"x" * 1000}
    with Hub({REPO: files}) as server:
        yield server


@pytest.fixture
def run(tmp_path, request):
    """run("code"): its output, a list of lines, in a process with a cache of its own; huggingface_hub reads settings once."""

    def run(code, endpoint=None, status=0, **environment):
        server = request.getfixturevalue("served") if endpoint is None else None
        settings = {
            "HF_ENDPOINT": server.url if server else endpoint, "HF_HOME": str(tmp_path / "hf"), "LAPROX_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1",
        }  # fmt: skip
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        done = subprocess.run(
            [sys.executable, "-c", code] if isinstance(code, str) else [sys.executable, "-m", "laprox", *code],
            capture_output=True, text=True, timeout=300, env={**kept, **settings, **environment},
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        assert "Traceback" not in done.stderr or isinstance(code, str)
        return done

    return run


def fetch(repo, file=None):
    return f"""
from laprox import hub
try:
    print(hub.fetch_from_repository({repo!r}, {file!r}, note=print))
except (hub.DownloadError, hub.BadRepository) as error:
    print(type(error).__name__, error)
"""


# --- which file ------------------------------------------------------------------------------------------------------


def listed(*names):
    return [Listed(name) for name in names]


@pytest.mark.parametrize(
    "names, quant, expected",
    [
        (["a-Q2_K.gguf", "a-Q4_K_M.gguf", "a-Q8_0.gguf"], "", "a-Q4_K_M.gguf"),
        (["a-Q2_K.gguf", "a-Q8_0.gguf"], "", "a-Q8_0.gguf"),
        (["README.md", "a-Q2_K.gguf", "a-F16.gguf"], "", "a-Q2_K.gguf"),
        (["a-Q2_K.gguf", "a-Q4_K_M.gguf"], "q2_k", "a-Q2_K.gguf"),
        (["a.q4_k_m.gguf"], "Q4_K_M", "a.q4_k_m.gguf"),
        (["a-BF16.gguf", "a-F16.gguf"], "F16", "a-F16.gguf"),
        (["a-IQ4_K_M.gguf", "a-Q4_K_M.gguf"], "", "a-Q4_K_M.gguf"),
        (["mmproj-Q4_K_M.gguf", "imatrix-Q4_K_M.gguf", "a-Q4_K_M.gguf"], "", "a-Q4_K_M.gguf"),
        (["Q8_0/a-Q8_0-00002-of-00002.gguf", "Q8_0/a-Q8_0-00001-of-00002.gguf"], "Q8_0", "Q8_0/a-Q8_0-00001-of-00002.gguf"),
    ],
)
def test_the_quant(names, quant, expected):
    assert choose(listed(*names), quant, REPO).path == expected


def test_a_quant_that_is_not_there_is_told_what_is():
    with pytest.raises(hub.DownloadError, match=r"user/model-GGUF has no GGUF of Q3_K_S; there are a-Q2_K.gguf, a-Q4_K_M.gguf"):
        choose(listed("a-Q2_K.gguf", "a-Q4_K_M.gguf"), "Q3_K_S", REPO)
    with pytest.raises(hub.DownloadError, match=r"has no GGUF$"):
        choose(listed("model.safetensors"), "", REPO)
    with pytest.raises(hub.DownloadError, match=r"has no file b.gguf; there are a.gguf"):
        find_file(listed("a.gguf", "README.md"), "b.gguf", REPO)


def test_the_parts_of_a_split_model():
    names = [f"{name}-of-00003.gguf" for name in ("a-Q8_0-00002", "a-Q8_0-00001", "a-Q8_0-00003", "b-Q8_0-00001")]
    files = listed(*names)
    assert [part.path for part in parts_of(files, files[1], REPO)] == [names[1], names[0], names[2]]
    with pytest.raises(hub.DownloadError, match="no part 2 of 3 of b-Q8_0-00001-of-00003.gguf"):
        parts_of(files, files[3], REPO)


@pytest.mark.parametrize("repo", ["model", "a/b/c", "user/model:", "user/", "/model", "user/model:Q4:K", "user/mo del", ""])
def test_what_is_no_repository(repo):
    with pytest.raises(hub.BadRepository, match="accepted: USER/MODEL or USER/MODEL:QUANT"):
        hub.fetch_from_repository(repo)


# --- downloading -----------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once(run, served, gguf):
    first = run(fetch(REPO)).stdout.splitlines()
    assert first[0].startswith("Downloading model-Q4_K_M.gguf (") and " MB) from 127.0.0.1:" in first[0] and len(first) == 2
    assert open(first[1], "rb").read() == gguf and "/hub/models--user--model-GGUF/snapshots/" in first[1]
    assert run(fetch(REPO)).stdout.splitlines() == [first[1]]
    assert len(served.gets("model-Q4_K_M.gguf")) == 1
    assert run(fetch(REPO + ":q8_0")).stdout.splitlines()[1].endswith("/model-Q8_0.gguf")
    assert run(fetch(REPO, "mmproj-F16.gguf")).stdout.splitlines()[1].endswith("/mmproj-F16.gguf")


def test_a_broken_transfer_goes_on(run, served):
    """huggingface_hub counts in chunks of 10 MiB."""
    data = random.Random(1).randbytes(25 << 20)
    served.repositories[REPO]["model-Q4_K_M.gguf"] = data
    served.cuts["model-Q4_K_M.gguf"] = 22 << 20
    assert open(run(fetch(REPO)).stdout.splitlines()[1], "rb").read() == data
    assert served.gets("model-Q4_K_M.gguf") == [None, f"bytes={20 << 20}-"]


def test_other_bytes_than_the_list_says_are_refused_and_not_kept(run, served, tmp_path):
    code = f"""
from laprox.hub import repositories
listed = repositories._list
repositories._list = lambda *a: ([repositories.Listed(f.path, f.n_bytes, "0" * 64) for f in listed(*a)[0]], False)
{fetch(REPO)}"""
    assert "is another file: its sha256 is" in run(code).stdout
    assert not list((tmp_path / "hf").rglob("*.gguf")) and not [f for f in (tmp_path / "hf").rglob("blobs/*") if f.is_file()]


def test_a_split_model_gets_all_parts(run, served, gguf):
    names = [f"big-Q4_K_M-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    served.repositories["user/big"] = {name: gguf[: 1000 * n] for n, name in enumerate(names, 1)}
    path = run(fetch("user/big")).stdout.splitlines()[1]
    assert path.endswith(names[0])
    assert sorted(os.listdir(os.path.dirname(path))) == names


@pytest.mark.parametrize(
    "repo, answer, expected",
    [
        ("user/none", None, "has no repository user/none, or it is private: set HF_TOKEN"),
        (REPO, (401, {}), "model-GGUF"),
        (REPO, (403, {"X-Error-Code": "GatedRepo"}), "is gated: accept its terms at 127.0.0.1:"),
        (REPO, (418, {}), "answers 418 to user/model-GGUF"),
        (REPO, (503, {}), "answers 503 to user/model-GGUF"),
    ],
)
def test_what_the_hub_refuses_is_told_in_a_line(run, served, repo, answer, expected):
    if answer:
        served.answers[repo] = answer
    lines = run(fetch(repo)).stdout.splitlines()
    assert len(lines) == 1 and lines[0].startswith("DownloadError ") and expected in lines[0]


def test_the_token_is_sent(run, served):
    run(fetch(REPO), HF_TOKEN="hf_secret")
    sent = [{name.lower(): value for name, value in headers.items()} for _, _, headers in served.requests]
    assert sent and all(headers["authorization"] == "Bearer hf_secret" for headers in sent)


def test_without_a_network_what_is_in_the_cache_is_taken(run):
    path = run(fetch(REPO)).stdout.splitlines()[1]
    lines = run(fetch(REPO), endpoint=closed_port()).stdout.splitlines()
    assert "can't be reached" in lines[0] and lines[1] == path
    assert run(fetch(REPO + ":Q4_K_M"), HF_HUB_OFFLINE="1").stdout.splitlines() == [path]
    assert "has no GGUF of Q8_0; there are model-Q4_K_M.gguf" in run(fetch(REPO + ":Q8_0"), HF_HUB_OFFLINE="1").stdout


def test_without_a_network_and_with_nothing_in_the_cache(run):
    lines = run(fetch(REPO), endpoint=closed_port()).stdout.splitlines()
    assert len(lines) == 1 and "can't be reached" in lines[0]
    assert "HF_HUB_OFFLINE is set: nothing is downloaded" in run(fetch(REPO), HF_HUB_OFFLINE="1").stdout


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingExtra, match=r'needs huggingface_hub: pip install "laprox\[hub\]"'):
        hub.fetch_from_repository(REPO)
    with pytest.raises(ImportError, match=r'Llama.from_pretrained needs huggingface_hub: pip install "laprox\[hub\]"'):
        Llama.from_pretrained(REPO, "*.gguf")


# --- Llama.from_pretrained -------------------------------------------------------------------------------------------


def loaded(arguments):
    return f"""
import json, pickle, warnings
from laprox import KVConfig, Llama
try:
    llm = Llama.from_pretrained({arguments}, n_ctx=256, n_threads=1, verbose=False)
except (ValueError, RuntimeError) as error:
    print(json.dumps({{"error": str(error)}}))
else:
    again = pickle.loads(pickle.dumps(llm))
    print(json.dumps({{"path": llm.model_path, "budget": llm.kv_config and llm.kv_config.budget, "type": type(again).__module__,
                      "again": again.model_path, "again_budget": again.kv_config and again.kv_config.budget}}))
"""


@pytest.mark.parametrize(
    "setting, budget", [("kv=KVConfig(budget='10%')", "10%"), ("kv_budget='20%'", "20%"), ("kv=None", None)]
)
def test_from_pretrained(run, setting, budget):
    got = json.loads(run(loaded(f"{REPO!r}, '*Q4_K_M.gguf', {setting}")).stdout)
    assert got["path"].endswith("/model-Q4_K_M.gguf") and got["again"] == got["path"]
    assert got["type"] == "laprox.llama" and got["budget"] == got["again_budget"] == budget


def test_from_pretrained_into_a_folder(run, served, gguf, tmp_path):
    served.repositories[REPO]["sub/model-Q5_K.gguf"] = gguf
    arguments = f"{REPO!r}, 'sub/*Q5_K.gguf', additional_files=['README.md'], local_dir={str(tmp_path / 'here')!r}"
    got = json.loads(run(loaded(arguments)).stdout)
    assert got["path"] == str(tmp_path / "here" / "sub" / "model-Q5_K.gguf")
    assert (tmp_path / "here" / "README.md").read_bytes() == b"hello"


def test_from_pretrained_says_which_files_there_are(run):
    none = json.loads(run(loaded(f"{REPO!r}, '*Q3*'")).stdout)["error"]
    assert "no file that matches *Q3*; there are README.md, mmproj-F16.gguf" in none
    several = json.loads(run(loaded(f"{REPO!r}, 'model*.gguf'")).stdout)["error"]
    assert "several files of user/model-GGUF match model*.gguf: model-Q4_K_M.gguf, model-Q8_0.gguf" in several


# --- commands --------------------------------------------------------------------------------------------------------


def test_a_command_takes_hf_instead_of_a_model(run):
    done = run(["info", "-hf", f"{REPO}:q4_k_m", "--json"])
    assert json.loads(done.stdout)["file"].endswith("/model-Q4_K_M.gguf")
    assert done.stderr.startswith("Downloading model-Q4_K_M.gguf")
    done = run(["info", "--hf-repo", REPO, "--hf-file", "model-Q4_K_M.gguf", "--json"])
    assert json.loads(done.stdout)["compressible"] and done.stderr == ""


def test_documents_follow_hf(run, tmp_path):
    (tmp_path / "notes.txt").write_text("the quick brown fox jumps over the lazy dog. " * 5)
    done = run(["view", "-hf", REPO, str(tmp_path / "notes.txt"), "-t", "1"])
    assert "tokens seen" in done.stderr


def test_a_command_tells_what_the_hub_says(run):
    done = run(["info", "-hf", f"{REPO}:Q2_K"], status=1)
    assert done.stderr == f"laprox: {REPO} has no GGUF of Q2_K; there are model-Q4_K_M.gguf, model-Q8_0.gguf\n"


@pytest.mark.parametrize(
    "arguments, downloads, expected",
    [
        (["-m", "a.gguf", "-c", "10"], False, ["-m", "a.gguf", "-c", "10"]),
        (["-c", "10", "-m"], False, ["-c", "10", "-m"]),
        (["-hf", "user/model", "-c", "10"], True, ["-hf", "user/model", "-c", "10"]),
        (["-c", "10", "-hf", "user/model:Q8_0"], False, ["-m", "user/model:Q8_0 None", "-c", "10"]),
        (["--hf-repo", "user/model", "-hff", "a.gguf"], False, ["-m", "user/model a.gguf"]),
        (["-m", "smollm2-135m"], True, ["-m", "fetched smollm2-135m"]),
    ],
)
def test_what_llama_server_is_told(monkeypatch, arguments, downloads, expected):
    monkeypatch.setattr(downloading, "fetch", lambda name: f"fetched {name}")
    monkeypatch.setattr(downloading, "fetch_from_repository", lambda repo, file, offline: f"{repo} {file}")
    assert serve.with_local_model(arguments, downloads) == expected


def test_whether_llama_server_can_download(tmp_path):
    for path in ("bin/llama-server", "lib/libllama-common.so", "lib/libllama.so"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(b"\x7fELF")
    assert serve.has_https(tmp_path)
    (tmp_path / "lib/libllama-common.so").write_bytes(b"\x7fELF HTTPS is not supported. Please rebuild with one of:")
    assert not serve.has_https(tmp_path)
