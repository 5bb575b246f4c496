"""`laprox eval`: its documents and questions, LongBench's files, and the command."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import gates_factory
import numpy as np
import pytest
from gguf_factory import CHATML

from laprox import Llama, _core
from laprox.chat.loading import load_vocabulary
from laprox.chat.tokens import last_logits
from laprox.cli import main
from laprox.eval import longbench, tasks
from laprox.eval.jobs import task_jobs
from laprox.eval.metrics import kl_divergence, log_softmax, recall
from laprox.eval.rows import Rows
from laprox.eval.summary import key
from laprox.eval.tasks import Maker, Paragraph
from laprox.eval.trials import ALONG
from laprox.gates import sidecar

PAIRS = 3 * 2  # layers and KV heads of the toy
LAPROX = [sys.executable, "-m", "laprox"]
PARAGRAPHS = [
    Paragraph(f"Who lives at number {i}?", (f"Person {i}",), f"At number {i} lives Person {i}. " + "It rains. " * (i % 7))
    for i in range(99)
]


@pytest.fixture(scope="module")
def vocabulary(model):
    return load_vocabulary(Path(model))


@pytest.fixture(scope="module")
def count():
    """As many tokens as a real model's vocabulary has for English, about."""
    return lambda text: len(re.findall(r" ?\w{1,4}|[^\w ]| ", text))


def made(maker, task, length, number=0):
    ((_, sample),) = maker.samples([task], length, number)
    return sample


# --- tasks -----------------------------------------------------------------------------------------------------------


def test_the_same_seed_makes_the_same_documents(count):
    def texts(seed, number=0, chosen=tasks.TASKS):
        return dict(Maker(count, seed, paragraphs=PARAGRAPHS).samples(chosen, 700, number))

    once = texts(1)
    assert once == texts(1) and set(once) == set(tasks.TASKS)
    for other in (texts(2), texts(1, 1)):
        assert all(other[family].document != once[family].document for family in once)
    assert texts(1, chosen=["common-words"]) == {"common-words": once["common-words"]}  # whatever else is measured


@pytest.mark.parametrize("length", [500, 1100, 6000])
def test_lengths_are_in_tokens_of_the_model(count, length):
    for task in tasks.TASKS[: None if length < 2000 else -1]:  # there are paragraphs for so many tokens
        n = count(made(Maker(count, paragraphs=PARAGRAPHS), task, length).document)
        assert length - 60 <= n <= length, task


def test_length_counts_the_callers_tokens():
    """Not characters, nor another tokenizer's."""
    by_words = made(Maker(lambda text: len(text.split())), "niah-multikey", 400).document
    assert 380 <= len(by_words.split()) <= 400


def test_needles_are_there_and_found_by_reading(count):
    for number in range(3):
        for task in ("niah-single", "niah-multikey", "niah-multikey-dense", "niah-multivalue", "niah-multiquery", "niah-uuid"):
            sample = made(Maker(count, questions=3), task, 900, number)
            there = re.findall(r"(?:The|One) secret number of (\w+) is (\d{7}|[\da-f]{8}(?:-[\da-f]{4}){3}-[\da-f]{12})\.", sample.document)
            for question in sample.questions:
                names = re.fullmatch(r"What (?:is|are) (?:all )?the secret numbers? of (.*)\?", question.text)[1]
                names = re.split(r", | and ", names)
                assert sorted(question.references) == sorted(value for name, value in there if name in names), task
                assert question.prefix.endswith(("is", "are")) and all(name in question.prefix for name in names)
            n = {"niah-single": 1, "niah-multikey-dense": len(there)}.get(task, 4)
            assert len(there) == n and (task != "niah-multikey-dense" or n > 30)
            assert len(sample.questions) == (3 if "multikey" in task or task == "niah-uuid" else 1)
            assert len(set(question.references for question in sample.questions)) == len(sample.questions)


def test_needles_lie_everywhere(count):
    depths = []
    for number in range(40):
        document = made(Maker(count), "niah-single", 600, number).document
        depths.append(document.index("The secret number of") / len(document))
    assert min(depths) < 0.15 and max(depths) > 0.8 and 0.35 < sum(depths) / 40 < 0.65


