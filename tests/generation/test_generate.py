"""Sampling: the right distribution, reproducible, and never a suppressed token."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brisk.data.tokenizer import ByteTokenizer, CharTokenizer
from brisk.generation.generate import generate, sample_token
from brisk.generation.kv_cache import KVCache, decode_step, prefill_window
from brisk.generation.text_stream import TextStream
from brisk.generation.top_tokens import as_table, top_next_tokens
from model import GPT, GPTConfig


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = GPTConfig(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=32, dropout=0.5)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)  # so that the logits differ clearly from token to token
    return model


def fixed_logits(logits):
    """A model with fixed logits."""
    sizes = dict(block_size=4, n_layer=1, n_head=1, n_embd=1, tied=False)
    model = GPT(GPTConfig(**sizes, vocab_size=max(6, len(logits))))
    state = model.state_dict()
    state["transformer.ln_f.weight"].zero_()
    state["transformer.ln_f.bias"].fill_(1)
    state["lm_head.weight"].fill_(-torch.inf)[: len(logits), 0] = torch.tensor(logits)
    return model


def prompt(B=1):
    return torch.tensor([[3, 1, 4, 1, 5]]).repeat(B, 1)


def greedy(model, idx, n, window):
    """Greedy tokens without a cache, each from the last `window(T)` of T tokens."""
    model.eval()
    for _ in range(n):
        with torch.no_grad():
            logits, _ = model(idx[:, -window(idx.size(1)) :])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


def exact(T):
    return min(T, 16)


def halved(T):
    """The last 9 to 16 tokens: at the seventeenth, the oldest eight are dropped."""
    return T if T <= 16 else 9 + (T - 17) % 8


@pytest.mark.parametrize("window", [exact, halved])
def test_greedy_is_argmax_past_block_size(model, window):
    expected = greedy(model, prompt(), 60, window)
    flag = {"exact_window": window is exact}
    assert generate(model, prompt(), 60, temperature=0, **flag).equal(expected)
    assert generate(model, prompt(), 60, top_k=1, **flag).equal(expected)
    assert generate(model, prompt(), 60, top_p=1e-6, **flag).equal(expected)
    assert generate(model, prompt(), 60, temperature=1e-45, **flag).equal(expected)
    assert model.generate(prompt(), 60, temperature=0.0, **flag).equal(expected)
    for T in (1, 15, 16, 17, 18, 24, 25, 40):  # the same for all prompt lengths
        assert generate(model, expected[:, :T], 20, 0, **flag).equal(
            greedy(model, expected[:, :T], 20, window)
        )


@given(st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_each_token_is_computed_once(size, T, exact):
    """On a fake model that records the tokens and positions it computes."""

    class Reader(GPT):
        def embed(self, idx, positions=None, before=None):
            read.append((idx[0].tolist(), positions.flatten()[0].item()))
            return super().embed(idx, positions, before)

    model = Reader(GPTConfig(block_size=size, vocab_size=100, n_layer=1, n_head=1, n_embd=1))
    ids, first, read, seen, counts = torch.arange(100)[None], T, [], [], []
    cache = KVCache(model, 1, 100)
    for T in range(first, 100):
        if T == first or cache.full_rows():
            prefill_window(model, [ids[0, :T]], cache, [0], exact)
        decode_step(model, ids[:, T - 1 : T], cache)
        counts.append(sum(len(tokens) for tokens, _ in read))
        for tokens, start in read:
            seen[start:] = tokens
        read.clear()
        assert seen == list(range(T - len(seen), T)) and len(seen) <= size
        assert len(seen) == min(T, size) if T <= size or exact else len(seen) > size // 2
    if exact:
        assert set(counts[max(0, size + 1 - first) :]) <= {size, size + 1}  # padded by one, or not
    else:
        later, most = counts[1:], 2 if size > 2 else 3  # one more position per token, or padding
        assert sum(later) <= most * len(later) + size
        assert set(later) <= {1, size // 2 + 1, 3 * (size == 2)}


def test_two_calls_match_one(model):
    whole = generate(model, prompt(2), 40, temperature=0)
    for n in (5, 11, 12, 13, 25):
        assert generate(model, whole[:, : 5 + n], 40 - n, temperature=0).equal(whole)


def test_generated_ids_can_be_trained_on(model):
    ids = generate(model, prompt(2), 8)
    model(ids[:, :-1], ids[:, 1:])[1].backward()  # an embedding keeps its ids for this
    model.zero_grad()


def test_mode_is_restored(model):
    model.train()
    once, again = (generate(model, prompt(), 20, temperature=0) for _ in range(2))
    assert once.equal(again) and model.training
    model.eval()
    generate(model, prompt(), 1)
    assert not model.training


def test_samples_do_not_depend_on_the_batch(model):
    together = generate(model, prompt(5), 40, seed=1)
    for i in range(5):
        alone = generate(model, prompt(), 40, seed=1, samples=[i])
        assert alone[0].equal(together[i])
    assert len({tuple(row) for row in together.tolist()}) == 5
    assert generate(model, prompt(5), 25, seed=1).equal(together[:, :30])


def test_list_of_prompts(model):
    rows = [[3, 1, 4], torch.tensor([1]), [5] * 20]
    found = generate(model, rows, 7, seed=0)
    assert [len(row) for row in found] == [10, 8, 27]
    for row, given_ids in zip(found, rows, strict=True):
        assert row[: len(given_ids)].tolist() == list(given_ids)
    tensor = prompt(3)
    assert torch.stack(generate(model, list(tensor), 7, seed=0)).equal(
        generate(model, tensor, 7, seed=0)
    )
    for wrong in ([], [[1], []]):
        with pytest.raises(ValueError, match="empty"):
            generate(model, wrong, 1)


def test_seeds_leave_global_generators_alone(model):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = generate(model, prompt(2), 30, seed=1)
    assert torch.get_rng_state().equal(state)
    second = generate(model, prompt(2), 30, seed=2)
    assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 4
    assert generate(model, prompt(), 3, seed=-1).shape == (1, 8)

    unseeded = generate(model, prompt(), 30)
    assert not unseeded.equal(generate(model, prompt(), 30))
    torch.manual_seed(7)
    assert generate(model, prompt(), 30).equal(unseeded)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax(temperature):
    logits = [0.0, 2.0, -1.0, 1.0, -4.0, 1.5]
    n = 20_000
    ids = generate(
        fixed_logits(logits), torch.zeros(n, 1, dtype=torch.long), 1, temperature, seed=3
    )
    expected = n * torch.softmax(torch.tensor(logits) / temperature, -1)
    counts = torch.bincount(ids[:, 1], minlength=6)
    # Chi-square with 5 degrees of freedom exceeds 25.7 once in ten thousand seeds; this is one.
    assert ((counts - expected) ** 2 / expected).sum() < 25.7


def test_top_k_and_top_p():
    probs = torch.tensor([0.04, 0.5, 0.06, 0.3, 0.1])
    n = 20_000
    logits, uniform = probs.log().expand(n, -1), (torch.arange(n) + 0.5) / n

    def shares(**options):
        return torch.bincount(sample_token(logits, uniform, **options), minlength=5) / n

    def near(found, expected):
        return torch.allclose(found, torch.tensor(expected, dtype=torch.float32), atol=1e-3)

    assert near(shares(), probs.tolist())
    assert near(shares(top_k=0, top_p=1.0), probs.tolist())
    assert near(shares(top_k=99), probs.tolist())
    assert near(shares(top_k=2), [0, 0.625, 0, 0.375, 0])
    assert near(shares(top_p=0.75), [0, 0.625, 0, 0.375, 0])  # 0.5 falls short, 0.8 reaches it
    assert near(shares(top_p=0.85), [0, 5 / 9, 0, 3 / 9, 1 / 9])
    assert near(shares(top_p=0.3), [0, 1, 0, 0, 0])
    # top_p is applied after top_k: of 0.625 and 0.375, the first alone reaches 0.6
    assert near(shares(top_k=2, top_p=0.6), [0, 1, 0, 0, 0])


@pytest.mark.parametrize("options", [{}, {"top_k": 4}, {"top_p": 0.999}])
def test_zero_probability_is_never_sampled(options):
    logits = torch.tensor([-torch.inf, 0.0, -1e4, 1.0, -torch.inf]).expand(4, -1)
    uniform = torch.tensor([0.0, 1.0 - 2**-24, 1.0, 0.5])
    for row in range(4):  # impossible tokens first, last or in between
        ids = sample_token(logits.roll(row, dims=1), uniform, **options)
        assert set((ids - row).remainder(5).tolist()) == {1, 3}


def test_padding_ids_are_never_sampled(model):
    ids = generate(model, prompt(50), 40, temperature=100.0, vocab_size=6, seed=0)
    assert set(ids[:, 5:].unique().tolist()) == set(range(6))
    assert (generate(fixed_logits([0.0, 1.0, 9.0]), prompt(), 5, 0, vocab_size=2)[:, 5:] == 1).all()


def test_suppressed_tokens_are_never_sampled():
    logits = [0.0, 5.0, -1.0, 1.0]
    n = 20_000
    start = torch.zeros(n, 1, dtype=torch.long)
    for suppress in ([1], [1, 1, 7], {1}):  # a duplicate, and an unknown id
        ids = generate(fixed_logits(logits), start, 1, vocab_size=4, suppress=suppress, seed=3)
        shares = torch.bincount(ids[:, 1], minlength=4) / n
        expected = torch.softmax(torch.tensor([0.0, -torch.inf, -1.0, 1.0]), -1)
        assert torch.allclose(shares, expected, atol=0.02) and shares[1] == 0
    for options in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}):
        assert (
            generate(fixed_logits(logits), start[:1], 3, suppress=[1], **options)[0, 1:].eq(3).all()
        )
    with pytest.raises(ValueError, match="every token"):
        generate(fixed_logits(logits), start[:1], 1, vocab_size=2, suppress=[0, 1])


def test_top_next_tokens_follow_the_softmax(model):
    model.eval()
    expected = torch.softmax(model(prompt())[0][0, -1, :30], -1)
    ids, probs = top_next_tokens(model, prompt(), 5, vocab_size=30)
    assert ids.tolist() == expected.argsort(descending=True)[:5].tolist()
    assert torch.allclose(probs, expected[ids])
    ids, probs = top_next_tokens(model, prompt(), 999, vocab_size=30)
    assert sorted(ids.tolist()) == list(range(30)) and torch.allclose(probs.sum(), torch.ones(()))
    likeliest = ids[0].item()
    ids, probs = top_next_tokens(model, prompt(), 999, vocab_size=30, suppress=[likeliest])
    assert sorted([*ids.tolist(), likeliest]) == list(range(30))
    assert torch.allclose(probs.sum(), torch.ones(()))
    assert top_next_tokens(model, prompt(), 1, suppress=[likeliest])[0] != likeliest


def test_table_columns_are_aligned():
    tokenizer = CharTokenizer("a 语\n\u0301\u200b'")
    ids = torch.arange(7)
    assert as_table(ids, torch.tensor([1.0, 0.5, 0.25, 0.125, 0.1, 0.001, 0]), tokenizer) == (
        "1  'a'       100.00%\n"
        "2  ' '        50.00%\n"
        "3  '语'       25.00%\n"  # twice as wide as it is long
        "4  '\\n'       12.50%\n"
        "5  '\u0301'         10.00%\n"  # an accent on the quote has no width
        "6  '\\u200b'    0.10%\n"
        '7  "\'"         0.00%'
    )
    ten = as_table(torch.arange(10) + 0xE8, torch.zeros(10), ByteTokenizer()).splitlines()
    assert ten[0] == r" 1  b'\xe8'    0.00%" and ten[9].startswith(r"10  b'\xf1'")


def test_finished_sample_repeats_its_stop_id(model):
    free = generate(model, prompt(6), 40, temperature=2.0, seed=0)
    stops = {7, 8, 9}
    stopped = generate(model, prompt(6), 40, temperature=2.0, seed=0, stop_ids=stops)
    ends = []
    for row, expected in zip(stopped.tolist(), free.tolist(), strict=True):
        found = [i for i, token in enumerate(expected) if i >= 5 and token in stops]
        end = found[0] if found else len(expected) - 1
        assert row[: end + 1] == expected[: end + 1]
        assert set(row[end:]) == {row[end]} or not found
        ends.append(end)
    assert stopped.size(1) == max(ends) + 1  # it ends when all are finished
    assert len(set(ends)) > 1
    greedy = generate(fixed_logits([0.0, 1.0]), torch.ones(2, 3).long(), 50, 0, stop_ids=[1])
    assert greedy.shape == (2, 4)  # a stop id in the prompt does not count


def test_on_token_sees_every_id_and_can_stop(model):
    seen = []

    def on_token(step, ids):
        seen.append(ids)
        return step == 6

    ids = generate(model, prompt(2), 20, seed=0, on_token=on_token)
    assert ids.shape == (2, 12)
    assert torch.stack(seen, dim=1).equal(ids[:, 5:])


@pytest.mark.parametrize("window", ["half", "exact"])
def test_finished_samples_leave_the_batch(model, monkeypatch, window):
    computed = []

    def counting(model, ids, *args, **options):
        computed.append(len(ids))
        return decode_step(model, ids, *args, **options)

    monkeypatch.setattr("brisk.generation.generate.decode_step", counting)
    ends = [3, 40, 5, 1, 30, 2, 3, 12]
    prompts = [[1 + i] * (1 + 3 * i) for i in range(len(ends))]  # the last ones fill their window
    settings = {
        "temperature": [0, 1, 2, 1, 1, 1, 0, 1],
        "seed": 0,
        "exact_window": window == "exact",
    }
    alone = generate(model, prompts, 40, **settings)
    computed.clear()
    seen = []

    def on_token(step, ids):
        seen.append(ids)
        return [end <= step + 1 for end in ends]

    found = generate(model, prompts, 40, **settings, on_token=on_token)
    for row, expected, end, given_ids in zip(found, alone, ends, prompts, strict=True):
        length = len(given_ids) + end
        assert row[:length].equal(expected[:length])
        assert (row[length:] == row[length - 1]).all()  # it repeats its last token
    assert [len(ids) for ids in seen] == [8] * 40
    assert computed == [8] * 3 + [4] * 9 + [2] * 18 + [1] * 10  # out as soon as half have finished


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"top_k": -1}, {"top_p": 1.5}, {"max_new_tokens": -1}]
)
def test_invalid_settings_raise(model, options):
    with pytest.raises(ValueError):
        generate(model, prompt(), **{"max_new_tokens": 1, **options})


def test_empty_prompt_raises(model):
    with pytest.raises(ValueError, match="empty"):
        generate(model, prompt()[:, :0], 1)


def streamed(text, **stop):
    """The pieces that a stream returns for `text`, with one token per byte, and its final piece."""
    stream = TextStream(ByteTokenizer(), **stop)
    return [stream.feed(byte) for byte in text.encode()], stream.finish(), stream


def test_stream_never_splits_a_character():
    text = "naïve 语言模型 👩‍💻 done"
    pieces, rest, _ = streamed(text)
    assert "".join(pieces) == text and rest == ""
    assert all("\ufffd" not in piece for piece in pieces)
    assert pieces[7:10] == ["", "", "语"]  # shown with its last byte, not later


def test_incomplete_character_becomes_u_fffd():
    stream = TextStream(ByteTokenizer())
    pieces = [stream.feed(byte) for byte in "ab语".encode()[:-1]]
    assert "".join(pieces) == "ab" and stream.finish() == "\ufffd"
    assert stream.feed(97) == "" and stream.finish() == ""


@pytest.mark.parametrize(
    ("text", "stop", "shown"),
    [
        ("one\ntwo\n\nthree", "\n\n", "one\ntwo"),
        ("aaaab!", "aab", "aa"),  # a stop begins inside a partial match
        ("no stop her", "here", "no stop her"),
        ("语言模型", "模", "语言"),
        ("", "x", ""),
        ("one, two. three", [".", ","], "one"),
        ("aaabcd", ["abd", "bcd"], "aaa"),  # the withheld text of one stop may begin another
        ("no end", ["end!", "d!"], "no end"),
        ("text", [], "text"),
    ],
)
def test_stop_text_is_never_shown(text, stop, shown):
    pieces, rest, stream = streamed(text, stop_text=stop)
    assert "".join(pieces) + rest == shown
    assert stream.stopped


def test_stop_id_ends_a_stream():
    stream = TextStream(ByteTokenizer(), stop_ids=[256])
    assert [stream.feed(token) for token in (97, 256, 98)] == ["a", "", ""]
    assert stream.stopped


def whole_words(text, n, ends=False):
    """`text` up to the end of its n-th word, or its last complete one."""
    after = r"(?=\s|\Z)" if ends else r"(?=\s)"
    for count in range(n, 0, -1):
        if found := re.match(rf"(\s*\S+){{{count}}}{after}", text):
            return found[0]
    return ""


@given(st.text("ab. \n'é", max_size=40), st.integers(1, 6), st.integers(1, 5))
def test_only_complete_words_are_shown(text, n, size):
    """For any split into tokens, after every token."""
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    tokenizer = ByteTokenizer()
    tokenizer.token_bytes = lambda i: pieces[i].encode()
    stream, shown = TextStream(tokenizer, max_words=n), ""
    for i in range(len(pieces)):
        shown += stream.feed(i)
        assert shown == whole_words("".join(pieces[: i + 1]), n)  # at once, not later
        assert stream.stopped == (len(shown.split()) == n)
    assert stream.finish() == ""  # half a word at the end is not shown


def test_last_word_of_a_finished_text():
    pieces, rest, stream = streamed("one two.END", stop_text="END", max_words=5)
    assert "".join(pieces) == "one two." and rest == "" and stream.stopped
    pieces, rest, _ = streamed("one two.END", stop_text="END", max_words=1)
    assert "".join(pieces) + rest == "one"
    stream = TextStream(ByteTokenizer(), stop_ids=[256], max_words=5)
    assert "".join(map(stream.feed, [*b"one two ", *b"three", 256])) == "one two three"


@pytest.mark.parametrize(
    ("text", "n", "shown"),
    [
        ("床前明月光,疑是", 3, "床前明"),
        ("床前,明月。光", 2, "床前,"),
        ("“你好”他说。", 2, "“你好”"),
        ("GPT 语言 model!", 3, "GPT 语言"),
        ("ひらがなテスト", 4, "ひらがな"),
        ("한국어 문장 하나", 2, "한국어 문장"),  # Korean has spaces
    ],
)
def test_words_in_scripts_without_spaces(text, n, shown):
    pieces, rest, stream = streamed(text, max_words=n)
    assert "".join(pieces) == shown and rest == "" and stream.stopped
