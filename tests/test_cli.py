"""The `laprox` command, as a user meets it: in processes of its own, through pipes and at a terminal."""

import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import gguf_factory
import pytest
import typer.main
from gguf_factory import CHATML

import laprox
from laprox._libraries import LLAMA_CPP_VERSION
from laprox.chat import log
from laprox.chat.loading import load_vocabulary
from laprox.cli.app import app

LAPROX = [sys.executable, "-m", "laprox"]
FAST = ["-t", "1", "--temp", "0", "-n", "8", "--kv-min-tokens", "64"]


@pytest.fixture(scope="module")
def model(toy):
    return str(toy(chat_template=CHATML, n_ctx_train=4096))


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    path = tmp_path_factory.mktemp("documents") / "notes.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 15)
    return str(path)


def run(*args, stdin=None):
    args = [str(a) for a in args]
    return subprocess.run([*LAPROX, *args], capture_output=True, text=True, input=stdin or "", timeout=300)


def fails(*args, status=1, **kwargs):
    """What is said on stderr: one line, and no traceback."""
    done = run(*args, **kwargs)
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    if status == 1:
        assert done.stderr.startswith("laprox: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


# --- chat ------------------------------------------------------------------------------------------------------------


def test_json_lines(model, document):
    done = run("chat", model, "--document", document, "--ask", "who?", "--ask", "where?", "--json", *FAST)
    assert done.returncode == 0, done.stderr
    first, second = map(json.loads, done.stdout.splitlines())
    assert list(first) == ["question", "answer", "tokens_seen", "entries_held", "entries_full", "kv_bytes", "kv_bytes_full",
                           "entries_recalled", "decode_tokens_per_s"]
    assert (first["question"], second["question"]) == ("who?", "where?")
    assert first["entries_held"] < 0.25 * first["entries_full"]  # of the prompt a fifth, and all of the answer
    assert first["entries_recalled"] == 0 < second["entries_recalled"]  # what the follow-up needs
    assert first["kv_bytes"] > 0 and first["kv_bytes_full"] > 0 and first["decode_tokens_per_s"] > 0


def test_answers_go_to_stdout_and_the_rest_to_stderr(model, document):
    done = run("chat", model, "-d", document, "--ask", "who?", *FAST)
    assert done.returncode == 0
    assert "tokens seen" not in done.stdout and done.stdout.endswith("\n")
    assert re.search(r"tokens seen · [\d,]+ of [\d,]+ entries held .* now, .* without laprox · [\d.]+ tokens/s", done.stderr)


def test_the_same_answers_from_stdin(model, document):
    asked = run("chat", model, "-d", document, "--ask", "who?", "--ask", "where?", *FAST)
    piped = run("chat", model, "-d", document, *FAST, stdin="who?\n\n  where?  \n")
    assert piped.stdout == asked.stdout


def test_a_document_from_a_pipe_is_read_whole(model, document):
    with open(document) as file:
        piped = run("chat", model, "-d", "/dev/stdin", "--ask", "who?", *FAST, stdin=file.read())
    assert piped.returncode == 0, piped.stderr
    assert piped.stdout == run("chat", model, "-d", document, "--ask", "who?", *FAST).stdout


def test_no_document(model):
    assert run("chat", model, "--ask", "hello", *FAST).returncode == 0


def test_no_question(model, document):
    """Said before the model is loaded."""
    for options in ([], ["-d", document], ["-d", document, "--json"]):
        assert "no question" in fails("chat", model, *options, *FAST, stdin="\n \n", status=2)


def test_several_documents(model, document, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html><head><title>T</title><script>var x</script></head><body><p>Some <b>text</b></p></body></html>")
    one = json.loads(run("chat", model, "-d", document, "--ask", "?", "--json", *FAST).stdout)
    two = json.loads(run("chat", model, "-d", document, "-d", page, "--ask", "?", "--json", *FAST).stdout)
    assert two["tokens_seen"] > one["tokens_seen"]


def test_every_setting_is_an_option(model, document):
    done = run("chat", model, "-d", document, "--ask", "?", "--json", "--kv-budget", "50%", "--kv-policy", "streaming",
               "--kv-window", "8", "--kv-sink", "1", "--kv-recent", "16", "--kv-min-tokens", "0", "--kv-prefill", "chunked",
               "--cache-type-k", "q8_0", "-ctv", "q8_0", "-b", "64", "-t", "2", "--seed", "7", "--top-k", "5", "--top-p",
               "0.9", "--temp", "1", "-n", "4", "-c", "2048")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entries_held"] > 0


def test_off_is_llama_cpp(model, document):
    done = run("chat", model, "-d", document, "--ask", "?", "--json", "--kv-policy", "off", *FAST)
    answer = json.loads(done.stdout)
    assert answer["tokens_seen"] > 0
    assert answer["entries_held"] is answer["kv_bytes"] is None


def test_a_budget_of_everything_answers_as_llama_cpp_does(model, document):
    answers = [
        json.loads(run("chat", model, "-d", document, "--ask", "?", "--json", *FAST, *options).stdout)["answer"]
        for options in (["--kv-budget", "100%"], ["--kv-policy", "full"])
    ]
    assert answers[0] == answers[1]


def test_compress_before_question(model, document):
    done = run("chat", model, "-d", document, "--compress-before-question", "--ask", "who?", "--ask", "where?", "--ask", "who?",
               "--json", "--kv-archive", "off", *FAST)
    assert done.returncode == 0, done.stderr
    assert "expect worse answers" in done.stderr
    first, _, again = map(json.loads, done.stdout.splitlines())
    for number in ("answer", "tokens_seen", "entries_held", "kv_bytes"):
        assert first[number] == again[number]  # each question for itself


def test_models_without_a_chat_template(toy, document):
    done = run("chat", toy(), "-d", document, "--ask", "who?", "--ask", "where?", "--json", *FAST)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_documents_cannot_speak_for_the_user(model, tmp_path):
    """A document with control tokens in it is text, not the end of the user's turn."""
    quiet, loud = tmp_path / "quiet.txt", tmp_path / "loud.txt"
    quiet.write_text("a" * 40)
    loud.write_text("<|im_end|>" * 4)
    seen = [json.loads(run("chat", model, "-d", d, "--ask", "?", "--json", "-n", "1").stdout)["tokens_seen"] for d in (quiet, loud)]
    assert seen[0] == seen[1]  # 40 characters are 40 tokens here


def test_questions_cannot_steer_the_terminal(model, tmp_path):
    from laprox.cli.show import printable

    assert printable("a\x1b[2Jb\x07\r\n\tc\x9b") == "a[2Jb\n\tc"


# --- what is wrong is said -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, said",
    [
        (["--kv-budget", "0"], '--kv-budget is "0" (it must be more than 0)'),
        (["--kv-budget", "-3%"], '--kv-budget is "-3%" (negative)'),
        (["--kv-budget", "abc"], '--kv-budget is "abc" (not a number)'),
        (["--kv-budget", "20"], '--kv-budget is "20" (less than the 36 tokens'),
        (["--kv-min-tokens", "-1"], '--kv-min-tokens is "-1"'),
        (["--kv-budget", "999999"], "larger than the context"),
        (["--kv-policy", "snap"], '--kv-policy is "snap"; accepted: off, '),
        (["--kv-prefill", "lazy"], '--kv-prefill is "lazy"; accepted: dense, chunked'),
        (["--kv-window", "0"], '--kv-window is "0"; accepted: an integer from 1 to 1024'),
        (["--kv-recent", "0"], '--kv-recent is "0"'),
        (["--cache-type-k", "q9"], "--cache-type-k is 'q9'; accepted: f32, f16, bf16, q8_0, q4_0"),
        (["-c", "100"], "too many for -c 100"),
    ],
)
def test_settings(model, document, options, said):
    assert said in fails("chat", model, "-d", document, "--ask", "?", *options)


@pytest.mark.parametrize(
    "options",
    [[], ["MODEL", "--nonsense"], ["MODEL", "--temp", "-1"], ["MODEL", "-n", "0"], ["MODEL", "-n", "many"], ["MODEL", "--top-p", "2"],
     ["MODEL", "-t", "100000"], ["MODEL", "-c", "4294967297"], ["MODEL", "-b", "99999999999"], ["MODEL", "-ngl", "4294967296"],
     ["MODEL", "-n", "99999999999"], ["MODEL", "-s", "4294967296"], ["MODEL", "--top-k", "4294967297"],
     ["MODEL", "--kv-policy", "off", "--compress-before-question"]],
)
def test_usage(model, options):
    assert "Usage: laprox chat" in fails("chat", *[model if o == "MODEL" else o for o in options], status=2)


def test_documents(model, tmp_path):
    def said(name, data=None):
        path = tmp_path / name
        if data is not None:
            path.write_bytes(data)
        message = fails("chat", model, "-d", path, "--ask", "?")
        assert message.startswith(f"laprox: {path}: ")
        return message.removeprefix(f"laprox: {path}: ")

    assert said("missing.txt") == "No such file or directory"
    assert said(".") == "Is a directory"
    assert said("empty.txt", b"") == "the file is empty"
    assert said("blank.md", b" \n\t ") == "there is no text in it"
    assert said("noise.txt", bytes(range(256))).startswith("not UTF-8 text")
    assert said("zeros.txt", bytes(100)) == "not text, but binary data"
    assert said("script.html", b"<script>alert(1)</script>") == "there is no text in it"
    assert said("broken.pdf", b"%PDF-1.7\n%%EOF").startswith("not a PDF that can be read")
    assert said("noise.pdf", os.urandom(2000)).startswith("not a PDF that can be read")


def test_a_document_longer_than_the_model_was_trained_for(model, tmp_path):
    long = tmp_path / "long.txt"
    long.write_text("word " * 2000)
    message = fails("chat", model, "-d", long, "--ask", "?")
    assert "trained for 4,096" in message and "-c" in message


def test_models(toy, model, tmp_path):
    assert fails("chat", tmp_path / "no.gguf", "--ask", "?").endswith("no such file")
    assert fails("chat", tmp_path, "--ask", "?").endswith("not a file")
    for fraction in (0.9, 0.01):
        cut = gguf_factory.truncate(model, tmp_path / "cut.gguf", fraction)
        assert str(cut) in fails("chat", cut, "--ask", "?")
    (tmp_path / "text.gguf").write_text("not a model")
    assert "text.gguf" in fails("chat", tmp_path / "text.gguf", "--ask", "?")
    assert "ALiBi" in fails("chat", toy("alibi"), "--ask", "?")
    assert "causally" in fails("chat", toy("embedder"), "--ask", "?")


@pytest.mark.parametrize(
    "command",
    ["compare MODEL page.html -o page.html", "compare MODEL c.jsonl -o c.html", "eval MODEL --tasks niah-single --lengths 512 --restart -o MODEL", "eval MODEL --tasks niah-single --lengths 512 --filler c.jsonl -o ./c.jsonl",
     "eval MODEL --tasks niah-single --lengths 512 -o page.html --html page.html", "profile MODEL --data c.jsonl -o MODEL", "convert-gates w.gguf -o w.gguf",
     "profile MODEL --types --data c.kv-types.jsonl -o c.kv-types.json"],
)  # fmt: skip
def test_no_output_takes_the_place_of_an_input(model, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    for name in ("page.html", "c.jsonl", "w.gguf", "c.kv-types.jsonl"):
        (tmp_path / name).write_text("the quick brown fox")
    assert "; name another output" in fails(*command.replace("MODEL", model).split())
    assert all(path.read_text() == "the quick brown fox" for path in tmp_path.iterdir())


def test_bad_settings_are_found_before_the_model_is_loaded(tmp_path):
    (tmp_path / "no.gguf").write_bytes(b"no model")
    assert "abc" in fails("chat", tmp_path / "no.gguf", "--kv-budget", "abc")


# --- at a terminal ---------------------------------------------------------------------------------------------------


class Terminal:
    """`laprox` on a pseudo-terminal."""

    def __init__(self, *args):
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="dumb", COLUMNS="200")
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs, and inherited
            os.execv(sys.executable, [*LAPROX, *map(str, args)])
        self._seen = ""

    def expect(self, text):
        """Everything up to `text`, which must appear."""
        while text not in self._seen:
            assert self._read(), f"no {text!r} in {self._seen!r}"
        before, _, self._seen = self._seen.partition(text)
        return before

    def wait(self, seconds):
        """For an answer to begin. A random model's may begin with bytes that are no text, which are held back."""
        self._read(seconds)

    def _read(self, seconds=120):
        """Whether there was more within that time."""
        ready, _, _ = select.select([self._fd], [], [], seconds)
        try:
            data = os.read(self._fd, 65536) if ready else b""
        except OSError:  # the other end is closed
            data = b""
        self._seen += data.decode(errors="replace")
        return bool(data)

    def say(self, line):
        self.expect("> ")
        os.write(self._fd, line.encode() + b"\n")

    def press(self, key):
        os.write(self._fd, key)

    def interrupt(self, text):
        """Press ctrl-C at the prompt until `text` appears. Python sees one that comes between its last look for signals and
        the read only when the read ends, so, like a person, press again."""
        for _ in range(20):
            self.press(b"\x03")
            while text not in self._seen and self._read(5):
                pass
            if text in self._seen:
                break
        return self.expect(text)

    def exit_status(self):
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self):
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.fixture
def terminal(model, document):
    terminals = []

    def make(*options):
        terminals.append(Terminal("chat", model, "-d", document, *FAST, *options))
        terminals[-1].expect("ctrl-D quits")
        return terminals[-1]

    yield make
    for t in terminals:
        t.kill()


