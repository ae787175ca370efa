"""Continuous batching: one thread owns the model, and samples join and leave at any step.

A step reads at most one part of one prompt, and then draws a token for every row that is read.
A sample is the text that the same server gives it alone, and `generate`'s up to rounding: its
random numbers are its own, its prompt is read in parts cut by its own length, and the shapes of a
step agree to the bit (`batch_shapes`).
"""

import math
import threading
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from brisk.cpu.decode import Decoder
from brisk.generation.generate import draw_uniforms, mask_logits, sample_rows, suppressed_ids
from brisk.generation.kv_cache import KVCache, compute_step, prefill, window_start
from brisk.generation.text_stream import TextStream
from brisk.serving.batch_shapes import ROWS, agreeing_shapes

PART = 128  # tokens of a prompt that are read in one step: longer ones would stall the others


class QueueFull(Exception):
    """There is no room for these samples now."""


@dataclass(frozen=True)
class Token:
    """One drawn token."""

    id: int
    logprob: float | None  # at temperature 1, natural logarithm; None where none was asked for
    top: list  # (id, logprob) of the most likely tokens


@dataclass(eq=False)
class Sample:
    """One text to be drawn after a prompt, and how far it is.

    `put(text, tokens, finish)` is called in the engine's thread with the new text, its `Token`s,
    and None, "stop", "length" or "error". It is called at the first token, then every `interval`
    seconds at most, and at the end.
    """

    ids: list  # of the prompt and of what is drawn after it
    stream: TextStream
    put: object
    max_tokens: int = 16
    settings: tuple = (1.0, None, None)  # temperature, top_k, top_p
    seed: int = 0
    number: int = 0  # among the samples of one seed, see `draw_uniforms`
    logprobs: int | None = None  # how many of the most likely tokens are wanted beside each
    interval: float = math.inf
    cancelled: bool = False  # set from any thread; the row is free at the next step

    row: int = -1
    drawn: int = 0
    unread: object = ()  # ids of the window that are not in the cache yet
    uniforms: list = field(default_factory=list)
    text: str = ""  # since the last `put`
    tokens: list = field(default_factory=list)  # the same
    due: float = -math.inf  # when the next `put` may come