def test_variables_by_running_the_text(count):
    for number in range(3):
        sample = made(Maker(count), "variable-tracking", 700, number)
        values = {}
        for name, value in re.findall(r"Set (\w+) to (\w+)\.", sample.document):
            values[name] = values.get(value, value)  # what a variable is set to was set before
        assert len(sample.questions) == 2
        for question in sample.questions:
            (value,) = re.findall(r"value (\d{5})", question.text)
            assert sorted(question.references) == sorted(name for name, v in values.items() if v == value)
            assert len(question.references) == 5


@pytest.mark.parametrize(("length", "often", "seldom"), [(1000, 6, 1), (4200, 30, 3)])
def test_common_words_by_counting(count, length, often, seldom):
    sample = made(Maker(count), "common-words", length)
    numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", sample.document))
    assert list(map(int, numbers)) == list(range(1, len(words) + 1))
    found = Counter(words)
    assert sorted(sample.questions[0].references) == sorted(w for w, n in found.items() if n == often)
    assert set(found.values()) == {often, seldom} and len(sample.questions[0].references) == 10


def test_paragraphs(count):
    asked = set()
    for number in range(5):
        sample = made(Maker(count, paragraphs=PARAGRAPHS), "qa", 500, number)
        (question,) = sample.questions
        (answer,) = question.references
        assert sample.document.count(f"lives {answer}.") == 1 and len(re.findall(r"Paragraph \d+:", sample.document)) > 5
        asked.add(answer)
    assert len(asked) == 5  # each document asks for another one
    with pytest.raises(ValueError, match="too few for documents of 90,000"):
        made(Maker(count, paragraphs=PARAGRAPHS), "qa", 90_000)
    with pytest.raises(ValueError, match="99 questions, fewer than --documents"):
        made(Maker(count, paragraphs=PARAGRAPHS), "qa", 500, 99)


def test_filler_of_the_user(count):
    text = "One morning it rained. Nobody came! Why? " * 9
    sample = made(Maker(count, filler=tasks.sentences(text)), "niah-single", 400)
    rest = re.sub(r"The secret number of \w+ is \d+\. ?", "", sample.document)
    assert set(tasks.sentences(rest)) == {"One morning it rained.", "Nobody came!", "Why?"}


def test_a_length_that_is_too_short_is_refused(count):
    for task in set(tasks.TASKS) - {"niah-single"}:
        with pytest.raises(ValueError, match="--lengths has 20, too short for"):
            made(Maker(count, paragraphs=[Paragraph("Who?", ("me",), "It was me. " * 20)]), task, 20)


def test_choice_of_tasks():
    assert tasks.choose_tasks("qa, ruler") == list(tasks.TASKS) and tasks.choose_tasks("ruler") == list(tasks.TASKS[:-1])
    assert tasks.choose_tasks("") == []
    with pytest.raises(ValueError, match="--tasks has 'needle'; accepted: ruler, niah-single, "):
        tasks.choose_tasks("ruler,needle")


# --- LongBench -------------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(tmp_path):
    """bench(lines, template): a file of LongBench and its prompts."""

    def write(lines, template="Story: {context}\n\nQuestion: {input}\nAnswer:", dataset="qasper", name=None):
        file = tmp_path / f"{name or dataset}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (tmp_path / "prompts.json").write_text(json.dumps({dataset: template, "trec": "{context}\n{input}"}))
        (tmp_path / "lengths.json").write_text(json.dumps({dataset: 32, "trec": 8}))
        return file, longbench.read_prompts(tmp_path / "prompts.json", tmp_path / "lengths.json")

    return write


def line(**changes):
    return {"input": "Who?", "context": "It was {me}. {input}", "answers": ["me", "I"], "all_classes": None, "dataset": "qasper",
            "language": "en", "length": 3, "_id": "0"} | changes  # fmt: skip


def test_longbench_lines(bench):
    (found,) = longbench.read_lines(*bench([line()]))
    assert found.head == "Story: It was {me}. {input}" and found.tail == "\n\nQuestion: Who?\nAnswer:"  # braces are text
    assert (found.dataset, found.answers, found.predict) == ("qasper", ("me", "I"), 32)
    without = {k: v for k, v in line().items() if k != "dataset"}
    assert longbench.read_lines(*bench([without], name="qasper_e"))[0].dataset == "qasper"  # the file's name says it


