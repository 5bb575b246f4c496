"""`laprox compare`: equal bytes, the same numbers each time, nothing lost, a verdict that follows from the table."""

import ctypes
import json
import random
import re

import llama_cpp  # noqa: E402  (after laprox, which says where its libraries are)
import numpy as np
import pytest
import typer
from gguf_factory import CHATML

from laprox import KVConfig, Llama
from laprox.chat import log
from laprox.chat.loading import load_vocabulary, load_weights
from laprox.chat.tokens import text_of, tokens_of
from laprox.cli import compare as command
from laprox.cli.options import CACHE_TYPES
from laprox.eval import english, facts, jobs
from laprox.eval.comparison import Entry, entries, verdict
from laprox.eval.contenders import ROOM, Budget, check_model, make_contenders
from laprox.eval.jobs import Facts, fact_job
from laprox.eval.means import Mean
from laprox.eval.metrics import log_softmax
from laprox.eval.reader import SHORTER, Reader, Setting, made_with
from laprox.eval.rows import Rows
from laprox.eval.summary import Summary
from laprox.eval.trials import Trials

FAST = {"n_questions": 3, "n_continue": 24, "n_predict": 6, "threads": 1, "budgets": "20%,40%", "policies": "snapkv,laprox@q8_0"}
SHAPE = {"chat_template": CHATML, "n_ctx_train": 4096, "n_layer": 2, "n_embd": 128, "n_head": 4, "head_dim": 64, "n_ff": 128}


@pytest.fixture(autouse=True, scope="module")
def short_documents():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "LEAST", 256)
        yield


@pytest.fixture(scope="module")
def model(toy):
    return toy(**SHAPE)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for i in range(2):
        (folder / f"{i}.txt").write_text(prose(i, 20))
    return [folder / "0.txt", folder / "1.txt"]


def prose(seed, n_sentences):
    rng = random.Random(seed)
    return " ".join(english.sentence(rng) for _ in range(n_sentences))


def context(model, kv=None, **kwargs):
    return Llama(str(model), kv=kv, flash_attn=True, n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False, **kwargs)


def measured(path):
    """Rows without what is measured by the clock."""
    clock = ("read_ms", "score_ms", "rest_ms", "read_s", "compress_s", "decode_tps", "rss")
    return {key: {name: value for name, value in row.items() if name not in clock} for key, row in Rows.load(path)}


def of_the_first(rows):
    """Rows of the first document: how many others there are must not matter."""
    return {key: row for key, row in rows.items() if key[2] == 0}


# --- facts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["One. Two went by! (Three?) Four.\n\nFive\n" * 60, "这是一个句子。" * 200, "no sentence at all " * 100]
)
def test_facts_are_put_between(text):
    changed, questions = facts.insert_facts(text, 5, seed=3)
    assert (changed, [q.text for q in questions]) == (facts.insert_facts(text, 5, seed=3)[0], [q.text for q in questions])
    assert facts.insert_facts(text, 5, seed=4)[0] != changed
    told = {s for s in re.findall(r"[A-Z][^.。!?]*\.", changed)} - set(re.findall(r"[A-Z][^.。!?]*\.", text))
    assert len(told) == 5 * facts.PER_QUESTION
    rest = changed
    for sentence in told:
        assert rest.count(sentence + " ") == 1
        rest = rest.replace(sentence + " ", "")
    assert rest == text

    for i, question in enumerate(questions):
        assert abs(question.depth - (i + 0.5) / 5) < 0.15
        fact = question.fact
        assert fact.sentence in told and changed[round(question.depth * len(changed)) :].startswith(fact.sentence)
        assert question.text.rstrip("?") not in changed and fact.name in question.text and fact.value not in question.text
        assert changed.count(fact.value) == 1 and question.answered_by(f"It is {fact.value}.")
        # It can be mistaken for the same thing about a namesake, and for another thing about the same person.
        first, last = fact.name.split()
        before, after = (re.escape(part) for part in fact.attribute.told.replace("{name}", "|").split("|"))
        same = re.compile(f"{before}(.+?){after.replace(re.escape('{value}'), '(.+)')}")
        alike = [found[1] for s in told if (found := same.fullmatch(s)) and found[1] != fact.name]
        assert any(len({first, last} & set(name.split())) == 1 for name in alike)
        assert sum(fact.name in s for s in told) == 2