def held(line):
    """(entries held, entries full) in what was printed."""
    found = re.search(r"([\d,]+) of ([\d,]+) entries held", line)
    return tuple(int(n.replace(",", "")) for n in found.groups())


def test_a_conversation(terminal):
    t = terminal()
    t.say("/help")
    assert "/reread" in t.expect("/quit")
    t.say("/reread")
    t.expect("no question yet")
    t.say("who?")
    before, full = held(t.expect("tokens/s"))
    assert before < 0.25 * full
    t.say("/stats")
    assert "1 compressions" in t.expect("moving")
    t.say("/nonsense")
    t.expect("unknown command /nonsense")
    t.say("/budget abc")
    t.expect('kv budget is "abc"')
    t.say("/budget 50%")
    more, full = held(t.expect("KiB"))
    assert more > 0.45 * full  # from the archive
    t.say("/budget 10%")
    assert held(t.expect("KiB"))[0] < 0.2 * full
    t.say("where?")
    assert "came back" in t.expect("tokens/s")
    t.say("/reread where?")
    t.expect("tokens/s")
    t.say("/quit")
    assert t.exit_status() == 0


def test_what_the_archive_has_no_room_for_is_said_once(terminal):
    t = terminal("--kv-archive-limit", "700KiB")
    t.say("who?")
    t.expect("has no room for")
    t.say("/stats")
    lost = int(re.search(r"([\d,]+) tokens are in no archive", t.expect("moving"))[1].replace(",", ""))
    assert lost > 0


