"""laprox.Llama: everything that llama_cpp.Llama does, on a cache that is compressed when a prompt is in."""

import json
import pickle
from dataclasses import replace

import llama_cpp  # noqa: E402
import numpy as np
import pytest
from gguf_factory import CHATML
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding  # noqa: E402

from laprox import KVConfig, KVStats, LaproxError, Llama, _core  # before llama_cpp, which finds its libraries through it

KV = KVConfig(budget="10%", min_tokens=64)
GONE = replace(KV, archive="off")  # what is evicted
N = 600  # tokens of a prompt that is compressed


@pytest.fixture(scope="module")
def load(toy):
    """load(**kwargs): a laprox.Llama on a small random model."""

    def make(arch="llama", kv=KV, cls=Llama, shape=None, **kwargs):
        kwargs = {"n_ctx": 1024, "n_threads": 1, "n_threads_batch": 1, "seed": 1, "verbose": False, **kwargs}
        if cls is Llama:
            kwargs["kv"] = kv
        return cls(str(toy(arch, chat_template=CHATML, **(shape or {}))), **kwargs)

    return make


@pytest.fixture
def prompt(rng):
    return prompt_of(rng, N)


def prompt_of(rng, n):
    """Random ordinary tokens: characters and filler words of the factory's vocabulary."""
    return [1, *rng.integers(262, 512, n - 1).tolist()]


def greedy(llm, tokens, n=12, **kwargs):
    """The likeliest n tokens after a prompt."""
    out = []
    for token in llm.generate(tokens, temp=0.0, **kwargs):
        out.append(token)
        if len(out) == n:
            return out


def pairs(llm):
    return sum(llm.kv.layers.values())


# --- when the cache is compressed ------------------------------------------------------------------------------------


def test_compressed_when_the_prompt_is_in(load, prompt):
    llm = load()
    tokens = llm.generate(prompt, temp=0.0)
    next(tokens)
    stats = llm.kv.stats()
    assert stats.compressions == 1
    assert stats.tokens_seen == N
    assert stats.entries_full == N * pairs(llm)
    assert stats.entries_held == stats.entries_full // 10
    next(tokens)
    assert llm.kv.stats().entries_held == stats.entries_held + pairs(llm)  # the sampled token, in every head


def test_the_first_token_comes_from_the_full_cache(load, prompt):
    assert greedy(load(), prompt, 1) == greedy(load(kv=None), prompt, 1)


def test_short_prompts_stay_exact(load, prompt):
    short = prompt[: KV.min_tokens]
    llm = load()
    assert greedy(llm, short, 40) == greedy(load(kv=KVConfig(policy="full")), short, 40)
    assert llm.kv.stats().compressions == 0


def test_follow_ups_stay_exact_until_they_are_long(load, rng, prompt):
    llm = load(kv=GONE)
    greedy(llm, prompt, 4)
    held = llm.kv.stats()

    follow_up = [*llm.input_ids[: llm.n_tokens].tolist(), *prompt_of(rng, 30)]
    greedy(llm, follow_up, 4)
    after = llm.kv.stats()
    assert after.compressions == 1
    new = after.tokens_seen - held.tokens_seen
    assert after.entries_held == held.entries_held + new * pairs(llm)

    longer = [*llm.input_ids[: llm.n_tokens].tolist(), *prompt_of(rng, KV.min_tokens)]
    greedy(llm, longer, 1)
    again = llm.kv.stats()
    assert again.compressions == 2
    assert again.entries_held == again.entries_full // 10


def test_eval_alone_compresses_nothing(load, prompt):
    llm = load()
    llm.eval(prompt)
    assert llm.kv.stats().compressions == 0
    llm.kv.compress()
    assert llm.kv.stats().compressions == 1


def test_a_prompt_read_in_pieces_is_compressed_once_it_is_asked(load, prompt):
    llm = load()
    for start in range(0, N, 100):
        llm.eval(prompt[start : start + 100])
    pieces = greedy(llm, prompt)
    assert llm.kv.stats().compressions == 1
    whole = load()
    whole.n_batch = 100
    assert pieces == greedy(whole, prompt)