def test_names_and_values_that_the_document_has_are_not_used():
    text = "A sentence. " * 300
    _, questions = facts.insert_facts(text, 5, seed=3)
    there = f"{questions[0].fact.name}, {questions[1].value}."
    changed, questions = facts.insert_facts(text + there, 5, seed=3)
    assert all(words not in q.fact.sentence for q in questions for words in there.rstrip(".").split(", "))
    assert changed.endswith(there) and changed.count(there) == 1


def test_a_hundred_questions_have_a_hundred_answers():
    _, questions = facts.insert_facts("A sentence. " * 300, 100, seed=1)
    assert len({q.value for q in questions}) == len({q.text for q in questions}) == 100
    assert not any(p.answered_by(q.value) for p in questions for q in questions if p is not q)


def test_a_document_that_has_all_names():
    every = " ".join([*english._FIRST_NAMES, *english._LAST_NAMES])
    with pytest.raises(ValueError, match="nearly all names"):
        facts.insert_facts(f"A sentence. {every}. " * 9, 3, seed=1)


def test_a_document_of_one_word():
    with pytest.raises(ValueError, match="one word"):
        facts.insert_facts("x" * 5000, 3, seed=1)


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_budgets():
    assert Budget("10%").bytes(3000, 100.0) == 100 * (300 + ROOM)
    assert Budget("500").bytes(3000, 100.0) == 100 * (500 + ROOM)
    assert Budget("1MiB").bytes(30000, 100.0) == 2**20
    for text, words in (("100%", "all of x"), ("2%", "from 3% on"), ("1KiB", "0 of the"), ("3000", "all of x")):
        with pytest.raises(ValueError, match=f"--budgets {text} .*{words}"):
            Budget(text).check("x", 3000, 100.0)
    with pytest.raises(ValueError, match="5 apples"):
        Budget("5 apples")


def test_contenders():
    names = [c.name for c in make_contenders(["laprox", "keydiff:global", "laprox", "expected@q8_0"])]
    assert names == ["full", "q8_0", "q4_0", SHORTER, "laprox", "keydiff:global", "expected@q8_0"]
    assert make_contenders(["expected@q8_0"])[-1].context == make_contenders(["expected@recall@q8_0"])[-1].context == ("expected", "q8_0")
    assert make_contenders(["laprox@recall"])[-1].context == make_contenders(["snapkv"])[-1].context
    for name, words in (("nonesuch", "nonesuch"), ("laprox@q5", "@recall, then one of @q8_0"), ("laprox@repeat", "@recall, then one of @q8_0"), ("full", "always there"), ("off", "always")):
        with pytest.raises(ValueError, match=words):
            make_contenders([name])


@pytest.mark.parametrize("cache_type", ["f16", "q8_0", "q4_0"])
def test_stock_bytes_are_llama_cpps_own(model, cache_type):
    lines = []
    keep = llama_cpp.llama_log_callback(lambda level, text, data: lines.append(text.decode()))
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    try:
        ggml = CACHE_TYPES[cache_type].ggml
        context(model, type_k=ggml, type_v=ggml).close()
    finally:
        log.record(verbose=False)
    (size,) = re.findall(r"KV buffer size = *([\d.]+) MiB", "".join(lines))
    weights = load_weights(model, use_extra_bufts=False)
    found, refused = check_model(model, weights, make_contenders(["laprox"]), KVConfig(), CACHE_TYPES)
    assert not refused and found[cache_type] * 2048 / 2**20 == pytest.approx(float(size), abs=0.006)


# --- the reader ------------------------------------------------------------------------------------------------------


def forced(llm, tokens):
    """The logits after each of them but the last."""
    logits = []
    for token in tokens[:-1]:
        llm.eval([token])
        row = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
        logits.append(np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy())
    return logits


