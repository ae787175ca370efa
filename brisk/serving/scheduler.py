"""The engine: one thread that runs the model, and a queue of samples."""

import threading
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from brisk.generation.continuous_batch import ContinuousBatch, Sequence


@dataclass(eq=False)
class Sample(Sequence):
    """A `Sequence` that is streamed as text.

    The engine's thread calls `put(text, tokens, finish)` with the new text, its `Token`s, and None,
    "stop", "length" or "error": first at `due`, then every `interval` seconds per open sample, and
    at the end.
    """

    stream: object = None  # a TextStream
    put: object = None
    due: float = 0
    interval: float = 0
    cancelled: bool = False  # set from any thread; the row is free at the next step
    text: str = ""  # since the last `put`
    tokens: list = field(default_factory=list)  # since the last `put`


class Engine:
    """A thread that runs `model` on a batch of up to `rows` samples.

    Args:
        queue: number of samples that may wait for a row.
        autocast: returns the context in which the model runs.
        options: for `ContinuousBatch`.
    """

    def __init__(self, model, rows, queue, *, autocast=nullcontext, **options):
        self.rows, self.queue, self.drawn = rows, queue, 0  # tokens drawn since the start
        self.closing, self.failure = False, None  # the error that ended the thread
        self.waiting, self.samples = deque(), {}  # samples; {row: sample}
        self.changed, self.ready = threading.Condition(), threading.Event()
        arguments = model, autocast, options
        self.thread = threading.Thread(target=self.run, args=arguments, name="engine", daemon=True)
        self.thread.start()
        self.ready.wait()
        if self.failure:
            raise RuntimeError(self.failure)

    def submit(self, samples):
        """Queue all of `samples`, or return False if the queue is full or the thread has ended."""
        with self.changed:
            self.waiting = deque(sample for sample in self.waiting if not sample.cancelled)
            room = self.queue + self.rows - len(self.samples) - len(self.waiting)
            if self.closing or len(samples) > room:
                return False
            self.waiting.extend(samples)
            self.changed.notify()
            return True

    def close(self):
        """Stop the thread. Unfinished samples end with "error"."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        self.thread.join()

    def run(self, model, autocast, options):
        """Run steps until the engine is closed."""
        try:
            with torch.inference_mode(), autocast():
                self.batch = ContinuousBatch(model, self.rows, **options)
                self.samples = self.batch.sequences
                self.ready.set()
                while self.admit():
                    drawn, now = self.batch.step(), time.monotonic()
                    self.drawn += len(drawn)
                    for row, token in drawn:
                        self.advance(self.samples[row], token, now)
        except BaseException as error:
            self.failure = f"{type(error).__name__}: {error}"
            raise
        finally:
            with self.changed:
                self.closing = True
                opened = [*self.samples.values(), *self.waiting]
                self.samples, self.waiting = {}, deque()
            for sample in opened:
                sample.put("", [], "error")
            self.ready.set()

    def admit(self):
        """Wait for samples, free the rows of cancelled ones, and start waiting ones. Returns False
        if the engine is closing."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting or self.samples or self.closing)
            for row in [row for row, sample in self.samples.items() if sample.cancelled]:
                self.batch.remove(row)
            while self.waiting and self.batch.free:
                sample = self.waiting.popleft()
                if not sample.cancelled:
                    self.batch.add(sample)
            return not self.closing

    def advance(self, sample, token, now):
        """Stream the text of a new `Token`, and free the row at the end of the sample."""
        text, finish = sample.stream.feed(token.id), None
        if sample.stream.stopped:
            finish = "stop"
        elif sample.drawn == sample.max_tokens:
            text, finish = text + sample.stream.finish(), "length"
        sample.text += text
        sample.tokens.append(token)
        if finish or now >= sample.due:
            if finish:
                self.batch.remove(sample.row)
            sample.put(sample.text, sample.tokens, finish)
            sample.text, sample.tokens = "", []
            sample.due = now + sample.interval * len(self.samples)
