"""Batch shapes in which the other rows never change a row's logits, to the bit.

A kernel chooses the order of a matrix product's sums by its shapes, so the logits of a row in a
batch of 64 may differ in the last bit from those of the row alone, and with them a sampled text.
The order depends on shapes and never on values. So a step with equal random keys and values in
every row shows which shapes agree, and serving uses only those. (On one thread, MKL agrees with
itself from 4 rows on.)
"""

from dataclasses import dataclass

import torch

from brisk.generation.kv_cache import compute_step

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHORTEST = 64  # positions


@dataclass(frozen=True)
class BatchShapes:
    """Numbers of rows and of positions, ascending; all combinations agree."""

    rows: list
    positions: list

    def split(self, live):
        """Yield (first row, number of rows, live rows) of steps that cover `live`, ascending row
        numbers."""
        most = self.rows[-1]
        while live:
            first = live[0] // most * most
            inside = [row for row in live if row < first + most]
            needed = inside[-1] + 1 - first
            yield first, min(n for n in self.rows if n >= needed), inside
            live = live[len(inside) :]

    def longest(self, positions):
        """The number of positions to read for rows of `positions`, including the new one."""
        return min(n for n in self.positions if n >= positions)


@torch.no_grad()
def agreeing_shapes(model, cache, decoder=None):
    """The `BatchShapes` of a `KVCache` whose rows are a power of two. It is empty afterwards."""
    every = [*range(len(cache.lengths))]
    for memory in cache.memory:  # deviation 1, about that of keys behind a norm
        generator = torch.Generator(memory.device).manual_seed(0)
        row = torch.randn(memory[:, :1].shape, generator=generator, device=memory.device)
        memory.copy_(row.expand_as(memory))

    def logits(rows, positions, held):
        """Of equal rows (R, vocab_size) that hold this number of positions before the step."""
        cache.lengths[:] = held
        ids = torch.zeros(rows, 1, dtype=torch.long, device=cache.positions.device)
        step = cache.padded_step(ids, 0, [*range(rows)], positions)
        return compute_step(model, ids, step, decoder)

    size = cache.size
    for most in [n for n in reversed(ROWS) if n <= len(every)]:
        found = logits(most, size, size - 1)
        if (found == found[0]).all():  # of a kernel that does not treat its last rows otherwise
            break
    rows = [n for n in ROWS if n < most and (logits(n, size, size - 1) == found[0]).all()]
    few, lengths = min([*rows, most]), []
    while (length := SHORTEST << len(lengths)) < size:
        lengths.append(length)
    lengths = [n for n in lengths if logits(few, n, n - 1).equal(logits(few, size, n - 1))]
    cache.reset(every)
    return BatchShapes([*rows, most], [*lengths, size])