def test_longbench_prompts_are_cut_in_the_middle(bench, vocabulary):
    context = " ".join(f"word{i}" for i in range(400))
    (found,) = longbench.read_lines(*bench([line(context=context)]))

    def tokenize(text):
        return vocabulary.tokenize(text.encode(), add_bos=False, special=False)

    def detokenize(tokens):
        return vocabulary.detokenize(tokens).decode(errors="replace")

    whole = longbench.sample(found, 10_000, tokenize, detokenize, chat=True)
    assert whole.document + whole.questions[0].text == f"Story: {context}\n\nQuestion: Who?\nAnswer:" and whole.chat
    cut = longbench.sample(found, 301, tokenize, detokenize, chat=True)
    prompt = tokenize(found.head + found.tail)
    assert cut.document + cut.questions[0].text == detokenize(prompt[:150]) + detokenize(prompt[-150:])
    assert cut.questions[0].text == found.tail  # the question stays told apart
    tiny = longbench.sample(found, 8, tokenize, detokenize, chat=False)
    assert tiny.questions[0].text == "" and not tiny.chat


def test_longbench_examples_have_no_chat_template(bench):
    (found,) = longbench.read_lines(*bench([line(dataset="trec", all_classes=["A", "B"], answers=["A"])]))
    sample = longbench.sample(found, 999, lambda text: list(text.encode()), lambda t: bytes(t).decode(), chat=True)
    assert not sample.chat and sample.questions[0].first_line and sample.questions[0].classes == ("A", "B")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "dureader"}, "line 2: dureader is scored by Chinese words"),
        ({"dataset": "mine"}, "line 2: the dataset is 'mine'; accepted: narrativeqa, "),
        ({"dataset": "lcc"}, "--prompts and --max-lengths don't both have lcc"),
        ({"answers": []}, '"answers" must be a list'),
        ({"context": 3}, '"context" and "input" must be texts'),
        ({"dataset": "trec"}, '"all_classes" must name the classes'),
    ],
)
def test_longbench_lines_that_are_refused(bench, changes, message):
    with pytest.raises(ValueError, match=message):
        longbench.read_lines(*bench([line(), line(**changes)]))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(toy):
    return str(toy(chat_template=CHATML, n_ctx_train=4096))


def evaluate(model, output, *args, policies="streaming,snapkv", budgets="20%,50%"):
    command = ["eval", model, "-o", output, "--policies", policies, "--budgets", budgets, "-t", "1", "--questions", "2", *args]
    return subprocess.run([*LAPROX, *map(str, command)], capture_output=True, text=True, timeout=300)


def rows_of(path):
    return {k: {n: v for n, v in row.items() if not n.endswith("_ms")} for k, row in Rows.load(path)}


def test_the_command(model, tmp_path):
    output = tmp_path / "rows.jsonl"
    args = ["--tasks", "niah-single,niah-multikey", "--lengths", "400", "--documents", "1", "--regime", "aware,agnostic"]
    done = evaluate(model, output, *args, "--html", tmp_path / "report.html")
    assert done.returncode == 0, done.stderr
    assert "Question inside the window, 400 tokens" in done.stdout and "snapkv" in done.stdout
    assert "<html" in (tmp_path / "report.html").read_text()
    header = Rows.load(output).header
    assert header["versions"]["llama_cpp_python"] and header["model"]["fingerprint"] and "--tasks" in header["command"]
    rows = rows_of(output)
    assert len(rows) == 3 * (1 + 2 * 2 * 2)
    for (family, length, number, question, regime, policy, budget), row in rows.items():
        assert 0 <= row["score"] <= 1 and length == 400 and number == 0
        assert isinstance(row["answer"], str) and ("kl" in row) == ("agreement" in row) == (policy != "full")

    # Exactly the budget.
    for k, row in rows.items():
        if k[4] == "aware":
            seen, left_over = divmod(rows[key(*k[:4])]["entries"], PAIRS)
            assert left_over == 0 and row["entries"] == _core.budget_entries(k[6], seen, PAIRS)

    # The same again, bit for bit, also when the second half was measured by a second run that found a broken line.
    lines = output.read_bytes().splitlines(keepends=True)
    half = tmp_path / "half.jsonl"
    half.write_bytes(b"".join(lines[:10]) + lines[10][:30])
    assert evaluate(model, half, *args).returncode == 0
    assert rows_of(half) == rows

    # More of it goes into the same file; other settings don't.
    assert evaluate(model, half, *args, budgets="20%,50%,80%").returncode == 0
    assert len(rows_of(half)) == len(rows) + 3 * 2 * 2
    refused = evaluate(model, half, *args, "--seed", "2")
    assert refused.returncode == 1 and "its settings.seed is 1, now it is 2" in refused.stderr