def step_by_step(model, *parts):
    """Log-probabilities of the tokens of the last part, in a context that did nothing before."""
    llm = context(model)
    for part in parts[:-1]:
        llm.eval(part)
    row = llama_cpp.llama_get_logits_ith(llm._ctx.ctx, -1)
    first = np.ctypeslib.as_array(row, shape=(llm.n_vocab(),)).copy()
    return log_softmax([first, *forced(llm, parts[-1])])


def test_reader_against_whole_evaluations(model, rng):
    """What a trial sees is what a context that does nothing else would compute."""
    document, question, answer = (rng.integers(262, 512, n).tolist() for n in (700, 20, 12))
    expected = step_by_step(model, document, question, answer)
    stock = Reader(context(model))
    stock.read(document)
    for _ in range(2):  # from a copy, too
        now = np.array(list(stock.force(stock.start(question), answer)))
        np.testing.assert_array_equal(now, expected)
    assert stock.greedy(stock.start(question), 1) == [int(expected[0].argmax())]

    for regime in ("aware", "agnostic"):
        kv = KVConfig(policy="snapkv", budget="20%", min_tokens=0)
        by_hand = context(model, kv)
        by_hand.eval(document)
        if regime == "agnostic":
            by_hand.kv.compress()
        by_hand.eval(question)
        if regime == "aware":
            by_hand.kv.compress()
        held = by_hand.kv.stats()
        logits = forced(by_hand, answer)
        reader = Reader(context(model, KVConfig(min_tokens=0)), keep_asked=regime == "aware")
        reader.read(document)
        for _ in range(2):
            start = reader.start(question, Setting("snapkv", "20%", regime))
            assert start.cost.kv_bytes == held.kv_bytes and start.cost.entries_full == (700 + 20 * (regime == "aware")) * 4
            now = np.array(list(reader.force(start, answer)))[1:]
            np.testing.assert_array_equal(now, log_softmax(logits))
        assert reader.decoding.tokens == 2 * 11 and reader.decoding.seconds > 0 and reader.state_bytes > 0


def test_the_sums_of_expected_are_in_a_state(model, rng):
    """A second trial, from a copy of the cache, scores as the first one did."""
    assert (made_with("expected"), made_with("expected:ada"), made_with("retention"), made_with("lukv")) == (
        "expected", "expected", "retention", "laprox",
    )  # fmt: skip
    document, question = rng.integers(262, 512, 300).tolist(), rng.integers(262, 512, 10).tolist()
    reader = Reader(context(model, KVConfig(policy="expected", min_tokens=0)))
    reader.read(document)
    held = []
    for _ in range(2):
        reader.start(question, Setting("expected", "20%"))
        held.append([reader.llm.kv.positions(0, 0).tolist(), reader.llm.kv.positions(1, 1).tolist()])
    assert held[0] == held[1]


def test_fidelity(model, texts):
    """KL, agreement and perplexity from a context that evaluates everything at once; a shorter one sees the end only."""
    vocabulary, text = load_vocabulary(model), texts[0].read_text()
    job = fact_job(vocabulary, text, Facts(3, 24), "x", 0)
    *asked, last = job.prompts
    back = text_of(vocabulary, last.told)
    at = text.index(back)
    assert back.startswith(" ") and at > len(text) - 400
    body, questions = facts.insert_facts(text[:at], 3, seed=1)
    assert job.opening[job.head :] == tokens_of(vocabulary, body)
    prefix, first = (vocabulary.detokenize(t, special=True).decode() for t in (job.opening[: job.head], asked[0].tokens))
    assert prefix.replace(" ", "") == "<|im_start|>user\n"
    assert first.replace(" ", "") == f"\n\n{questions[0].text}<|im_end|>\n<|im_start|>assistant\n".replace(" ", "")
    assert [p.question.references for p in asked] == [(q.value,) for q in questions]

    assert job.context(300) == 300 + max(24, max(len(p.tokens) for p in asked) + 48)

    full = step_by_step(model, job.opening, last.told)[1:]
    cut = step_by_step(model, [*job.opening[: job.head], *job.opening[-180:]], last.told)[1:]
    compared = {}
    reader = Reader(context(model))
    reader.read(job.opening)
    row = Trials(reader, job.prompts, str, 0, compared).measure(3, Setting(None, ""))
    np.testing.assert_array_equal(compared[3, ""], full.astype(np.float32))
    assert max(row["kl"]) < 1e-6 and all(row["agreement"])
    nll = -full[np.arange(23), last.told[1:]]
    np.testing.assert_allclose(row["nll"], nll, rtol=1e-12)

    reader.read(job.end(180 + job.head))
    row = Trials(reader, job.prompts, str, 0, compared).measure(3, Setting(None, ""))
    np.testing.assert_allclose(row["kl"], (np.exp(full) * (full - cut)).sum(1), atol=1e-5)
    assert row["agreement"] == (full.argmax(1) == cut.argmax(1)).tolist() and row["read"] == 180 + job.head


