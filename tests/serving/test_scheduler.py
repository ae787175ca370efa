"""The engine: a sample is the text that it is alone, whatever runs beside it, before or after."""

import math
import random
import threading
from itertools import pairwise

import pytest
import torch
from networks import MODERN, random_model

from brisk.cpu.decode import Decoder
from brisk.data.tokenizer import CharTokenizer
from brisk.generation.kv_cache import KVCache, compute_step, prefill
from brisk.generation.text_stream import TextStream
from brisk.serving import scheduler
from brisk.serving.batch_shapes import ROWS, BatchShapes, agreeing_shapes
from brisk.serving.scheduler import Engine, QueueFull, Sample

TOKENIZER = CharTokenizer(map(chr, range(48, 48 + 61)))
NETWORKS = [{}, {**MODERN, "n_kv_head": 1}, {"ngrams": 3, "ngram_rows": 50}]
NETWORK = pytest.mark.parametrize("network", NETWORKS, ids=["gpt2", "modern", "ngrams"])


class Inbox:
    """What a sample's `put` was called with."""

    def __init__(self, cancel_at=math.inf):
        self.text, self.tokens, self.finish, self.calls = "", [], None, 0
        self.ended, self.cancel_at, self.sample = threading.Event(), cancel_at, None

    def __call__(self, text, tokens, finish):
        self.text, self.tokens, self.finish = self.text + text, [*self.tokens, *tokens], finish
        self.calls += 1
        if len(self.tokens) >= self.cancel_at:
            self.sample.cancelled = True
            self.ended.set()
        if finish:
            self.ended.set()

    def wait(self):
        assert self.ended.wait(60)
        return self

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def a_sample(ids, max_tokens=20, cancel_at=math.inf, stop=(), **settings):
    inbox = Inbox(cancel_at)
    stream = TextStream(TOKENIZER, stop)
    inbox.sample = Sample([*ids], stream, inbox, max_tokens=max_tokens, **settings)
    if cancel_at < math.inf:
        inbox.sample.interval = 0
    return inbox


def submit(engine, *inboxes):
    engine.submit([inbox.sample for inbox in inboxes])
    return inboxes


@pytest.fixture
def engine():
    """`engine(model, rows=8, queue=99)`, closed when the test ends."""
    opened = []

    def engine(model, rows=8, queue=99, **options):
        opened.append(Engine(model, vocab_size=61, rows=rows, queue=queue, **options))
        return opened[-1]

    yield engine
    for one in opened:
        one.close()


def prompt(length, seed=0):
    return random.Random(seed).choices(range(61), k=length)


@NETWORK
def test_recycled_row_knows_nothing_of_the_request_before(engine, network):
    """One row after another request, ended or cancelled, gives the ids of a fresh server."""
    model = random_model(**network)
    (fresh,) = submit(engine(model, rows=1), a_sample(prompt(9), 30, seed=3))
    used = engine(model, rows=1)
    before = [a_sample(prompt(20, i), 40, cancel, seed=i) for i, cancel in [(1, math.inf), (2, 7)]]
    for inbox in before:
        submit(used, inbox)
    (found,) = submit(used, a_sample(prompt(9), 30, seed=3))
    assert found.wait().ids == fresh.wait().ids
    assert len(before[0].ids) == 40 and 7 <= len(before[1].ids) < 40


SETTINGS = [(1.0, None, None), (0.8, 5, None), (1.5, None, 0.7), (0, None, None), (2.0, 9, 0.9)]


def random_samples(rng, count):
    for number in range(count):
        yield dict(
            ids=prompt(rng.randint(1, 60), number),
            max_tokens=rng.randint(1, 60),
            settings=rng.choice(SETTINGS),
            seed=rng.randint(0, 9),
            number=rng.randint(0, 3),
            logprobs=rng.choice([None, 0, 3]),
        )


