"""What works without optional packages, and what is said where one is missing."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import laprox as package
from laprox import extras
from laprox.cli import chat
from laprox.cli.app import app

# What llama-cpp-python needs itself; markupsafe is jinja2's.
ALWAYS = {"laprox", "llama_cpp", "numpy", "typing_extensions", "diskcache", "jinja2", "markupsafe"}
OPTIONAL = {module for modules in extras.PACKAGES.values() for module in modules} - ALWAYS

BLOCK = """
import sys

class Blocked:
    @staticmethod
    def find_spec(name, path=None, target=None):
        module = name.partition(".")[0]
        if {condition}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked)
"""


def run(code, blocked=None, *arguments, cwd=None):
    """In a fresh interpreter where some modules can't be imported; by default, all but ALWAYS and Python's own."""
    known = ALWAYS | set(sys.stdlib_module_names)
    condition = f"module in {blocked!r}" if blocked is not None else f"module not in {known!r} and not module.startswith('_')"
    code = BLOCK.format(condition=condition) + code
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, timeout=300, cwd=cwd)


def laprox(*arguments, blocked=None, cwd=None):
    return run("from laprox.cli import main; main()", blocked, *arguments, cwd=cwd)


def said(*arguments, blocked, cwd=None):
    """The one line on stderr."""
    done = laprox(*arguments, blocked=blocked, cwd=cwd)
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1, done
    return done.stderr.removeprefix("laprox: ").strip()


# --- without any -----------------------------------------------------------------------------------------------------


def test_llama_needs_no_optional_package(toy):
    code = f"""
import laprox

llm = laprox.Llama({str(toy())!r}, n_ctx=1024, n_threads=1, verbose=False, kv=laprox.KVConfig(budget="10%", min_tokens=64))
llm.create_completion("the quick brown fox " * 20, max_tokens=2)
stats = llm.kv.stats()
assert stats.entries_held < stats.entries_full
print("fine")
"""
    done = run(code)
    assert done.stdout == "fine\n", done.stderr


def test_the_command_says_what_it_needs():
    assert said("chat", "model.gguf", blocked={"typer", "rich"}) == (
        'laprox in the terminal needs typer and rich: pip install "laprox[cli]"'
    )


def test_the_server_needs_no_optional_package():
    done = run("from laprox.cli.serve import main; main()", None, "--version")
    assert done.returncode == 0 and "version" in done.stdout + done.stderr, done

    for option, model in (("-m", "qwen2.5-coder-0.5b"), ("-hf", "user/model")):
        done = run("from laprox.cli.serve import main; main()", None, option, model)
        said = done.stderr.strip()
        assert done.returncode == 1 and said == f'laprox-server: downloading {model} needs typer and rich: pip install "laprox[cli]"'


# --- with cli alone --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [c.name for c in app.registered_commands])
def test_help_needs_only_cli(command):
    done = laprox(command, "--help", blocked=OPTIONAL - set(extras.PACKAGES["cli"]))
    assert done.returncode == 0 and command in done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "m.gguf").touch()
    (tmp_path / "a.pdf").write_bytes(b"%PDF-1.7\n%%EOF")
    (tmp_path / "a.html").write_text("<p>text")
    (tmp_path / "samsum.jsonl").write_text(
        json.dumps({"dataset": "samsum", "input": "", "context": "c", "answers": ["a"], "all_classes": None, "_id": "1"}) + "\n"
    )
    (tmp_path / "prompts.json").write_text('{"samsum": "{context} {input}"}')
    (tmp_path / "lengths.json").write_text('{"samsum": 8}')
    return tmp_path


@pytest.mark.parametrize(
    "arguments, blocked, extra, who",
    [
        (["compare", "m.gguf", "a.txt"], "matplotlib", "report", "laprox compare"),
        (["eval", "m.gguf", "--tasks", "niah-single", "--html", "e.html"], "matplotlib", "report", "laprox eval --html"),
        (["view", "m.gguf", "a.txt", "--html", "v.html"], "matplotlib", "report", "laprox view --html"),
        (
            ["eval", "m.gguf", "--longbench", "samsum.jsonl", "--prompts", "prompts.json", "--max-lengths", "lengths.json"],
            "rouge", "eval", "ROUGE-L",
        ),
        (["info", "-hf", "user/model"], "huggingface_hub", "hub", "a model from Hugging Face"),
        (["convert-gates", "w.pth", "-o", "g.gguf"], "gguf", "gates", "writing gates"),
        (["train-gates", ".", "-d", "a.txt", "-o", "g.gguf"], "torch transformers", "train", "laprox train-gates"),
        (["chat", "m.gguf", "-d", "a.pdf"], "pypdf", "documents", "reading a PDF"),
        (["chat", "m.gguf", "-d", "a.html"], "selectolax", "documents", "reading HTML"),
    ],
)  # fmt: skip
def test_commands_name_the_missing_extra(folder, arguments, blocked, extra, who):
    packages = " and ".join(extras.PACKAGES[extra][module] for module in blocked.split())
    line = said(*arguments, blocked=set(blocked.split()), cwd=folder)
    assert line == f'{who} needs {packages}: pip install "laprox[{extra}]"'
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.html", "a.pdf", "a.txt", "lengths.json", "m.gguf", "prompts.json", "samsum.jsonl",
    ]  # fmt: skip


def test_from_pretrained_names_the_missing_extra():
    done = run("import laprox; laprox.Llama.from_pretrained('user/model', '*.gguf')", {"huggingface_hub"})
    assert done.stderr.splitlines()[-1].endswith('Llama.from_pretrained needs huggingface_hub: pip install "laprox[hub]"')


def test_reports_from_python_name_the_missing_extra():
    done = run("import laprox.viz.remembered_page", {"matplotlib"})
    assert done.stderr.splitlines()[-1].endswith('laprox.viz needs matplotlib: pip install "laprox[report]"')


def test_a_conversation_goes_on(monkeypatch):
    """/view FILE.html in a chat, without what draws it."""
    lines = iter(["/view out.html"])
    printed = []

    def read(_prompt):
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(extras, "_importable", lambda module: module != "matplotlib")
    monkeypatch.setattr(chat.notes, "input", read)
    monkeypatch.setattr(chat.notes, "print", lambda text="", **_: printed.append(text))
    session = type("Session", (), {"llm": None, "conversation": SimpleNamespace(turns=[])})()
    chat.Chat(session, as_json=False, unrelated=False).talk()
    assert 'the page needs matplotlib: pip install "laprox[report]"' in printed


def test_every_import_is_declared():
    """What another package happens to bring may be gone with its next release, as click was with typer's."""
    declared = ALWAYS | OPTIONAL
    for path in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or "laprox"]
            for name in names:
                module = name.partition(".")[0]
                assert module in declared or module in sys.stdlib_module_names, f"{path}: {module}"