def test_what_a_compressed_cache_is_compared_with_is_there(model, rng):
    """Or everything would be compared with itself."""
    reader = Reader(context(model, KVConfig(min_tokens=0)))
    reader.read(rng.integers(262, 512, 300).tolist())
    job = fact_job(load_vocabulary(model), prose(1, 20), Facts(3, 24), "x", 0)
    with pytest.raises(ValueError, match="the full cache comes first"):
        Trials(reader, job.prompts, str, 0).measure(3, Setting("snapkv", "20%", "agnostic"))


def test_facts_are_answered_by_a_model_that_reads(real_model):
    """Plain English, so that a small instruct model answers from the full cache; and hardly, where most of it was dropped."""
    path = real_model("qwen2.5-coder-0.5b")
    vocabulary = load_vocabulary(path)
    job = fact_job(vocabulary, prose(1, 26), Facts(4, 16, 24), "x", 0)
    reader = Reader(context(path, KVConfig(min_tokens=0)))
    reader.read(job.opening)
    trials = Trials(reader, job.prompts, lambda tokens: text_of(vocabulary, tokens), 0)
    kl, right, rows = {}, {}, {}
    for policy, budget in ((None, ""), ("laprox", "50%"), ("streaming", "10%")):
        kl[policy] = np.mean(trials.measure(4, Setting(policy, budget, "agnostic" if policy else "aware"))["kl"])
        rows[policy] = [trials.measure(i, Setting(policy, budget)) for i in range(4)]
        right[policy] = sum(row["score"] for row in rows[policy])
    assert right[None] >= 3, rows
    assert right["laprox"] > right["streaming"] < 2, rows
    assert kl[None] < 1e-6 < kl["laprox"] < kl["streaming"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(model, texts, tmp_path_factory):
    """A comparison that ran through: its .jsonl."""
    output = tmp_path_factory.mktemp("done") / "report.html"
    command.compare(model, texts, output=output, **FAST)
    return output.with_suffix(".jsonl")


def test_equal_bytes(done):
    rows = Rows.load(done)
    assert len(rows) == 2 * (3 + 2 * 3) * (3 + 1)
    for (family, length, number, i, regime, name, budget), row in rows:
        assert "why_not" not in row, row
        if budget and i == 3:  # the document's end; with a question, there is more to hold
            assert abs(row["bytes"] / row["target"] - 1) < 0.05, (name, budget)
            if name == "laprox@q8_0":
                assert row["entries"] > 1.5 * rows[family, length, number, i, regime, "snapkv", budget]["entries"]
    table = entries(Summary(rows), make_contenders(FAST["policies"].split(",")), ["20%", "40%"], "aware")
    assert [e.label for e in table[:5]] == ["full", "q8_0", "q4_0", "shorter-context at 20%", "snapkv at 20%"]
    full, q8, q4 = table[:3]
    assert full.kl.mean == pytest.approx(0, abs=1e-6) and (full.agreement.mean, full.share, full.decode) == (1, 1, 1)
    assert q8.share == pytest.approx(17 / 32) and q4.share == pytest.approx(9 / 32)
    assert 0 < q8.kl.mean < q4.kl.mean and not any(e.unequal for e in table)
    assert full.resident > 1e6 and full.right.n == 6 and full.right.clusters == 2


def test_the_report(done, texts):
    page = done.with_suffix(".html").read_text()
    for words in ("laprox@q8_0", SHORTER, "sha256", "Look for yourself", "0.txt, 1.txt", "No verdict"):
        assert words in page, words
    assert page.count("<svg") == 4


def test_the_report_in_a_browser(done, browser):
    """Without a network, nothing is missing, and nothing is wider than the page."""
    for width, scheme in ((1280, "light"), (400, "dark")):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if request.url.startswith("http") else None)
        page.goto(done.with_suffix(".html").as_uri())
        assert said == [] and page.evaluate("document.documentElement.scrollWidth") == width
        assert page.get_by_text("laprox@q8_0").count() >= 4
        context.close()


