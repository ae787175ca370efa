"""The engine: a sample is independent of all other requests."""

import math
import random
import threading
from itertools import pairwise

import pytest
import torch
from networks import MODERN, random_model

from brisk.data.tokenizer import CharTokenizer
from brisk.generation import continuous_batch
from brisk.generation.continuous_batch import ContinuousBatch, Sequence
from brisk.generation.text_stream import TextStream
from brisk.serving.scheduler import Sample

TOKENIZER = CharTokenizer(map(chr, range(48, 48 + 61)))
NETWORKS = [{}, {**MODERN, "n_kv_head": 1}, {"ngrams": 3, "ngram_rows": 50}]
NETWORK = pytest.mark.parametrize("network", NETWORKS, ids=["gpt2", "modern", "ngrams"])


class Inbox:
    """Records the calls of a sample's `put`."""

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


def a_sample(ids, max_tokens=20, cancel_at=math.inf, stop=(), interval=math.inf, **settings):
    inbox = Inbox(cancel_at)
    stream = TextStream(TOKENIZER, stop)
    inbox.sample = Sample(
        [*ids], max_tokens, stream=stream, put=inbox, interval=interval, **settings
    )
    if cancel_at < math.inf:
        inbox.sample.interval = 0
    return inbox


def submit(engine, *inboxes):
    """The inboxes, or () where the engine did not take their samples."""
    return inboxes if engine.submit([inbox.sample for inbox in inboxes]) else ()


def prompt(length, seed=0):
    return random.Random(seed).choices(range(61), k=length)


@NETWORK
def test_recycled_row_is_independent(engine, network):
    """A row after a finished or cancelled request gives the ids of a fresh server."""
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
def test_text_is_independent_of_other_requests(engine, network, part, monkeypatch):
    """In float32 it is that of `generate`, with bit-exact logprobs, past the window of 24."""
    monkeypatch.setattr(continuous_batch, "PART", part)
    model, rng = random_model(**network), random.Random(1)
    busy, quiet = engine(model, rows=8), engine(model, rows=8)
    asked = [*random_samples(rng, 16)]
    together = [a_sample(**options) for options in asked]
    for i, inbox in enumerate(together):
        submit(busy, inbox)
        if i % 4 == 0:  # others are added and cancelled
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
    assert len(busy.batch.free) == len(quiet.batch.free) == 8 and not busy.batch.reading


def test_logprobs_match_the_network(engine):
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


def test_suppressed_ids_are_never_sampled(engine):
    model = random_model(vocab_size=70)
    drawn = []
    for inbox in submit(
        engine(model, suppress=[3, 4]),
        *(a_sample([1], 60, seed=i, logprobs=61, settings=(3.0, None, None)) for i in range(8)),
    ):
        drawn += inbox.wait().ids
        assert {len(token.top) for token in inbox.tokens} == {59}
    assert not {3, 4, *range(61, 70)} & {*drawn}


def test_stop_text_ends_a_sample(engine):
    model = random_model()
    (whole,) = submit(engine(model), a_sample([5], 60, seed=1))
    text = whole.wait().text
    assert whole.finish == "length" and len(text) == 60
    stop = [text[31:33], text[40:43], ""]
    (cut,) = submit(engine(model), a_sample([5], 60, seed=1, stop=stop))
    assert cut.wait().text == text[: min(text.index(stop[0]), text.index(stop[1]))]
    assert cut.finish == "stop"


def test_queue_is_bounded(engine):
    one = engine(random_model(), rows=1, queue=2)
    endless = a_sample([1], 10**6, cancel_at=10**6)
    submit(one, endless)
    while one.batch.free:
        pass
    waiting = submit(one, a_sample([1], 3))
    assert not submit(one, a_sample([1]), a_sample([1]))
    gone = submit(one, a_sample([1], 3))
    assert not submit(one, a_sample([1]))
    gone[0].sample.cancelled = True  # makes room
    last = submit(one, a_sample([1], 3))
    endless.sample.cancelled = True
    assert len(waiting[0].wait().ids) == len(last[0].wait().ids) == 3
    assert gone[0].ids == []


def test_streaming_intervals(engine):
    model = random_model()
    slow, fast = a_sample([1], 60, interval=1e9), a_sample([1], 60, interval=0)
    submit(engine(model), slow, fast)
    assert slow.wait().calls == 2 and fast.wait().calls == 60
    assert slow.text == fast.text


def test_long_prompt_does_not_stall_the_others(engine, monkeypatch):
    """Between two of its parts, every other sample gets a token."""
    monkeypatch.setattr(continuous_batch, "PART", 4)
    events, model = [], random_model()
    original = continuous_batch.prefill

    def noted(model, parts, cache, rows):
        events.append(("read", rows[0]))
        return original(model, parts, cache, rows)

    monkeypatch.setattr(continuous_batch, "prefill", noted)
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


def test_short_prompts_begin_together():
    """Eight in one step, so that the last of a crowd does not wait for as many steps."""
    with torch.inference_mode():
        batch = ContinuousBatch(random_model(), 16)
        for i in range(12):
            batch.add(Sequence(prompt(5, i)))
        assert [len(batch.step()) for _ in range(3)] == [8, 12, 12]


def test_client_lost_in_prefill_frees_its_row(engine, monkeypatch):
    monkeypatch.setattr(continuous_batch, "PART", 4)
    one, gone = engine(random_model(), rows=1), a_sample(prompt(21), 50)
    original = one.batch.read

    def read():
        original()
        gone.sample.cancelled = True

    monkeypatch.setattr(one.batch, "read", read)
    submit(one, gone)
    (found,) = submit(one, a_sample(prompt(9), 30, seed=3))
    (fresh,) = submit(engine(random_model(), rows=1), a_sample(prompt(9), 30, seed=3))
    assert found.wait().ids == fresh.wait().ids and not gone.tokens
    assert not one.batch.reading and len(one.batch.free) == 1


def test_failure_fails_all_samples(engine, monkeypatch):
    one = engine(random_model(), rows=1)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(one.batch.model.transformer.ln_f, "forward", None)
    monkeypatch.setattr(one.batch, "decoder", None)
    opened = submit(one, a_sample([1]), a_sample([1, 2]))
    assert [inbox.wait().finish for inbox in opened] == ["error", "error"]
    one.thread.join(10)
    assert "TypeError" in one.failure
    assert not submit(one, a_sample([1]))


def test_close_ends_open_samples(engine):
    one = engine(random_model(), rows=1)
    running, waiting = submit(one, a_sample([1], 10**6), a_sample([1]))
    one.close()
    assert running.wait().finish == waiting.wait().finish == "error"