# --- rooms -----------------------------------------------------------------------------------------------------------

FOLDER = Path(package.__file__).resolve().parent  # of the sources: a build apart from them has links
ROOMS = {  # folder -> the extras that importing its modules may take
    "": (), "chat": (), "demo": (), "eval": (), "gates": (), "hub": (), "profile": (), "read": (), "viz": ("report", "cli"),
    "cli": ("cli",),
}  # fmt: skip
MORE = {  # modules that take more than their room does
    "eval.compare_report": "report", "eval.eval_report": "report",
    "gates.attention": "train", "gates.losses": "train", "gates.modules": "train", "gates.training": "train",
}  # fmt: skip


def test_every_room_is_known():
    assert {path.parent.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.py")} - {"."} == ROOMS.keys() - {""}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_needs_its_own_extras_only(room):
    names = [".".join(path.relative_to(FOLDER).with_suffix("").parts) for path in sorted((FOLDER / room).glob("*.py"))]
    wanted = [f"laprox.{name}" for name in names if not name.endswith("__") and name not in MORE]
    allowed = {module for extra in ROOMS[room] for module in extras.PACKAGES[extra]}
    done = run(f"import importlib\nfor name in {wanted!r}:\n    importlib.import_module(name)\nprint('fine')", OPTIONAL - allowed)
    assert done.stdout == "fine\n", done.stderr


def test_nothing_but_the_command_imports_the_command():
    scripts = Path(__file__).parent.parent / "scripts"
    sources = [path for path in FOLDER.rglob("*.py") if path.parent.name != "cli" and path.name != "__main__.py"]
    for path in [*sources, *(path for path in scripts.iterdir() if path.is_file() and b"python" in path.read_bytes()[:40])]:
        assert not re.search(r"^\s*(from|import) laprox\.cli|^\s*from laprox import .*\bcli\b", path.read_text(), re.MULTILINE), path


# --- pyproject.toml --------------------------------------------------------------------------------------------------


def declared():
    """Extra -> packages, "" for what is always needed."""
    found = {}
    for line in importlib.metadata.requires("laprox"):
        requirement, _, marker = line.partition(";")
        name, wanted = re.match(r"([\w.-]+)\s*(?:\[(.*?)\])?", requirement).groups()
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        found.setdefault(extra[1] if extra else "", set()).add(f"{name}[{wanted}]" if name == "laprox" else name)
    return found


def test_the_table_is_that_of_pyproject():
    in_pyproject = declared()
    assert in_pyproject[""] == {"llama-cpp-python", "numpy"}
    for extra, modules in extras.PACKAGES.items():
        normal = lambda names: {re.sub(r"[-_.]+", "-", name).lower() for name in names}  # noqa: E731
        assert normal(modules.values()) == normal(in_pyproject[extra]), extra
    everything = re.search(r"\[(.*)\]", in_pyproject["all"].pop())[1].split(",")
    assert {name.strip() for name in everything} == set(extras.PACKAGES) - {"train"}