def test_an_interrupted_run_goes_on(model, tmp_path):
    output = tmp_path / "rows.jsonl"
    command = [
        *LAPROX,
        "eval",
        model,
        "-o",
        str(output),
        "--tasks",
        "niah-multikey,niah-multiquery",
        "--lengths",
        "500,900",
        "--policies",
        "snapkv",
        "-t",
        "1",
        "--documents",
        "60",
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and (not output.exists() or output.read_bytes().count(b"\n") < 5):
        time.sleep(0.05)
    while process.poll() is None:  # Python loses one that comes while a callback or a destructor runs
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=2)
    said = process.stderr.read()
    assert process.returncode == 130 and "the same command goes on with it" in said
    assert len(Rows.load(output)) >= 4


@pytest.mark.parametrize(("dataset", "template"), [("qasper", CHATML), ("qasper", None), ("trec", CHATML)])
def test_longbench_by_the_command(toy, tmp_path, bench, dataset, template):
    """With and without a chat template, which the model or the dataset may not have."""
    model = str(toy(chat_template=template, n_ctx_train=4096))
    more = {"dataset": dataset, "all_classes": ["me", "I"]}
    file, _ = bench(
        [line(context="It was me. " * 60, **more), line(context="It was me, too. " * 99, **more)], dataset="qasper", name=dataset
    )
    args = [
        "--longbench",
        file,
        "--prompts",
        tmp_path / "prompts.json",
        "--max-lengths",
        tmp_path / "lengths.json",
        "--max-prompt",
        "300",
    ]
    done = evaluate(model, tmp_path / "rows.jsonl", *args, "--documents", "0", budgets="20%")
    assert done.returncode == 0, done.stderr
    rows = rows_of(tmp_path / "rows.jsonl")
    assert len(rows) == 2 * 3 and {k[0] for k in rows} == {f"longbench {dataset}"}
    assert all(isinstance(row["answer"], str) for row in rows.values())
    full = [row["entries"] // PAIRS for k, row in rows.items() if k[5] == "full"]
    around = 60 if template and dataset != "trec" else 4  # the template; or a first token, and spaces that the tokenizer adds
    assert all(300 <= n <= 300 + around for n in full) and (around == 4 or min(full) > 304)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "nothing to measure: --tasks takes ruler, niah-single, "),
        (["--tasks", "needle"], "--tasks has 'needle'; accepted: "),
        (["--tasks", "qa"], "needs --paragraphs"),
        (["--tasks", "niah-single", "--lengths", "1k"], "--lengths is '1k'; accepted: numbers of tokens"),
        (["--tasks", "niah-single", "--lengths", "9000"], "the model was trained for 4,096: shorter --lengths"),
        (["--tasks", "niah-single", "--lengths", "30"], "--lengths has 30, too short for"),
        (["--tasks", "niah-single", "--policies", "laprox,best"], '--policies: policy is "best"; accepted: '),
        (["--tasks", "niah-single", "--policies", "full"], "--policies has 'full'"),
        (["--tasks", "niah-single", "--policies", "lukv"], "lukv does not run on this model: "),
        (["--tasks", "niah-single", "--budgets", "5%,lots"], "lots"),
        (["--tasks", "niah-single", "--regime", "none"], "--regime has 'none'; accepted: aware, agnostic, follow-up"),
        (["--tasks", "niah-single", "--html", "/nowhere/at/all.html"], "/nowhere/at/all.html can't be written: "),
        (["--longbench", "x.jsonl"], "--longbench needs --prompts and --max-lengths"),
    ],
)
def test_what_is_wrong_is_said_at_once(model, tmp_path, monkeypatch, capsys, args, message):
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["laprox", "eval", model, "-o", str(output), "-t", "1", *args])
    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr()
    assert left.value.code == 1 and said.out == "" and not output.exists()
    assert said.err.startswith("laprox: ") and said.err.count("\n") == 1 and message in said.err


# --- what a score means ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gated(model, tmp_path_factory):
    """The model with random gates beside it."""
    path = tmp_path_factory.mktemp("gated") / "model.gguf"
    path.symlink_to(model)
    sidecar.write(path.with_suffix(".kv-gates.gguf"), gates_factory.random_gates(3, 256, 2), "f16")
    return str(path)