def test_the_same_again(done, model, texts, tmp_path):
    command.compare(model, texts[:1], output=tmp_path / "again.html", **FAST)
    assert measured(tmp_path / "again.jsonl") == of_the_first(measured(done))


def test_interrupted(done, model, texts, tmp_path, monkeypatch):
    """Ctrl-C within a row, then a line cut off by a crash: what is there stays, and the end is the same."""
    output, results = tmp_path / "report.html", tmp_path / "report.jsonl"
    measure, calls = Trials.measure, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return measure(self, *args, **kwargs)

    monkeypatch.setattr(Trials, "measure", interrupted)
    with pytest.raises(typer.Exit) as stopped:
        command.compare(model, texts[:1], output=output, **FAST)
    assert stopped.value.exit_code == 130 and not output.exists() and len(Rows.load(results)) == 9

    results.write_bytes(results.read_bytes()[:-10])
    command.compare(model, texts[:1], output=output, **FAST)
    # Once more what was cut off, and what the others are compared with.
    assert len(calls) == 10 + 1 + len(Rows.load(results)) - 8 and measured(results) == of_the_first(measured(done)) and output.exists()
    command.compare(model, texts[:1], output=output, **FAST)
    assert len(calls) == 10 + 1 + len(Rows.load(results)) - 8  # nothing is left to do
    with pytest.raises(ValueError, match="settings.seed is 1, now it is 2"):
        command.compare(model, texts[:1], output=output, **FAST, seed=2)


def test_before_the_question(model, texts, tmp_path, capsys):
    fast = {**FAST, "budgets": "25%", "policies": "snapkv"}
    command.compare(model, texts[:1], output=tmp_path / "r.html", regime="agnostic", n_tokens=600, **fast)
    rows = measured(tmp_path / "r.jsonl")
    assert "answer" in rows["facts", 0, 0, 0, "agnostic", "snapkv", "25%"] and rows["facts", 0, 0, 3, "", "full", ""]["read"] < 1200
    out = capsys.readouterr().out
    assert "at 25%" in out and "snapkv" in out and max(len(line.rstrip()) for line in out.splitlines()[:7]) <= 80


def test_what_a_question_brings_back_is_a_contender(model, texts, tmp_path):
    """The same as POLICY until somebody asks; then the archive has its say, in the same bytes."""
    fast = {**FAST, "budgets": "25%", "policies": "snapkv,snapkv@recall,snapkv@recall@q8_0"}
    command.compare(model, texts[:1], output=tmp_path / "r.html", regime="agnostic", n_tokens=600, **fast)
    rows = measured(tmp_path / "r.jsonl")
    plain, recalled, smaller = ([rows["facts", 0, 0, i, "agnostic", name, "25%"] for i in range(4)] for name in fast["policies"].split(","))
    assert plain[3] == recalled[3]  # nobody asked
    assert [row["answer"] for row in plain[:3]] != [row["answer"] for row in recalled[:3]]
    assert [row["bytes"] for row in plain] == [row["bytes"] for row in recalled]
    assert smaller[0]["entries"] > 1.3 * recalled[0]["entries"] and all("answer" in row for row in smaller[:3])
    page = (tmp_path / "r.html").read_text()
    assert "snapkv@recall" in page and "is not counted above" in page