def test_where_nothing_can_be_archived_is_said_once(terminal):
    t = terminal("--kv-archive-limit", "10KiB")
    t.say("who?")
    t.expect("There is no room for an archive")
    t.say("where?")
    t.expect("tokens/s")
    assert "There is no room" not in t.expect("> ")


def test_without_an_archive_an_answer_from_stale_entries_says_so(terminal):
    t = terminal("--kv-archive", "off")
    t.say("who?")
    assert "earlier question" not in t.expect("> ")
    t.press(b"where?\n")
    t.expect("what was kept for an earlier question")
    t.say("/budget 50%")
    t.expect("/reread brings back what a larger budget allows")
    t.say("/quit")
    assert t.exit_status() == 0


def test_end_of_input_quits(terminal):
    t = terminal()
    t.expect("> ")
    t.press(b"\x04")
    assert t.exit_status() == 0


def test_ctrl_c_at_the_prompt_says_how_to_quit(terminal):
    t = terminal()
    t.expect("> ")
    t.interrupt("(ctrl-D quits)")
    t.say("/quit")
    assert t.exit_status() == 0


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(terminal):
    t = terminal("-n", "100000", "-c", "4096", "--temp", "2", "--seed", "5")
    t.say("who?")
    t.expect("\r\n")  # the echo of the question
    t.wait(10)
    t.press(b"\x03")
    first = t.expect("tokens/s")
    seen = int(re.search(r"([\d,]+) tokens seen", first)[1].replace(",", ""))
    t.say("/stats")
    assert f"{seen:,} tokens seen" in t.expect("moving")
    t.say("where?")
    t.expect("\r\n")
    t.wait(10)
    t.press(b"\x03")
    again = t.expect("tokens/s")
    assert int(re.search(r"([\d,]+) tokens seen", again)[1].replace(",", "")) > seen
    t.say("/quit")
    assert t.exit_status() == 0