@pytest.fixture(scope="module")
def asked(gated, tmp_path_factory):
    """Two questions on the full cache and under two policies: their rows."""
    output = tmp_path_factory.mktemp("asked") / "rows.jsonl"
    for name, share in (("laprox", "50%"), ("retention", "30%")):
        done = evaluate(gated, output, "--tasks", "niah-multikey", "--lengths", "700", "--documents", "1", policies=name, budgets=share)
        assert done.returncode == 0, done.stderr
    return rows_of(output)


POLICIES = [("full", ""), ("laprox", "50%"), ("retention", "30%")]


def llm_and_prompts(gated, policy, budget):
    """What a user has who asks the same: a Llama; the document's tokens; the questions, and what follows the document."""
    kv = {"kv_budget": "100%"} if policy == "full" else {"kv_policy": policy, "kv_budget": budget, "kv_min_tokens": 0}
    llm = Llama(gated, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, **kv)
    maker = Maker(lambda text: len(llm.tokenize(text.encode(), add_bos=False, special=False)), questions=2)
    (job,) = task_jobs(llm._model, maker, ["niah-multikey"], [700], 1)
    return llm, job.opening, [(prompt.question, list(prompt.tokens)) for prompt in job.prompts]


def cell(i, policy, budget):
    return key("niah-multikey", 700, 0, i, *(("aware", policy, budget) if policy != "full" else ()))


@pytest.mark.parametrize(("policy", "budget"), POLICIES)
def test_an_answer_is_what_a_user_would_be_told(gated, asked, policy, budget):
    """By greedy decoding through create_completion(); the score is how many references it names."""
    llm, document, prompts = llm_and_prompts(gated, policy, budget)
    for i, (question, rest) in enumerate(prompts):
        llm.reset()
        # In the same batches, and its beginning only: sooner or later random weights have a near tie, which roundings decide.
        llm.eval(document)
        reply = llm.create_completion(document + rest, max_tokens=16, temperature=0.0, repeat_penalty=1.0)
        row = asked[cell(i, policy, budget)]
        told = row["answer"].replace("\ufffd", "")  # create_completion() leaves out bytes that are no text
        assert told.startswith(reply["choices"][0]["text"]) and len(reply["choices"][0]["text"]) > 10
        assert row["score"] == recall(row["answer"], question.references)


@pytest.mark.parametrize(("policy", "budget"), POLICIES[1:])
def test_kl_is_along_the_full_caches_answer(gated, asked, policy, budget):
    """From two contexts that are led along it token by token."""
    whole, document, prompts = llm_and_prompts(gated, "full", "")
    part, _, _ = llm_and_prompts(gated, policy, budget)
    for i, (question, rest) in enumerate(prompts):
        for llm in (whole, part):
            llm.reset()
            llm.eval(document)
            llm.eval(rest)
        same = log_softmax(last_logits(part))
        part.kv.compress()
        kl, agree, full = [], [], log_softmax(last_logits(whole))
        for _ in range(min(question.predict, ALONG) + 1):  # and what comes after it
            kl.append(kl_divergence(full, same))
            agree.append(full.argmax() == same.argmax())
            token = int(full.argmax())
            if token == 2:
                break
            whole.eval([token])
            part.eval([token])
            full, same = log_softmax(last_logits(whole)), log_softmax(last_logits(part))
        row = asked[cell(i, policy, budget)]
        assert row["kl"] == pytest.approx(np.mean(kl), abs=1e-5) and row["kl"] > 0.01
        assert row["agreement"] == pytest.approx(np.mean(agree), abs=1e-6)


def test_a_model_that_reads_finds_needles(real_model, tmp_path):
    """And doesn't, where the beginning of the document is dropped."""
    args = ["--tasks", "niah-single", "--lengths", "300", "--documents", "2", "--seed", "2"]
    done = evaluate(real_model("smollm2-135m"), tmp_path / "rows.jsonl", *args, policies="streaming", budgets="20%")
    assert done.returncode == 0, done.stderr
    found = {policy: [row["score"] for k, row in rows_of(tmp_path / "rows.jsonl").items() if k[5] == policy] for policy in
             ("full", "streaming")}  # fmt: skip
    assert found == {"full": [1, 1], "streaming": [0, 0]}