def test_what_is_refused(model, texts, toy, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too short. " * 20)
    output = tmp_path / "r.html"

    def refused(words, model=model, texts=texts, **settings):
        with pytest.raises(ValueError, match=words):
            command.compare(model, texts, **{**FAST, "output": output, **settings})
        assert list(tmp_path.glob("r.*")) == []

    refused("short.txt is .* tokens, too short to compress: accepted are 280", texts=[texts[0], short])
    refused("--tokens 200 cuts it", n_tokens=200)
    refused("--questions 50 puts .* tokens of facts into 0.txt", n_questions=50)
    refused("missing.txt: No such file", texts=[tmp_path / "missing.txt"])
    refused("can't be compressed, so there is nothing to compare: .*ALiBi", model=toy("alibi", chat_template=CHATML))
    refused("can't be compressed, so there is nothing to compare", model=toy("embedder", chat_template=CHATML))
    refused("nowhere.*can't be written", output=tmp_path / "nowhere" / "r.html")
    refused("--regime is 'none'; accepted: aware, agnostic", regime="none")
    refused("is an .html file", output=tmp_path / "r.txt")
    refused('--policies: policy is "nonesuch"; accepted', policies="laprox,nonesuch")
    refused("--policies is empty", policies=" , ")
    refused('--budgets: budget is "5 apples" .unknown unit "apples".; accepted', budgets="5 apples")
    refused("--budgets 1% is .* tokens of 0.txt, of which 36 are always kept", budgets="10%,1%")
    refused("--policies retention: .*gates", policies="retention")
    refused("--policies has 'snapkv@recall', which is for later questions; accepted with it: --regime agnostic", policies="snapkv@recall")
    refused("--policies has 'snapkv@refit'; accepted after a policy: @recall, then one of @q8_0, @q4_0", policies="snapkv@refit", regime="agnostic")
    results = tmp_path / "x.jsonl"
    results.write_text("not ours\n")
    refused("no results file", output=tmp_path / "x.html")


def test_longer_than_trained(model, texts, capsys):
    job = fact_job(load_vocabulary(model), texts[0].read_text(), Facts(3, 24), "0.txt", 0)
    command._warn_if_long([job], 4096)
    assert capsys.readouterr().err == ""
    command._warn_if_long([job], 256)
    assert "but the model was trained for 256" in capsys.readouterr().err


# --- the verdict -----------------------------------------------------------------------------------------------------


def entry(name, budget="", kept=0, known=10, n=12, share=None, kl=0.1):
    right, divergence, same = Mean(kept / n, 0.1, n, 1), Mean(kl, 0, 9, 1), Mean(0.93, 0, 9, 1)
    return Entry(name, budget, allocated=1, share=share, right=right, kept=kept, known=known, kl=divergence, agreement=same)


@pytest.mark.parametrize(
    "kept, words",
    [
        ((10, 10, 10), "^5%, the smallest budget tried, is enough here: laprox keeps 10 of the 10 .* 93% .* same bytes keeps 1"),
        ((5, 9, 10), r"^Don't compress this model below 10%: there laprox keeps 9 .* but at 5% no more than 5 are left"),
        ((9, 5, 10), "^Don't compress this model below 20%: .*at 10% no more than 5"),
        ((9, 10, 8), "^Don't compress this model to 20% or less: there the best, laprox, keeps 8 .*; a q4_0 cache, .*keeps 9"),
        ((0, 0, 0), "^Don't compress this model to 20% or less: there the best, a shorter context, keeps 1"),
    ],
)
def test_verdicts(kept, words):
    budgets = ["5%", "10%", "20%"]
    table = [entry("full", kept=10), entry("q8_0", kept=10, share=0.53), entry("q4_0", kept=9, share=0.28)]
    for budget, n in zip(budgets, kept):
        table += [entry(SHORTER, budget, 1), entry("laprox", budget, n), entry("snapkv", budget, n, kl=0.2)]
        table += [Entry("lukv", budget, why_not="no table")]
    assert re.search(words, verdict(table, budgets)), verdict(table, budgets)


def test_no_verdict():
    assert "answers only 2 of 12" in verdict([entry("full", kept=2, known=2)], ["5%"])
    assert "not measured" in verdict([], ["5%"])


def test_unequal_bytes_are_said():
    e = Entry("laprox", "5%", allocated=120, target=100)
    assert e.unequal.startswith("laprox at 5% takes 20% more") and not Entry("laprox", "5%", allocated=96, target=100).unequal
    assert json.dumps(e.unequal)