def test_generate_without_reset_goes_on(load, rng, prompt):
    llm = load()
    llm.eval(prompt)
    tail = prompt_of(rng, 20)
    greedy(llm, tail, 2, reset=False)
    assert llm.kv.stats().tokens_seen == N + 20 + 1
    assert llm.kv.stats().compressions == 1


# --- the same prompt, another prompt, a changed mind -----------------------------------------------------------------


def test_the_same_prompt_again_reads_nothing_again(load, prompt):
    llm = load(kv=GONE)
    greedy(llm, prompt)
    positions = llm.kv.positions(0, 0).tolist()
    again = greedy(llm, prompt)  # unlike the first time, even the first token comes from what is held
    assert greedy(llm, prompt) == again
    assert llm.kv.stats().compressions == 1
    assert llm.kv.positions(0, 0).tolist()[: len(positions) - 12] == positions[:-12]


@pytest.mark.parametrize("common", [0, 5, 300, N - 40, N - 20, N - 1])
def test_another_prompt_answers_as_if_it_were_the_first(load, rng, prompt, common):
    other = [*prompt[:common], *prompt_of(rng, N)[: N - common]]
    llm = load(kv=GONE)
    greedy(llm, prompt)
    assert greedy(llm, other) == greedy(load(kv=GONE), other)


def test_n_tokens_taken_back_into_the_compressed_part(load, rng, prompt):
    llm = load(kv=GONE)
    greedy(llm, prompt)
    more = prompt_of(rng, 10)
    llm.n_tokens = 300
    llm.eval(more)
    fresh = load(kv=GONE)
    fresh.eval([*prompt[:300], *more])
    assert llm.kv.stats().tokens_seen == llm.n_tokens == 310
    assert llm.sample(temp=0.0) == fresh.sample(temp=0.0)


def test_reset_forgets_everything(load, prompt):
    llm = load()
    first = greedy(llm, prompt)
    llm.kv.scores()
    llm.reset()
    with pytest.raises(LaproxError, match="scored"):  # what was scored is gone
        _core.scores(llm.ctx, 0, 0)
    stats = llm.kv.stats()
    assert stats.tokens_seen == stats.entries_held == stats.entries_full == 0
    with pytest.raises(LaproxError):
        llm.kv.positions(9, 0)
    assert llm.kv.positions(0, 0).size == 0
    assert greedy(llm, prompt) == first


# --- the parent's methods --------------------------------------------------------------------------------------------


def test_off_is_llama_cpp(load, prompt):
    ours, theirs = load(kv=None, logits_all=True), load(cls=llama_cpp.Llama, logits_all=True)
    ours.eval(prompt)
    theirs.eval(prompt)
    assert np.array_equal(ours.scores[:N], theirs.scores[:N])


def test_completion_streamed_and_not(load, prompt):
    llm = load()
    settings = dict(max_tokens=16, temperature=0.7, seed=3)
    whole = llm.create_completion(prompt, **settings)
    llm.reset()
    parts = "".join(c["choices"][0]["text"] for c in llm.create_completion(prompt, stream=True, **settings))
    assert parts == whole["choices"][0]["text"]
    assert whole["usage"]["prompt_tokens"] == N
    assert llm.kv.stats().compressions == 1
    llm.reset()
    assert llm(prompt, **settings)["choices"][0] == whole["choices"][0]


def test_chat_and_its_follow_up(load):
    llm = load(kv=GONE)
    messages = [{"role": "user", "content": "word " * 150}]
    answer = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)["choices"][0]["message"]
    assert llm.kv.stats().compressions == 1
    n = llm.n_tokens
    messages += [answer, {"role": "user", "content": "and?"}]
    chunks = list(llm.create_chat_completion(messages, max_tokens=8, temperature=0.0, stream=True))
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert llm.kv.stats().compressions == 1  # answered from what is held
    assert llm.n_tokens > n


