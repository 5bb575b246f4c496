"""What a trial of `laprox eval` is, against contexts driven by hand: follow-ups, a shorter context, KL along an answer."""

from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf_factory import CHATML

from laprox import KVConfig, LaproxError, Llama
from laprox.chat.conversation import Conversation
from laprox.chat.loading import load_vocabulary
from laprox.chat.tokens import last_logits
from laprox.eval.metrics import kl_divergence, log_softmax
from laprox.eval.reader import SHORTER, Reader, Setting, Turn
from laprox.eval.tasks import Question
from laprox.eval.trials import Prompt, Trials
from laprox.read.probe import look, repeating

FIRST = Turn(tuple(range(300, 320)), 5)


@pytest.fixture(scope="module")
def model(toy):
    return str(toy(n_layer=2, chat_template=CHATML))


@pytest.fixture
def document(rng):
    return rng.integers(262, 512, 700).tolist()


@pytest.fixture
def question(rng):
    return rng.integers(262, 512, 20).tolist()


def context(model, **kv):
    return Llama(model, kv=KVConfig(min_tokens=0, **kv), n_ctx=2048, n_threads=1, n_threads_batch=1, verbose=False)


def read(model, document):
    reader = Reader(context(model))
    reader.read(document, head=3)
    return reader


def next_token(llm):
    return int(last_logits(llm).argmax())


def answer_greedily(llm, n):
    """n tokens, all of them evaluated. (A model of random weights ends no answer.)"""
    tokens = []
    for _ in range(n):
        tokens.append(next_token(llm))
        assert not llama_cpp.llama_vocab_is_eog(llm._model.vocab, tokens[-1])
        llm.eval(tokens[-1:])
    return tokens


def test_a_follow_up_comes_after_another_question(model, document, question):
    by_hand = context(model, policy="snapkv", budget="10%")
    by_hand.eval(document)
    by_hand.eval(list(FIRST.tokens))
    by_hand.kv.compress()
    held = by_hand.kv.positions(1, 0).tolist()
    answer_greedily(by_hand, FIRST.predict)
    by_hand.eval(question)
    expected = log_softmax(last_logits(by_hand))

    reader = read(model, document)
    setting = Setting("snapkv", "10%", "follow-up")
    for _ in range(2):  # from a copy, too
        start = reader.start(question, setting, FIRST)
        np.testing.assert_array_equal(start.logprobs, expected)
        now = reader.llm.kv.positions(1, 0).tolist()
        assert now[: len(held)] == held and now[len(held) :] == list(range(720, 720 + FIRST.predict + 20))
    assert start.cost.entries_held == round(0.1 * 720 * 4)

    whole = reader.start(question, Setting(None, "", "follow-up"), FIRST)
    assert whole.cost.entries_held == whole.cost.entries_full
    assert not np.array_equal(whole.logprobs, expected)
    stock = context(model)
    stock.eval(document)
    stock.eval(list(FIRST.tokens))
    answer_greedily(stock, FIRST.predict)
    stock.eval(question)
    np.testing.assert_array_equal(whole.logprobs, log_softmax(last_logits(stock)))


def test_a_first_question_belongs_to_follow_ups(model, document, question):
    reader = read(model, document)
    with pytest.raises(ValueError, match="'follow-up', which needs a first question"):
        reader.start(question, Setting("snapkv", "10%", "follow-up"))
    with pytest.raises(ValueError, match="'aware', which has no first question"):
        reader.start(question, Setting("snapkv", "10%", "aware"), FIRST)


@pytest.mark.parametrize("regime", ["aware", "agnostic", "follow-up"])
def test_a_shorter_context_is_the_end_of_the_document(model, document, question, regime):
    by_hand = context(model)
    by_hand.eval([*document[:3], *document[-67:]])  # the head is always there, and counts
    first = FIRST if regime == "follow-up" else None
    if first:
        by_hand.eval(list(first.tokens))
        answer_greedily(by_hand, first.predict)
    by_hand.eval(question)
    reader = read(model, document)
    for _ in range(2):
        start = reader.start(question, Setting(SHORTER, "10%", regime), first)
        np.testing.assert_array_equal(start.logprobs, log_softmax(last_logits(by_hand)))
        assert start.cost.entries_held == 70 * 4
    with pytest.raises(ValueError, match="shorter-context takes a share or a number of tokens as budget, not 1MiB"):
        reader.start(question, Setting(SHORTER, "1MiB"))


