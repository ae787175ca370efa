"""Decode steps as CUDA graphs.

For a few rows, a GPU computes a step faster than the host launches its kernels. Here a graph is a
whole step: the network, sampling, and the next positions. Its shapes are fixed, so there is one
graph for each power of two of positions that attention reads, captured on first use. Between
replays the host only copies the newest ids and recomputes windows that have moved.
"""

from functools import partial

import torch

from brisk.cuda_graph import CapturedFunction, GraphPool
from brisk.generation.kv_cache import compute_step

SHORTEST = (
    256  # positions; a guess, not measured: shorter reads would save less than a capture costs
)


class DecodeGraphs:
    """Steps of a `generate.Batch` that keeps the rows of finished texts.

    Create and use it in one autocast context: the graphs read the cast weights, which PyTorch
    caches until the outermost context ends.

    Args:
        draw: (logits (B, vocab_size), uniform (B,)) → ids (B,), without reading the device.
        uniforms: (B, n) random numbers for n steps, on the device.
    """

    def __init__(self, batch, draw, uniforms):
        self.batch, self.draw, self.uniforms = batch, draw, uniforms
        self.ids = batch.ids.new_zeros(len(batch.ids), 1)
        self.positions = torch.zeros_like(self.ids)
        self.column = batch.ids.new_zeros(1)  # of `uniforms`
        self.pool, self.steps = GraphPool(batch.ids.device), {}

    def next_ids(self):
        """Ids (B,) sampled after the texts."""
        cache = self.batch.cache
        if self.batch.fill():
            self.positions.copy_(cache.lengths[:, None])
        self.ids.copy_(self.batch.newest())
        longest = positions_to_read(1 + max(cache.lengths.tolist()), cache.size)
        step = self.steps.setdefault(longest, CapturedFunction(self.pool))
        ids = step(partial(self.step, longest))
        cache.lengths += 1
        return ids

    def step(self, longest):
        """The captured function. It advances `positions` and `column` on the device."""
        batch = self.batch
        cache_step = batch.cache.static_step(self.ids, self.positions, longest)
        logits = compute_step(batch.model, self.ids, cache_step, batch.decoder)
        ids = self.draw(logits, self.uniforms.index_select(1, self.column)[:, 0])
        self.positions += 1
        self.column += 1
        return ids


def positions_to_read(held, size):
    """A power of two of at least `held` positions, or all `size` of a row."""
    longest = SHORTEST
    while longest < held:
        longest *= 2
    return min(longest, size)