@pytest.mark.parametrize("part", [128, 5])
@NETWORK
def test_text_is_the_one_it_is_alone(engine, network, part, monkeypatch):
    """In float32 `generate`'s too, and the logprobs to the bit, past the window of 24 tokens."""
    monkeypatch.setattr(scheduler, "PART", part)
    model, rng = random_model(**network), random.Random(1)
    busy, quiet = engine(model, rows=8), engine(model, rows=8)
    asked = [*random_samples(rng, 16)]
    together = [a_sample(**options) for options in asked]
    for i, inbox in enumerate(together):
        submit(busy, inbox)
        if i % 4 == 0:  # others come and go away again
            submit(busy, a_sample(prompt(30, i), 50, cancel_at=rng.randint(1, 9)))
        if i % 7 == 0:
            inbox.wait()
    for inbox, options in zip(together, asked, strict=True):
        (alone,) = submit(quiet, a_sample(**options))
        assert inbox.wait().tokens == alone.wait().tokens
        temperature, top_k, top_p = options["settings"]
        own = dict(seed=options["seed"], samples=[options["number"]], vocab_size=61)
        idx = torch.tensor([options["ids"]])
        expected = model.generate(
            idx, options["max_tokens"], temperature, top_k, top_p=top_p, **own
        )
        assert inbox.ids == expected[0, len(options["ids"]) :].tolist()
    assert len(busy.free) == len(quiet.free) == 8 and not busy.reading and not busy.samples


def test_logprobs_are_the_networks(engine):
    model = random_model()
    ids = prompt(9)
    (found,) = submit(engine(model), a_sample(ids, 8, logprobs=4))
    for i, token in enumerate(found.wait().tokens):
        text = torch.tensor([ids + found.ids[:i]])
        expected = model.predict(text, targets=False)[0, -1].log_softmax(-1)
        assert token.logprob == pytest.approx(expected[token.id].item(), abs=1e-4)
        values, top = expected.topk(4)
        assert [i for i, _ in token.top] == top.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_suppressed_ids_and_padding_are_never_drawn(engine):
    model = random_model(vocab_size=70)
    drawn = []
    for inbox in submit(
        engine(model, suppress=[3, 4]),
        *(a_sample([1], 60, seed=i, logprobs=61, settings=(3.0, None, None)) for i in range(8)),
    ):
        drawn += inbox.wait().ids
        assert {len(token.top) for token in inbox.tokens} == {59}
    assert not {3, 4, *range(61, 70)} & {*drawn}


def test_stop_text_ends_a_sample_before_it(engine):
    model = random_model()
    (whole,) = submit(engine(model), a_sample([5], 60, seed=1))
    text = whole.wait().text
    assert whole.finish == "length" and len(text) == 60
    stop = [text[31:33], text[40:43], ""]
    (cut,) = submit(engine(model), a_sample([5], 60, seed=1, stop=stop))
    assert cut.wait().text == text[: min(text.index(stop[0]), text.index(stop[1]))]
    assert cut.finish == "stop"


def test_queue_is_bounded_and_all_or_none_are_admitted(engine):
    one = engine(random_model(), rows=1, queue=2)
    endless = a_sample([1], 10**6, cancel_at=10**6)
    submit(one, endless)
    while one.free:
        pass
    waiting = submit(one, a_sample([1], 3))
    with pytest.raises(QueueFull):
        submit(one, a_sample([1]), a_sample([1]))
    gone = submit(one, a_sample([1], 3))
    with pytest.raises(QueueFull):
        submit(one, a_sample([1]))
    gone[0].sample.cancelled = True  # makes room
    last = submit(one, a_sample([1], 3))
    endless.sample.cancelled = True
    assert len(waiting[0].wait().ids) == len(last[0].wait().ids) == 3
    assert gone[0].ids == []


def test_streamed_sample_comes_at_once_and_then_at_intervals(engine):
    model = random_model()
    slow, fast = a_sample([1], 60, interval=1e9), a_sample([1], 60, interval=0)
    submit(engine(model), slow, fast)
    assert slow.wait().calls == 2 and fast.wait().calls == 60
    assert slow.text == fast.text


def test_long_prompt_does_not_stall_the_others(engine, monkeypatch):
    """Between any two of its parts every other sample has a token."""
    monkeypatch.setattr(scheduler, "PART", 4)
    events, model = [], random_model()
    original = scheduler.prefill

    def noted(model, parts, cache, rows):
        events.append(("read", rows[0]))
        return original(model, parts, cache, rows)

    monkeypatch.setattr(scheduler, "prefill", noted)
    one = engine(model, rows=4)
    others = [a_sample([1], 20, interval=0) for _ in range(2)]
    long = [a_sample(prompt(21), 1) for _ in range(2)]
    for inbox in others:
        inbox.sample.put = lambda *_, inbox=inbox: (events.append(("token", inbox)), inbox(*_))
    submit(one, *others, *long)
    for inbox in (*others, *long):
        inbox.wait()
    reads = [i for i, event in enumerate(events) if event[0] == "read"]
    assert len(reads) == 10
    for a, b in pairwise(reads):
        assert {event[1] for event in events[a + 1 : b]} == {*others}