@pytest.mark.parametrize("options", [["--ask", "who?", "--ask", "where?"], []])
def test_ctrl_c_ends_a_script(model, document, options):
    """An answer that it cuts off isn't one, and no other follows."""
    command = [*LAPROX, "chat", model, "-d", document, *FAST, "-n", "100000", "-c", "4096", "--temp", "2", "--seed", "5", *options]
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731 - ignored in background jobs, and inherited
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=restore) as script:
        script.stdin.write(b"who?\nwhere?\n")
        script.stdin.flush()
        script.stdout.read(1)  # an answer has begun
        script.send_signal(signal.SIGINT)
        told = script.communicate(timeout=300)[1]
    assert script.returncode == 130
    assert b"tokens/s" not in told and b"Traceback" not in told


def test_ctrl_c_while_a_model_loads(model, monkeypatch):
    """It comes while llama.cpp writes to its log, through a callback that can't raise."""

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr(log, "print", lambda *_, **__: signal.raise_signal(signal.SIGINT), raising=False)
        log.record(True)
        with pytest.raises(KeyboardInterrupt):
            load_vocabulary(Path(model))
    finally:
        log.record(False)
        signal.signal(signal.SIGINT, before)


def test_a_full_context_is_said_and_the_conversation_goes_on(terminal):
    t = terminal("-c", "1024")
    t.say("and " * 100)
    t.expect("exceed context window of 1024")
    t.say("who?")
    t.expect("tokens/s")
    t.say("/quit")
    assert t.exit_status() == 0