def test_kl_is_along_the_full_caches_answer(model, document, question):
    """And the answer is what greedy decoding gives, although both are made in one go."""
    asked = Question("books", "?", ("nothing",), "any", predict=8)
    reader = read(model, document)
    trials = Trials(reader, [Prompt(asked, question)], lambda tokens: " ".join(map(str, tokens)))
    full = reader.greedy(reader.start(question), 8)
    along = log_softmax([*reader.force(reader.start(question), [*full, -1])])
    assert trials.whole(0)["answer"] == " ".join(map(str, full))
    different = 0
    for budget in ("6%", "10%", "30%", "60%", "90%"):
        setting = Setting("random", budget)
        answer = reader.greedy(reader.start(question, setting), 8)
        now = log_softmax([*reader.force(reader.start(question, setting), [*full, -1])])
        row = trials.measure(0, setting)
        assert row["answer"] == " ".join(map(str, answer))
        assert row["kl"] == pytest.approx(kl_divergence(along, now).mean(), abs=1e-5)
        assert row["agreement"] == pytest.approx((along.argmax(1) == now.argmax(1)).mean(), abs=1e-6)
        different += answer != full
    assert different  # or nothing was shown about answers that part
    assert trials.measure(0, Setting("laprox", "100%"))["kl"] < 1e-6


def test_the_next_turn_continues_the_conversation(model):
    vocabulary = load_vocabulary(Path(model))
    conversation = Conversation(vocabulary, "A document.")
    before = conversation.prompt("First?")
    later = conversation.next_turn("Second?")
    assert conversation.turns == []
    text = lambda tokens: vocabulary.detokenize(tokens, special=True).decode()
    conversation.turns.append(("First?", "Yes."))
    assert text(conversation.prompt("Second?")) == text(before) + "Yes." + text(later)
    assert conversation.document_begin() == len(vocabulary.tokenize(b"<|im_start|>user\n", add_bos=False, special=True))


def test_with_recall_a_later_question_is_answered_from_the_archive(model, document, question):
    reader = Reader(context(model, archive="ram"))
    reader.read(document, head=3)
    setting = Setting("laprox@recall", "20%", "follow-up")
    starts = [reader.start(question, setting, FIRST) for _ in range(2)]  # the second from a copy, which has the archive, too
    by_hand = context(model, budget="20%", archive="ram")
    by_hand.eval(document)
    by_hand.eval(FIRST.tokens)
    by_hand.kv.compress()
    answer_greedily(by_hand, FIRST.predict)
    by_hand.eval(question)
    stale = log_softmax(last_logits(by_hand))
    by_hand.kv.prompt_done()
    for start in starts:
        assert np.allclose(start.logprobs, log_softmax(last_logits(by_hand)), atol=1e-4)
        assert not np.allclose(start.logprobs, stale, atol=1e-2)
    plain = reader.start(question, Setting("laprox", "20%", "follow-up"), FIRST)  # on the same Llama: nothing comes back
    assert np.allclose(plain.logprobs, stale, atol=1e-4)


def test_what_a_repeated_document_keeps(model):
    """POLICY@repeat and @refit: the model repeats the document, then it is compressed, before any question."""
    vocabulary = load_vocabulary(Path(model))
    conversation = Conversation(vocabulary, "The code of Ada is 48, of Bob 77. " * 20)
    probe = repeating(conversation)
    asked = conversation.prompt("Ada?")
    document, question = asked[: probe.n_text], asked[probe.n_text :]
    reader = Reader(context(model, window=128), window=32)
    reader.read(document, head=3, probe=probe)
    starts = {}
    for policy in ("kvzip", "kvzip@repeat", "kvzip@refit"):
        starts[policy] = reader.start(question, Setting(policy, "20%", "agnostic"))
        by_hand = context(model, budget="20%", policy="kvzip", window=128, recent=32 if policy == "kvzip" else 8)
        by_hand.eval(document)
        if policy == "kvzip":
            by_hand.kv.set(window=32)
        else:
            look(by_hand, probe, refit=policy.endswith("refit"))
        by_hand.kv.compress()
        by_hand.eval(question)
        assert np.allclose(starts[policy].logprobs, log_softmax(last_logits(by_hand)), atol=1e-4)
        assert starts[policy].cost.entries_held == by_hand.kv.stats().entries_held - 4 * len(question)
    probed = starts["kvzip@refit"]
    again = reader.start(question, Setting("kvzip@refit", "30%", "agnostic"))  # by what the probe found the first time
    assert again.cost.entries_held > probed.cost.entries_held
    assert again.cost.cpu_seconds > reader._found[2].cpu > 0  # it counts as if the probe had looked again
    fresh = Reader(context(model, window=128), window=32)
    fresh.read(document, head=3, probe=probe)
    assert np.allclose(again.logprobs, fresh.start(question, Setting("kvzip@refit", "30%", "agnostic")).logprobs, atol=1e-4)
    assert not np.allclose(starts["kvzip@repeat"].logprobs, starts["kvzip"].logprobs, atol=1e-3)
    assert not np.allclose(starts["kvzip@repeat"].logprobs, starts["kvzip@refit"].logprobs, atol=1e-4)
    with pytest.raises(ValueError, match="regime is 'aware', which isn't for kvzip@repeat"):
        reader.start(question, Setting("kvzip@repeat", "20%"))
    reader.read(document)
    with pytest.raises(LaproxError, match="no prompt to repeat it"):
        reader.start(question, Setting("kvzip@repeat", "20%", "agnostic"))