def test_tool_calls(load):
    llm = load()
    tool = {"type": "function", "function": {"name": "pick", "parameters": {
        "type": "object", "properties": {"colour": {"enum": ["red", "blue"]}}, "required": ["colour"]}}}
    answer = llm.create_chat_completion(
        [{"role": "user", "content": "word " * 150}], tools=[tool], max_tokens=200, temperature=0.0,
        tool_choice={"type": "function", "function": {"name": "pick"}})
    call = answer["choices"][0]["message"]["tool_calls"][0]["function"]
    assert call["name"] == "pick" and json.loads(call["arguments"])["colour"] in ("red", "blue")
    assert llm.kv.stats().compressions == 1


def test_stop_words_and_logit_bias(load, prompt):
    llm = load()
    text = llm.create_completion(prompt, max_tokens=30, temperature=0.0)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:2]
    llm.reset()
    stopped = llm.create_completion(prompt, max_tokens=30, temperature=0.0, stop=[stop])["choices"][0]
    assert stopped["text"] == text[: text.index(stop)] and stopped["finish_reason"] == "stop"


def test_logprobs(load, prompt):
    llm = load(logits_all=True)
    choice = llm.create_completion(prompt, max_tokens=4, temperature=0.0, logprobs=3)["choices"][0]
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert llm.kv.stats().compressions == 1


def test_drafts_change_nothing_but_speed(load, prompt):
    repetitive = (prompt[:20] * 40)[:N]
    drafted = load(draft_model=LlamaPromptLookupDecoding(num_pred_tokens=8), logits_all=True)
    assert greedy(drafted, repetitive, 30) == greedy(load(), repetitive, 30)
    assert drafted.kv.stats().compressions == 1


def test_embed_is_refused(load):
    with pytest.raises(RuntimeError, match="embedding=True"):
        load().embed("abc")


def test_a_full_context_is_an_error_not_a_crash(load, rng, prompt):
    llm = load(n_ctx=512)
    with pytest.raises(ValueError, match=r"^Requested tokens \(600\) exceed context window of 512$"):
        llm.create_completion(prompt)
    with pytest.raises(ValueError, match=r"^Requested tokens \(600\) exceed context window of 512$"):
        llm.eval(prompt)
    short = prompt[:500]
    out = llm.create_completion(short, max_tokens=None, temperature=0.0, logit_bias={2: -100})
    assert out["usage"]["total_tokens"] <= 512
    with pytest.raises(ValueError, match="exceed context window of 512"):
        for _ in llm.generate(short, temp=0.0):
            pass
    assert greedy(llm, short, 2)  # and it goes on working


def test_infill_and_tokenizers(load):
    llm = load()
    assert llm.detokenize(llm.tokenize(b"w1 w2", add_bos=False)).decode().strip() == "w1 w2"
    assert llm.create_completion("abc", suffix="xyz", max_tokens=4, temperature=0.0)["choices"][0]["text"] is not None


@pytest.mark.parametrize("arch", ["llama", "gemma2", "lfm2"])
@pytest.mark.parametrize("cache", [{}, {"type_k": 8, "type_v": 8}])
def test_architectures_and_cache_types(load, prompt, arch, cache):
    llm = load(arch, **cache)
    assert len(greedy(llm, prompt)) == 12
    stats = llm.kv.stats()
    assert stats.compressions == 1 and stats.entries_held < stats.entries_full
    assert len(greedy(llm, prompt[:300])) == 12


# --- states ----------------------------------------------------------------------------------------------------------


def test_a_state_goes_on_where_it_was(load, rng, prompt):
    llm = load(kv=GONE)
    greedy(llm, prompt, 4)
    state, stats, positions = llm.save_state(), llm.kv.stats(), llm.kv.positions(0, 1).tolist()
    follow_up = [*llm.input_ids[: llm.n_tokens].tolist(), *prompt_of(rng, 20)]
    expected = greedy(llm, follow_up)

    for other in (llm, load(kv=GONE)):
        greedy(other, prompt_of(rng, 100))
        other.load_state(pickle.loads(pickle.dumps(state)))
        now = other.kv.stats()
        assert (now.tokens_seen, now.entries_held) == (stats.tokens_seen, stats.entries_held)
        assert other.kv.positions(0, 1).tolist() == positions
        assert greedy(other, follow_up) == expected
        assert other.kv.stats().entries_held == stats.entries_held + (other.n_tokens - state.n_tokens) * pairs(other)