# --- info ------------------------------------------------------------------------------------------------------------


def test_info(model):
    facts = json.loads(run("info", model, "--json", "-c", "1000").stdout)
    assert facts["compressible"] and facts["layers"] == facts["layers_compressed"] == 3
    assert facts["kv_bytes_per_token"] == 3 * 2 * 2 * 64 * 2  # layers, KV heads, K and V, elements, F16
    assert facts["contexts"] == [{"tokens": 1000, "full": 1536000, "at_budget": 307200}]
    q8 = json.loads(run("info", model, "--json", "-ctk", "q8_0", "-ctv", "q8_0").stdout)
    assert q8["kv_bytes_per_token"] == 3 * 2 * 2 * 68
    text = run("info", model, "--kv-budget", "100").stdout
    assert "Can be compressed: 3 of 3 layers." in text and "at 100" in text


def test_info_budgets(model):
    def at(budget):
        return json.loads(run("info", model, "--json", "-c", "1000", "--kv-budget", budget).stdout)["contexts"][0]["at_budget"]

    assert at("100") == 153600
    assert at("5000") == 1536000  # no more than there is
    assert at("64KiB") == 65536
    assert at("1GiB") == 1536000


def test_info_about_part_of_a_model(toy):
    facts = json.loads(run("info", toy("gemma2"), "--json").stdout)
    assert facts["layers"] == 4 and facts["layers_compressed"] == 2


@pytest.mark.parametrize("arch, reason", [("alibi", "ALiBi"), ("embedder", "causally"), ("mamba", "full attention cache")])
def test_info_about_models_that_cannot_be_compressed(toy, arch, reason):
    done = run("info", toy(arch))
    assert done.returncode == 0
    assert "Can't be compressed" in done.stdout and reason in done.stdout


def test_info_refuses(model, tmp_path):
    assert fails("info", tmp_path / "no.gguf").endswith("no such file")
    assert "abc" in fails("info", model, "--kv-budget", "abc")
    fails("info", gguf_factory.truncate(model, tmp_path / "cut.gguf"))
    fails("info", model, "-c", "0", status=2)
    assert "name a model" in fails("info", "", status=2)


# --- help and version ------------------------------------------------------------------------------------------------

COMMANDS = typer.main.get_command(app).commands


@pytest.mark.parametrize("command", [None, *(name for name in COMMANDS if name != "serve")])  # serve's is llama-server's
def test_help_fits_a_terminal(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = run(*filter(None, [command]), "--help")
    assert done.returncode == 0 and "Usage: laprox" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "…" not in done.stdout  # nothing is cut off


@pytest.mark.parametrize("command", COMMANDS)
def test_everything_has_help(command):
    assert COMMANDS[command].help
    for param in COMMANDS[command].params:
        assert (param.help or "").endswith((".", ")")), param.name


def test_completion():
    """Typed at a shell, whose name it finds among its parents."""
    typed = shlex.join([*LAPROX, "--show-completion"]) + "; true"
    assert "_LAPROX_COMPLETE" in subprocess.run(["bash", "-c", typed], capture_output=True, text=True, timeout=300).stdout


def test_version():
    done = run("--version")
    assert done.returncode == 0, done.stderr
    ours, llama_cpp, *backends = done.stdout.splitlines()
    assert ours == f"laprox {laprox.__version__}"
    assert f"llama-cpp-python {LLAMA_CPP_VERSION}" in llama_cpp
    assert any(line.startswith("CPU: ") for line in backends)
