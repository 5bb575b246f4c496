"""laprox.Llama with an archive: whatever is asked later, nothing is read twice."""

from itertools import islice

import pytest

from laprox import KVConfig  # before llama_cpp, which finds its libraries through it

KV = KVConfig(budget="10%", min_tokens=64, archive="ram")
DOCUMENT = "the code of Ada is 48, of Bob 77, of Eve 12. " * 12
SETTINGS = dict(max_tokens=6, temperature=0.0, logit_bias={2: -100})


@pytest.fixture(scope="module")
def load(chatting):
    return lambda kv=KV, **kwargs: chatting(kv, **kwargs)


def ask(llm, *said):
    messages = [
        {"role": ("user", "assistant")[i % 2], "content": text}
        for i, text in enumerate((DOCUMENT + said[0], *said[1:]))
    ]
    return llm.create_chat_completion(messages, **SETTINGS)["choices"][0]["message"]["content"]


def test_another_question_reads_itself_alone(load, counted):
    """A character is a token here. Each pass evaluates the question again."""
    llm = load()
    lengths = counted(llm)
    ask(llm, "Ada?")
    assert sum(lengths) > len(DOCUMENT)
    for question in ("Bob?", "Eve?", "Ada?"):
        del lengths[:]
        ask(llm, question)
        stats = llm.kv.stats()
        assert stats.tokens_reread == 0
        assert sum(lengths) < 3 * 40 + 6
        assert stats.entries_held < 0.3 * stats.entries_full
    assert llm.kv.stats().entries_recalled > 0


@pytest.mark.parametrize("shared", [0, 1, 40])
def test_another_document_is_compressed_as_the_first_was(load, shared):
    """However little the prompts share, and whichever is longer."""
    llm = load(kv=KVConfig(budget="10%", min_tokens=64, archive="ram", prefill="chunked"), n_ctx=2048)
    text = "the code of Ada is 48, of Bob 77, of Eve 12. " * 14
    for n in (600, 600, 500, 610):
        llm.create_completion(text[:shared] + text[n % 7 : n], **SETTINGS)
        stats = llm.kv.stats()
        assert stats.tokens_seen > n - 60 and stats.entries_held < 0.25 * stats.entries_full
        assert stats.kv_bytes < 0.8 * stats.kv_bytes_full


@pytest.mark.parametrize("n", [8, 40, 150])
def test_a_prompt_again_after_any_answer(load, counted, n):
    """The answer has taken the place of the prompt's queries: they are made again, so that what is chosen is the same."""
    held = []
    for length in (1, n):
        llm = load(n_ctx=2048)
        prompt = f"{DOCUMENT}And Bob?"
        llm.create_completion(prompt, **SETTINGS | {"max_tokens": length})
        lengths = counted(llm)
        llm.create_completion(prompt, **SETTINGS | {"max_tokens": 1})
        assert sum(lengths) <= 3 * KV.window and llm.kv.stats().tokens_reread == 0
        held.append(llm.kv.held())
    for layer, heads in held[0].items():
        assert (heads == held[1][layer][:, : heads.shape[1]]).mean() > 0.99


def test_what_a_chat_handler_cached_is_not_evaluated_again(load, counted):
    """Images say, which aren't among the tokens: only the last one is, as llama-cpp-python does."""
    llm = load(n_ctx=2048)
    prompt = f"{DOCUMENT}And Bob?"
    llm.create_completion(prompt, **SETTINGS | {"max_tokens": 80})
    llm.chat_handler = object()
    lengths = counted(llm)
    llm.create_completion(prompt, **SETTINGS | {"max_tokens": 1})
    assert lengths == [1]


def test_a_long_turn_is_compressed_after_everything_came_back(load):
    """A budget with room for all that was evicted, beside a turn that is much longer."""
    llm = load(kv=KVConfig(budget="20%", min_tokens=64, archive="ram"), n_ctx=2048)
    text = "the code of Ada is 48, of Bob 77, of Eve 12. " * 20
    llm.create_completion(text[:80], **SETTINGS)
    assert llm.kv.stats().entries_held < llm.kv.stats().entries_full
    llm.kv.set(budget="90%")
    llm.create_completion(text[:800], **SETTINGS)
    stats = llm.kv.stats()
    assert stats.recalls > 0 and stats.tokens_reread == 0
    assert stats.entries_held < 0.93 * stats.entries_full


