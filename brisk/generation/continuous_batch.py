"""Continuous batching: sequences join and leave a batch at any step.

A sequence has the ids that it has alone, and `generate`'s up to rounding: its random numbers are
its own, its prompt is read in parts cut by its own length, and the shapes of a step agree to the
bit (`batch_shapes`).
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from brisk.cpu.decode import Decoder
from brisk.generation.batch_shapes import agreeing_shapes
from brisk.generation.generate import draw_uniforms, mask_logits, sample_rows, suppressed_ids
from brisk.generation.kv_cache import KVCache, compute_step, prefill, window_start

PART = 128  # tokens of prompts that are read in one step: more would stall the others
SHORTEST = 16  # tokens that a shorter part counts as: it takes about as long


class Token(NamedTuple):
    """One drawn token."""

    id: int
    logprob: float | None = None  # natural, at temperature 1; None where none was asked for
    top: list = ()  # (id, logprob) of the most likely tokens


@dataclass(eq=False)
class Sequence:
    """A prompt, how to continue it, and how far it is."""

    ids: list  # of the prompt and of what is drawn after it
    max_tokens: int = 16
    settings: tuple = (1.0, None, None)  # temperature, top_k, top_p
    seed: int = 0
    number: int = 0  # among the samples of one seed, see `draw_uniforms`
    logprobs: int | None = None  # number of most likely tokens to return for each token

    row: int = -1
    drawn: int = 0
    unread: list = ()  # ids of the window that are not in the cache yet
    uniforms: list = field(default_factory=list)


class ContinuousBatch:
    """A model, and the rows of a KV cache as places for sequences.

    Create and use it in one thread, in inference mode and under the autocast of the model:
    PyTorch may give another thread other kernels.

    Args:
        rows: a power of two.
        vocab_size, suppress: see `generate`.

    Attributes:
        free: row numbers without a sequence.
        sequences: {row: `Sequence`}.
    """

    def __init__(self, model, rows, *, vocab_size=None, suppress=()):
        self.model, self.vocab_size = model, vocab_size
        self.cache, self.decoder = KVCache(model, rows, math.inf), Decoder.of(model)
        self.device = self.cache.positions.device
        self.never = suppressed_ids(suppress, vocab_size, self.device)
        self.shapes = agreeing_shapes(model, self.cache, self.decoder)
        self.free, self.sequences = set(range(rows)), {}
        self.reading = []  # sequences with ids to read, in the order of their coming

    def add(self, sequence):
        """Place a sequence in the lowest free row, so that a step covers few; its row."""
        sequence.row = min(self.free)
        self.free.remove(sequence.row)
        self.sequences[sequence.row] = sequence
        uniforms = draw_uniforms([sequence.number], sequence.max_tokens, sequence.seed)
        sequence.uniforms = uniforms[0].tolist()
        self.open_window(sequence)
        return sequence.row

    def remove(self, row):
        sequence = self.sequences.pop(row)
        self.free.add(row)
        if sequence.unread:
            self.reading.remove(sequence)

    def open_window(self, sequence):
        """Empty its row, and have the newest ids read but for the last: see `prefill_window`."""
        self.cache.reset([sequence.row])
        sequence.unread = sequence.ids[window_start(len(sequence.ids), self.cache.size) : -1]
        if sequence.unread:
            self.reading.append(sequence)

    def step(self):
        """Read on, then draw a token for each row that is read: a list of (row, `Token`). A
        sequence must be removed with its token number `max_tokens`, or before."""
        self.read()
        live = sorted(row for row, sequence in self.sequences.items() if not sequence.unread)
        drawn, held = [], self.cache.lengths[live].tolist()
        longest = self.shapes.longest(1 + max(held, default=0))
        for first, count, rows in self.shapes.split(live):
            drawn += zip(rows, self.decode(first, count, rows, longest), strict=True)
        return drawn

    def read(self):
        """Read parts of prompts, up to `PART` tokens, and parts of windows, up to as many again.

        A part depends on its own sequence alone, and so do the bits that it computes.
        """
        room = {"prompt": PART, "window": PART}
        for sequence in [*self.reading]:
            kind = "window" if sequence.drawn else "prompt"
            if room[kind] > 0:
                part, sequence.unread = sequence.unread[:PART], sequence.unread[PART:]
                ids = torch.tensor(part, device=self.device)
                prefill(self.model, [ids], self.cache, [sequence.row])
                room[kind] -= max(len(part), SHORTEST)
                if not sequence.unread:
                    self.reading.remove(sequence)

    def decode(self, first, count, rows, longest):
        """`Token`s of the live `rows` among the `count` rows from `first` on."""
        sequences, ids = [self.sequences[row] for row in rows], [[0]] * count
        for row, sequence in zip(rows, sequences, strict=True):
            ids[row - first] = sequence.ids[-1:]
        ids = torch.tensor(ids, device=self.device)
        step = self.cache.padded_step(ids, first, rows, longest)
        logits = compute_step(self.model, ids, step, self.decoder)[:, : self.vocab_size]
        if len(rows) < count:
            logits = logits[[row - first for row in rows]]
        logits = mask_logits(logits, self.never)
        uniforms = torch.tensor([s.uniforms[s.drawn] for s in sequences], device=self.device)
        ids = sample_rows(logits, uniforms, [s.settings for s in sequences]).tolist()
        tokens = []
        for i, (sequence, token_id) in enumerate(zip(sequences, ids, strict=True)):
            if sequence.logprobs is None:
                tokens.append(Token(token_id))
            else:
                tokens.append(with_logprobs(token_id, logits[i], sequence.logprobs))
            sequence.ids.append(token_id)
            sequence.drawn += 1
            if self.cache.lengths[sequence.row] == self.cache.size:
                self.open_window(sequence)
        return tokens


def with_logprobs(token_id, logits, count):
    """The `Token` of an id drawn from the logits (V,), with the `count` most likely ones."""
    logprobs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    top = [*zip(ids.tolist(), values.tolist(), strict=True)]
    logprob = logprobs[token_id].item()
    if not math.isfinite(logprob):
        raise ArithmeticError("the model's logits are not finite")
    return Token(token_id, logprob, [pair for pair in top if pair[1] > -math.inf])