def test_failure_fails_the_open_samples_and_those_to_come(engine, monkeypatch):
    one = engine(random_model(), rows=1)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(one.model.transformer.ln_f, "forward", None)
    monkeypatch.setattr(one, "decoder", None)
    opened = submit(one, a_sample([1]), a_sample([1, 2]))
    assert [inbox.wait().finish for inbox in opened] == ["error", "error"]
    one.thread.join(10)
    assert "TypeError" in one.failure
    with pytest.raises(RuntimeError, match="TypeError"):
        submit(one, a_sample([1]))


def test_close_ends_open_samples(engine):
    one = engine(random_model(), rows=1)
    running, waiting = submit(one, a_sample([1], 10**6), a_sample([1]))
    one.close()
    assert running.wait().finish == waiting.wait().finish == "error"


# ------------------------------------------------------------------------------------ batch shapes


@NETWORK
def test_rows_have_the_same_bits_in_all_shapes(network):
    """Every row of every pair of agreeing shapes, beside rows of other texts and lengths."""
    model = random_model(**{**network, "block_size": 200})
    with torch.inference_mode():
        cache, decoder = KVCache(model, 16, 999), Decoder.of(model)
        shapes = agreeing_shapes(model, cache, decoder)
        assert shapes.rows[-1] <= 16 and shapes.positions[-1] == 200
        text = torch.tensor(prompt(50))
        found = set()
        for positions in [n for n in shapes.positions if n >= 50]:
            for rows in shapes.rows:
                for row in range(rows):
                    cache.reset([*range(16)])
                    others = [torch.tensor(prompt(5 + i, i)) for i in range(rows)]
                    others[row] = text[:-1]
                    prefill_each(model, others, cache)
                    ids = torch.full((rows, 1), 7)
                    ids[row] = text[-1]
                    step = cache.padded_step(ids, 0, [*range(rows)], positions)
                    logits = compute_step(model, ids, step, decoder)[row]
                    found.add(tuple(logits.tolist()))
    assert len(found) == 1


def prefill_each(model, texts, cache):
    for row, text in enumerate(texts):
        prefill(model, [text], cache, [row])


def test_steps_cover_the_live_rows():
    shapes = BatchShapes([4, 8, 16], [64, 128, 200])
    assert [*shapes.split([0])] == [(0, 4, [0])]
    assert [*shapes.split([1, 7])] == [(0, 8, [1, 7])]
    assert [*shapes.split([3, 16, 30, 47])] == [(0, 4, [3]), (16, 16, [16, 30]), (32, 16, [47])]
    assert [shapes.longest(n) for n in (1, 64, 65, 128, 129, 200)] == [64, 64, 128, 128, 200, 200]
    assert [*BatchShapes([1], [9]).split([0, 2])] == [(0, 1, [0]), (2, 1, [2])]


def test_kernel_that_treats_its_last_row_otherwise_is_not_trusted():
    """Then steps are as small as it takes for all rows to agree."""

    class Odd(torch.nn.Module):
        def forward(self, ids, cache):
            logits = torch.ones(len(ids), 1, 5)
            if len(ids) > 4:
                logits[-1] += 1e-6
            return logits, None

    cache = KVCache(random_model(), 16, 99)
    assert agreeing_shapes(Odd(), cache).rows == [1, 2, 4]
    assert ROWS[0] == 1  # a row alone always agrees with itself


def test_idle_rows_lose_nothing_in_a_padded_step():
    model = random_model(ngrams=3, ngram_rows=50)
    cache = KVCache(model, 4, 99)
    texts = [torch.tensor(prompt(n, n)) for n in (5, 20, 24, 3)]
    prefill_each(model, texts, cache)
    before = [memory[:, 1, :, :20].clone() for memory in cache.memory]
    last = cache.last_ids[[1, 2]].clone()
    ids = torch.tensor([[1], [9], [9], [2]])
    with torch.no_grad():
        compute_step(model, ids, cache.padded_step(ids, 0, [0, 3], 8))
    assert cache.lengths.tolist() == [6, 20, 24, 4] and cache.last_ids[[1, 2]].equal(last)
    assert cache.last_ids[[0, 3], -1].tolist() == [1, 2]
    for memory, kept in zip(cache.memory, before, strict=True):
        assert memory[:, 1, :, :20].equal(kept)