def test_any_place_of_a_conversation_can_be_gone_back_to(load, counted):
    llm = load()
    first = ask(llm, "Ada?")
    ask(llm, "Ada?", first, "Bob?")
    lengths = counted(llm)
    ask(llm, "Ada?", first, "Eve?")  # edited
    ask(llm, "Ada?")  # regenerated
    ask(llm, "Ada?", "another answer", "Bob?")  # a branch
    assert sum(lengths) < len(DOCUMENT)
    assert llm.kv.stats().tokens_reread == 0


def test_recall_is_a_setting_of_a_live_cache(load):
    """0: as if there were no archive."""
    llm = load()
    ask(llm, "Ada?")
    llm.kv.set(recall=0)
    ask(llm, "Bob?")
    assert llm.kv.stats().tokens_reread > len(DOCUMENT)
    assert llm.kv.stats().archived_bytes == 0
    llm.kv.set(recall=1)
    ask(llm, "Eve?")  # what was evicted meanwhile is gone
    ask(llm, "Ada?")
    assert llm.kv.stats().tokens_reread == 0


def test_the_archive_is_for_the_life_of_a_cache(load):
    llm = load()
    with pytest.raises(ValueError, match="archive is 'ram' for the life of this Llama"):
        llm.kv.set(archive="off")
    with pytest.raises(ValueError, match="archive_limit is '50%' for the life"):
        llm.kv.set(archive_limit="1GiB")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"archive": "/no/such/folder"}, "archive = /no/such/folder is no folder"),
        ({"archive_limit": "many"}, "archive_limit is .*accepted: a share of what is free"),
        ({"archive_limit": "2048"}, "archive_limit is .*accepted: a share of what is free"),
        ({"recall": 9}, "recall is .*accepted: an integer from 0 to 8"),
        ({"recall_tokens": -1}, "recall_tokens is .*accepted: an integer"),
    ],
)
def test_bad_settings(load, setting, message):
    with pytest.raises(ValueError, match=message):
        load(KVConfig(**setting))


@pytest.mark.parametrize("archive", [True, False])
def test_a_state_with_or_without_it(load, counted, archive):
    llm, other = load(), load()
    ask(llm, "Ada?")
    other.load_state(llm.save_state(archive=archive))
    ask(other, "Eve?")
    reread = other.kv.stats().tokens_reread
    assert reread == 0 if archive else reread > len(DOCUMENT)


def test_a_state_with_the_archive_is_as_large_as_a_full_one(load):
    full, llm = load(KVConfig(budget="100%", min_tokens=64, archive="off")), load()
    ask(full, "Ada?")
    ask(llm, "Ada?")
    held, everything = llm.save_state().llama_state_size, llm.save_state(archive=True).llama_state_size
    whole = full.save_state().llama_state_size
    assert held < 0.5 * whole < everything < 1.5 * whole


def test_recurrent_layers_read_again(load):
    """They can't go back, archive or not."""
    llm = load(arch="lfm2")
    ask(llm, "Ada?")
    ask(llm, "Bob?")
    assert llm.kv.stats().tokens_reread > len(DOCUMENT)
    fresh = load(arch="lfm2")
    assert ask(llm, "Eve?") == ask(fresh, "Eve?")


@pytest.mark.parametrize("recall_tokens, again", [(512, 30), (10, 10), (0, 0)])
def test_recurrent_layers_evaluate_a_turn_again(load, counted, recall_tokens, again):
    """On what came back, from the state that there was before it: the end of the turn, where it is longer than that."""
    llm = load(arch="lfm2", kv=KVConfig(budget="10%", min_tokens=64, archive="ram", recall_tokens=recall_tokens))
    prompt = llm.tokenize(DOCUMENT.encode())
    answer = list(islice(llm.generate(prompt, temp=0.0), 6))
    lengths = counted(llm)
    assert next(llm.generate([*prompt, *answer, *prompt[40:69]], temp=0.0))
    stats = llm.kv.stats()
    assert stats.recalls == (2 if again else 1) and stats.tokens_reread == 0 and stats.entries_recalled > 0
    assert sum(lengths) == 30 + 2 * again  # the last token of the answer hadn't been evaluated


def test_an_interrupted_recall_leaves_a_conversation_that_goes_on(load, monkeypatch):
    llm = load()
    answer = ask(llm, "Ada?")
    evaluate, calls = llm._eval_scored, []

    def interrupted(tokens):
        calls.append(len(tokens))
        if len(calls) == 2:  # not the prompt, but its tokens again
            raise KeyboardInterrupt
        evaluate(tokens)

    monkeypatch.setattr(llm, "_eval_scored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ask(llm, "Ada?", answer, "Bob?")
    monkeypatch.setattr(llm, "_eval_scored", evaluate)
    assert ask(llm, "Ada?", answer, "Eve?")
    assert llm.kv.stats().tokens_reread == 0