def test_a_state_is_as_small_as_what_is_held(load, prompt):
    llm = load()
    llm.eval(prompt)
    full = llm.save_state().llama_state_size
    llm.kv.compress()
    state = llm.save_state()
    assert state.llama_state_size < 0.4 * full
    assert len(pickle.dumps(state)) < state.llama_state_size + state.input_ids.nbytes + 4096  # no logits that nobody asked for


def test_foreign_states_are_refused_and_leave_nothing(load, prompt):
    llm = load()
    expected = greedy(llm, prompt)
    foreign = [load(kv=None), load(shape={"n_layer": 2}), load(type_k=8, type_v=8)]
    for other in foreign:
        greedy(other, prompt)
        with pytest.raises(LaproxError, match="state"):
            llm.load_state(other.save_state())
        assert llm.n_tokens == llm.kv.stats().tokens_seen == 0
        assert greedy(llm, prompt) == expected


def test_damaged_states_are_refused(load, rng, prompt):
    llm = load()
    expected = greedy(llm, prompt)
    for _ in range(12):
        state = llm.save_state()
        data = bytearray(state.llama_state)
        for at in rng.integers(0, min(len(data), 4000), 3):
            data[at] ^= 1 << rng.integers(8)
        state.llama_state = bytes(data[: rng.integers(8, len(data) + 1)])
        state.llama_state_size = len(state.llama_state)
        try:
            llm.load_state(state)
        except LaproxError:
            pass
        llm.reset()
        assert greedy(llm, prompt) == expected


def test_ram_cache(load, rng, prompt):
    llm = load()
    llm.set_cache(llama_cpp.LlamaRAMCache(1 << 28))
    other = prompt_of(rng, N)
    settings = dict(max_tokens=6, temperature=0.0, logit_bias={2: -100})
    llm.create_completion(prompt, **settings)
    conversation = llm.input_ids[: llm.n_tokens].tolist()
    held = llm.kv.positions(0, 0).tolist()
    llm.create_completion(other, **settings)
    llm.create_completion([*conversation, 300, 301], **settings)
    assert llm.kv.positions(0, 0).tolist()[: len(held)] == held  # it came back as it was held, and was not read again
    assert llm.kv.stats().compressions <= 1


def test_pickled_settings_survive(load, prompt):
    llm = load(n_ctx=768, kv=KVConfig(budget=0.2, sink=2, prefill="dense", min_tokens=64))
    llm.kv.set(budget="30%")
    copy = pickle.loads(pickle.dumps(llm))
    assert copy.kv.config == llm.kv.config == KVConfig(budget="30%", sink=2, min_tokens=64)
    assert copy.n_ctx() == 768
    assert greedy(copy, prompt) == greedy(llm, prompt)
    assert pickle.loads(pickle.dumps(load(kv=None))).kv_config is None


# --- llm.kv ----------------------------------------------------------------------------------------------------------


def test_stats_are_what_the_engine_says(load, prompt):
    llm = load()
    llm.eval(prompt)
    before = llm.kv.stats()
    assert isinstance(before, KVStats)
    assert before.entries_held == before.entries_full == N * pairs(llm)
    assert before.kv_bytes_full == N * pairs(llm) * 2 * 64 * 2  # K and V, 64 elements, F16
    llm.kv.compress()
    after = llm.kv.stats()
    assert after.kv_bytes < before.kv_bytes and after.kv_bytes_full == before.kv_bytes_full
    assert after.window_bytes > 0
    assert min(after.score_seconds, after.select_seconds, after.compact_seconds) >= 0 < after.score_seconds