class Engine:
    """The model, a cache of `rows` rows and the samples in them.

    Args:
        queue: samples that may wait for a row.
        suppress: ids that are never drawn.
        autocast: makes the context in which the model runs.

    Attributes:
        failure: why the engine has stopped, or None.
    """

    def __init__(self, model, *, vocab_size, rows, queue, suppress=(), autocast=nullcontext):
        if rows not in ROWS:
            raise ValueError(f"rows={rows} is none of {ROWS}")
        self.model, self.autocast, self.rows, self.queue = model, autocast, rows, queue
        self.vocab_size, self.failure, self.closing = vocab_size, None, False
        self.never = suppressed_ids(suppress, vocab_size, model.lm_head.weight.device)
        self.free, self.samples = set(range(rows)), {}  # rows; {row: Sample}
        self.waiting, self.reading = deque(), []  # for a row; for their prompt or window to be read
        self.changed, self.ready = threading.Condition(), threading.Event()
        self.thread = threading.Thread(target=self.run, name="engine", daemon=True)
        self.thread.start()
        self.ready.wait()

    def submit(self, samples):
        """Queue all of `samples`, or none. Raises `QueueFull`, or RuntimeError after a failure."""
        with self.changed:
            if self.failure or self.closing:
                raise RuntimeError(self.failure or "the server is closing")
            self.waiting = deque(sample for sample in self.waiting if not sample.cancelled)
            if len(self.waiting) + len(samples) > self.queue + len(self.free):
                raise QueueFull
            self.waiting.extend(samples)
            self.changed.notify()

    def close(self):
        """End the thread; open samples finish with "error"."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def run(self):
        """The thread: prepares the model, then steps while there is something to do. The shapes
        are compared here, because PyTorch may give another thread other kernels."""
        try:
            with torch.inference_mode(), self.autocast():
                self.cache = KVCache(self.model, self.rows, math.inf)
                self.decoder = Decoder.of(self.model)
                self.shapes = agreeing_shapes(self.model, self.cache, self.decoder)
                self.ready.set()
                while True:
                    with self.changed:
                        self.changed.wait_for(lambda: self.waiting or self.samples or self.closing)
                        if self.closing:
                            break
                        self.admit()
                    self.read()
                    self.decode()
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self.changed:
                self.failure = self.failure or "the server is closing"
                opened = [*self.samples.values(), *self.waiting]
                self.samples, self.reading = {}, []
                self.waiting.clear()
            for sample in opened:
                sample.put("", [], "error")
            self.ready.set()

    def admit(self):
        """Free the rows of cancelled samples; give free rows to waiting ones, the lowest first, so
        that a step covers few rows."""
        for sample in [sample for sample in self.samples.values() if sample.cancelled]:
            self.release(sample)
        while self.waiting and self.free:
            sample = self.waiting.popleft()
            if sample.cancelled:
                continue
            sample.row = min(self.free)
            self.free.remove(sample.row)
            self.samples[sample.row] = sample
            uniforms = draw_uniforms([sample.number], sample.max_tokens, sample.seed)
            sample.uniforms = uniforms[0].tolist()
            self.open_window(sample)

    def release(self, sample):
        del self.samples[sample.row]
        self.free.add(sample.row)
        if len(sample.unread):
            self.reading.remove(sample)

    def open_window(self, sample):
        """Empty the sample's row, and have the newest tokens read but for the last: see
        `kv_cache.prefill_window`."""
        self.cache.reset([sample.row])
        start = window_start(len(sample.ids), self.cache.size)
        device = self.cache.positions.device
        sample.unread = torch.tensor(sample.ids[start:-1], dtype=torch.long, device=device)
        if len(sample.unread):
            self.reading.append(sample)

    def read(self):
        """Read a part of one prompt, and parts of full windows up to as many tokens again.

        A part depends on its own sample alone, and so do the bits that it computes.
        """
        room = {"prompt": 1, "window": PART}
        for sample in [*self.reading]:
            kind = "window" if sample.drawn else "prompt"
            if room[kind] > 0:
                part, sample.unread = sample.unread[:PART], sample.unread[PART:]
                prefill(self.model, [part], self.cache, [sample.row])
                room[kind] -= len(part)
                if not len(sample.unread):
                    self.reading.remove(sample)

    def decode(self):
        """Draw a token for each row that is read."""
        live = sorted(row for row, sample in self.samples.items() if not len(sample.unread))
        if not live:
            return
        longest = self.shapes.longest(1 + max(self.cache.lengths[live].tolist()))
        for first, count, rows in self.shapes.split(live):
            ids = [[0]] * count
            for row in rows:
                ids[row - first] = self.samples[row].ids[-1:]
            ids = torch.tensor(ids, device=self.cache.positions.device)
            step = self.cache.padded_step(ids, first, rows, longest)
            logits = compute_step(self.model, ids, step, self.decoder)[:, : self.vocab_size]
            if len(rows) < count:
                logits = logits[[row - first for row in rows]]
            self.draw([self.samples[row] for row in rows], mask_logits(logits, self.never))

    def draw(self, samples, logits):
        """Append a token to each of `samples`, drawn from its logits, a row of (R, V)."""
        uniforms = torch.tensor([s.uniforms[s.drawn] for s in samples], device=logits.device)
        ids = sample_rows(logits, uniforms, [s.settings for s in samples]).tolist()
        now = time.monotonic()
        for sample, token_id, row in zip(samples, ids, logits, strict=True):
            token = Token(token_id, None, [])
            if sample.logprobs is not None:
                token = with_logprobs(token_id, row, sample.logprobs)
            self.advance(sample, token, now)

    def advance(self, sample, token, now):
        """Append a `Token` to a sample; hand over its text, and free its row at the end."""
        sample.ids.append(token.id)
        sample.drawn += 1
        text, finish = sample.stream.feed(token.id), None
        if sample.stream.stopped:
            finish = "stop"
        elif sample.drawn == sample.max_tokens:
            text, finish = text + sample.stream.finish(), "length"
        sample.text += text
        sample.tokens.append(token)
        if finish or now >= sample.due:
            sample.put(sample.text, sample.tokens, finish)
            sample.text, sample.tokens, sample.due = "", [], now + sample.interval
        if finish:
            self.release(sample)
        elif self.cache.lengths[sample.row] == self.cache.size:
            self.open_window(sample)


def with_logprobs(token_id, logits, count):
    """The `Token` with its logarithm of probability and the `count` most likely ones."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = [*zip(ids.tolist(), values.tolist(), strict=True)]
    logprob = logprobs[token_id].item()
    if not math.isfinite(logprob):
        raise ArithmeticError("the model's logits are not finite")
    return Token(token_id, logprob, [pair for pair in top if pair[1] > -math.inf])