def test_positions(load, prompt):
    llm = load()
    greedy(llm, prompt, 1)
    total = 0
    for layer, heads in llm.kv.layers.items():
        for head in range(heads):
            pos = llm.kv.positions(layer, head)
            assert pos.dtype == np.int32 and (np.diff(pos) > 0).all()
            assert set(range(KV.sink)) | set(range(N - KV.recent, N)) <= set(pos.tolist())
            total += len(pos)
    assert total == llm.kv.stats().entries_held


def test_scores(load, prompt):
    llm = load()
    llm.eval(prompt)
    everything = llm.kv.scores()
    assert everything.keys() == llm.kv.layers.keys()
    assert [len(heads) for heads in everything.values()] == list(llm.kv.layers.values())
    one = llm.kv.scores(1, 0)
    assert one.dtype == np.float32 and one.shape == llm.kv.positions(1, 0).shape and (one >= 0).all()
    np.testing.assert_array_equal(one, everything[1][0])
    np.testing.assert_array_equal(one, llm.kv.scores(1)[0])
    assert llm.kv.stats().compressions == 0


@pytest.mark.parametrize("layer, head", [(99, 0), (0, 99), (-1, 0), (0, -1)])
def test_asking_about_what_is_not_there(load, layer, head):
    llm = load()
    llm.eval([1, 300])
    with pytest.raises(LaproxError, match="layer|head"):
        llm.kv.positions(layer, head)
    with pytest.raises(LaproxError, match="layer|head"):
        llm.kv.scores(layer, head)
    with pytest.raises(LaproxError if layer else ValueError):
        llm.kv.scores(layer) if layer else llm.kv.scores(head=0)


def test_settings_change_at_the_next_compression(load, prompt):
    llm = load()
    greedy(llm, prompt, 1)
    kv = llm.kv
    llm.kv.set(budget="7%")
    kv.set(sink=1)
    assert llm.kv.config == KVConfig(budget="7%", sink=1, min_tokens=64)
    llm.kv.compress()
    stats = llm.kv.stats()
    assert stats.entries_held == int(0.07 * stats.entries_full + 1e-6)
    llm.kv.set(policy="streaming", budget="50%")
    llm.reset()
    greedy(llm, prompt, 1)
    assert llm.kv.positions(0, 0).tolist() == [0, *range(N - N // 2 + 1, N)]


def test_refused_settings_change_nothing(load):
    llm = load()
    for bad in ({"budget": "abc"}, {"budget": 5000}, {"window": 64}, {"prefill": "chunked"}, {"policy": "off"}, {"sink": -1}):
        with pytest.raises((ValueError, LaproxError)):
            llm.kv.set(**bad)
        assert llm.kv.config == KV
    with pytest.raises(TypeError):
        llm.kv.set(buget="5%")


def test_closed(load):
    llm = load()
    llm.close()
    llm.close()
    with pytest.raises(LaproxError, match="closed"):
        llm.kv.stats()


def test_chunked_prefill_bounds_the_peak(load, prompt):
    llm = load(kv=KVConfig(budget="10%", prefill="chunked", min_tokens=128), n_batch=64, n_ubatch=64)
    peak = 0
    for start in range(0, N, 64):
        llm.eval(prompt[start : start + 64])
        peak = max(peak, llm.kv.stats().entries_held)
    assert llm.kv.stats().compressions > 0
    assert peak <= 512 * 6 < llm.kv.stats().entries_full  # two blocks of 256 tokens for each of 6 (layer, KV head) pairs
    assert greedy(llm, prompt)


def test_two_models_at_once(load, prompt):
    small, large = load(kv=KVConfig(budget="10%", min_tokens=64)), load(kv=KVConfig(budget="50%", min_tokens=64))
    expected = greedy(small, prompt), greedy(large, prompt)
    small.reset()
    large.reset()
    a, b = small.generate(prompt, temp=0.0), large.generate(prompt, temp=0.0)
    mixed = [(next(a), next(b)) for _ in range(12)]
    assert tuple(map(list, zip(*mixed))) == expected
