"""KV cache for ragged batches.

A cache has a fixed number of rows, one sequence each (Shazeer 2019, section 2.4; Pope et al. 2022,
section 2). Any rows can be emptied (`KVCache.reset`), extended by a prompt or a part of it
(`prefill`), or extended by one token (`decode_step`); the other rows do not change.
"""

from copy import copy

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

CACHE_BYTES = 4 * 2**30  # of the keys and values of a batch, in float32


class KVCache:
    """Keys and values for `model`, a `GPT`, with up to `positions` positions in each row.

    Its device and dtype are those of the keys: create it under the autocast in which it is used.

    Attributes:
        lengths: (rows,), the number of cached positions of each row. It is on the host and does not
            depend on sampled ids, so no step waits for the GPU.
        memory: one tensor (2, rows, n_kv_head, size, head_dim) for each layer: keys, then values.
        size: capacity of a row in positions, at most the model's block_size.
        last_ids: (rows, ngrams - 1), the newest ids of each row, -1 before the first.
        positions: (size,), 0 to size - 1, on the device.
    """

    def __init__(self, model, rows, positions):
        c, weight = model.config, model.lm_head.weight
        dtype, kind = weight.dtype, weight.device.type
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        self.size = min(positions, c.block_size)
        shape = (2, rows, c.kv_heads, self.size, c.head_dim)
        self.memory = [weight.new_zeros(shape, dtype=dtype) for _ in range(c.n_layer)]
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.last_ids = torch.full((rows, c.ngrams - 1), -1, device=weight.device)
        self.positions = torch.arange(self.size, device=weight.device)

    def reset(self, rows):
        """Empty `rows`, a list of row numbers, for new sequences.

        The memory is zeroed too: a mask hides old values, but not infinity or NaN.
        """
        index = torch.tensor(rows, device=self.last_ids.device)
        for memory in self.memory:
            if len(rows) == len(self.lengths):
                memory.zero_()
            else:
                memory.index_fill_(1, index, 0)
        self.last_ids[index] = -1
        self.lengths[rows] = 0

    def select(self, rows):
        """A cache of `rows`, a list of row numbers, alone: a copy of their memory."""
        index = torch.tensor(rows, device=self.last_ids.device)
        selected = copy(self)
        selected.memory = [memory.index_select(1, index) for memory in self.memory]
        selected.lengths, selected.last_ids = self.lengths[rows], self.last_ids[index]
        return selected

    def full_rows(self):
        """The numbers of the rows without free positions."""
        return [row for row, length in enumerate(self.lengths.tolist()) if length == self.size]

    def extend(self, idx, rows=None, counts=None):
        """Extend `rows` by the ids idx (R, T). Returns the `CacheStep` of the forward pass.

        Args:
            rows: R distinct row numbers; None: all rows.
            counts: the number of ids of each row, if it is padded on the right; None: T. For T > 1
                all `rows` must have the same length.

        Raises:
            ValueError: a row has no room for T positions, or T > 1 and the lengths differ.
        """
        T = idx.size(1)
        starts = self.lengths if rows is None else self.lengths[rows]
        lengths = starts.tolist()
        start, longest = min(lengths), max(lengths) + T
        if longest > self.size:
            raise ValueError(f"a cache of {self.size} positions is full")
        if T > 1 and start + T < longest:
            raise ValueError("rows of different lengths must be extended by one token each")
        before = self.push_ids(idx, rows, counts)
        if rows is None:
            self.lengths = starts + (T if counts is None else counts)
        else:
            self.lengths[rows] = starts + (T if counts is None else counts)
        if start + T == longest:
            positions, masked = None, T > 1 and start > 0
        else:
            positions = starts[:, None].to(idx.device, non_blocking=True)
            start, masked = None, True
        return CacheStep(self, rows, positions, longest, before, start, masked)

    def static_step(self, idx, positions, longest=None):
        """The `CacheStep` of all rows for idx (rows, 1) at `positions` (rows, 1) on the device.

        Attention reads the first `longest` positions, more than any row holds; None: all. Shapes do
        not depend on `positions`, and no value comes from the host, so a CUDA graph can capture the
        step. The caller must add 1 to `lengths`.
        """
        before, longest = self.push_ids(idx), longest or self.size
        return CacheStep(self, None, positions, longest, before, start=None, masked=True)

    def padded_step(self, idx, first, live, longest):
        """The `CacheStep` of the rows from `first` on for idx (R, 1), one token each, in which only
        the rows `live`, a list of row numbers, are extended: the others are computed to fill the
        batch, and lose nothing that they hold.

        The shapes depend on R and `longest` alone, the positions that attention reads: more than
        any live row holds. An idle row writes where its next token will be written, or, if it is
        full, over its last position: it is read again before it is extended.
        """
        rows = [*range(first, first + len(idx))]
        positions = self.lengths[rows].clamp(max=self.size - 1)[:, None].to(idx.device)
        before = None
        if self.last_ids.size(1):
            before = self.last_ids[rows].clone()
            self.push_ids(idx[[row - first for row in live]], live)
        self.lengths[live] += 1
        return CacheStep(self, rows, positions, longest, before, start=None, masked=True)

    def push_ids(self, idx, rows=None, counts=None):
        """Append the ids idx (R, T) to `last_ids`. Returns the ids (R, ngrams - 1) before them, for
        `NgramEmbedding`, or None for a model without n-grams."""
        kept = self.last_ids.size(1)
        if kept == 0:
            return None
        rows = slice(None) if rows is None else rows
        before = self.last_ids[rows].clone()
        ids = torch.cat((before, idx), dim=1)
        if counts is None:
            self.last_ids[rows] = ids[:, -kept:]
        else:
            columns = torch.arange(kept) + torch.as_tensor(counts)[:, None]
            self.last_ids[rows] = ids.gather(1, columns.to(ids.device))
        return before


class CacheStep:
    """The cache in one forward pass over some rows: the argument `cache` of `GPT.forward`.

    Args:
        rows: R row numbers, or None for all.
        positions: of the new ids, (R, 1) on the device, or None if `start` is given.
        longest: number of positions that attention reads, including new ones.
        before: see `KVCache.push_ids`.
        start: position of the first new id, or None if it differs between rows.
        masked: whether a mask must hide some of the `longest` positions.

    Attributes:
        mask: additive mask (R or 1, 1, T, longest), or None.
    """

    def __init__(self, cache, rows, positions, longest, before, start, masked):
        self.memory, self.row_positions, self.before = cache.memory, positions, before
        self.start, self.longest, self.all_positions = start, longest, cache.positions
        self.all_rows, self.rows = rows is None, None
        if self.all_rows:
            self.span = 0, len(cache.lengths)
        else:
            self.span = rows[0], len(rows)  # adjacent rows are read as a view, others as a copy
            if rows != [*range(rows[0], rows[0] + len(rows))]:
                self.rows = torch.tensor(rows, device=cache.positions.device)
        self.slots = self.mask = None
        if start is None or self.rows is not None:  # write by indices that broadcast to (R, T)
            first, R = self.span
            adjacent = torch.arange(first, first + R, device=cache.positions.device)
            indices = adjacent if self.rows is None else self.rows
            self.slots = indices[:, None], self.positions
        if masked:
            hidden = cache.positions[:longest] > self.positions[..., None]
            mask = hidden.float().masked_fill_(hidden, -torch.inf)
            self.mask = mask.view(-1, 1, *mask.shape[-2:])

    @property
    def positions(self):
        """Positions of the new ids, on the device: (T,) for all rows, or (R, 1)."""
        if self.start is None:
            return self.row_positions
        return self.all_positions[self.start : self.longest]

    def layer(self, i):
        """The cache of layer i."""
        return CacheLayer(self, self.memory[i])

    def write(self, memory, new):
        """Store `new` (..., R, n_kv_head, T, head_dim), keys, values or both, in `memory`."""
        if self.slots is None:
            memory = memory if self.all_rows else memory.narrow(-4, *self.span)
            memory.narrow(-2, self.start, self.longest - self.start).copy_(new)
        else:
            rows, positions = self.slots
            memory.transpose(-3, -2)[..., rows, positions, :, :] = new.transpose(-3, -2)

    def read(self, memory):
        """The part of `memory` that attention reads: (..., R, n_kv_head, longest, head_dim)."""
        memory = memory.narrow(-2, 0, self.longest)
        if self.rows is not None:
            return memory.index_select(-4, self.rows)
        return memory if self.all_rows else memory.narrow(-4, *self.span)


class CacheLayer:
    """One layer of a `CacheStep`."""

    def __init__(self, step, memory):
        self.step, self.memory = step, memory

    def update(self, k, v):
        """Store the new keys and values, (R, n_kv_head, T, head_dim) each. Returns all keys, all
        values and the mask, for `CausalSelfAttention`."""
        step, memory = self.step, self.memory
        step.write(memory[0], k)
        step.write(memory[1], v)
        if step.start == 0:  # nothing else is cached
            return k, v, None
        k, v = step.read(memory)
        return k, v, None if step.mask is None else step.mask.type_as(k)


@torch.no_grad()
def prefill(model, prompts, cache, rows):
    """Extend each of `rows`, a list of row numbers, by its prompt, a tensor (T,) of ids, T >= 0.

    A long prompt may be passed in parts. Leave the last token to `decode_step`, which computes the
    logits after it. Rows of equal length form one batch, padded on the right: causal attention
    ignores the padding, and later tokens overwrite it.
    """
    starts = cache.lengths[rows].tolist()
    for start in sorted(set(starts)):
        group = [i for i, length in enumerate(starts) if length == start and len(prompts[i])]
        if group:
            prefill_batch(model, [prompts[i] for i in group], cache, [rows[i] for i in group])


def prefill_batch(model, prompts, cache, rows):
    """`prefill` for rows of equal length. The last block computes keys and values only, since its
    output is not used."""
    counts = torch.tensor([len(prompt) for prompt in prompts])
    ids = pad_sequence(prompts, batch_first=True)
    if cache.lengths[rows[0]] + ids.size(1) == cache.size - 1:
        ids = pad(ids, (0, 1))  # attention over 63 positions is slower than over 64
    step = cache.extend(ids, None if rows == [*range(len(cache.lengths))] else rows, counts)
    *blocks, last = model.transformer.h
    x, cos_sin = model.embed(ids, step.positions, step.before)
    for i, block in enumerate(blocks):
        x = block(x, step.layer(i), cos_sin)
    _, k, v = last.attn.queries_keys_values(last.ln_1(x), cos_sin)
    step.layer(len(blocks)).update(k, v)


@torch.no_grad()
def prefill_window(model, texts, cache, rows, exact_window=False):
    """Empty `rows` and prefill each with the window of its text, a tensor (T,), T >= 1, except for
    the last token, which is for `decode_step`. For new sequences, and for full rows: cached keys
    depend on the position, so a window that has moved must be computed again."""
    if used := [row for row, n in zip(rows, cache.lengths[rows].tolist(), strict=True) if n]:
        cache.reset(used)
    size = model.config.block_size
    windows = [text[window_start(len(text), size, exact_window) : -1] for text in texts]
    prefill(model, windows, cache, rows)


@torch.no_grad()
def decode_step(model, ids, cache, rows=None, decoder=None):
    """Extend `rows` by one token each, ids (R, 1). Returns the logits (R, vocab_size) after them.

    Args:
        rows: R row numbers; None: all rows.
        decoder: a `brisk.cpu.decode.Decoder` to use instead of the model.

    Raises:
        ValueError: a row is full; see `prefill_window`.
    """
    return compute_step(model, ids, cache.extend(ids, rows), decoder)


def compute_step(model, ids, step, decoder=None):
    """The logits (R, vocab_size) after the ids (R, 1) of a `CacheStep` of one token a row."""
    if decoder is not None:
        return decoder.decode_step(ids, step)
    return model(ids, cache=step)[0][:, -1]


def window_start(T, block_size, exact_window=False):
    """Index of the first of T tokens in the model's window. It moves by half of `block_size` when
    the window is full or, with `exact_window`, by one with every token."""
    if T <= block_size:
        return 0
    step = 1 if exact_window else (block_size + 1) // 2
    return -((block_size - T) // step) * step


def row_bytes(config):
    """Bytes of a row of `block_size` positions of a float32 `KVCache`."""
    return 8 * config.n_layer * config.kv_heads * config.head_dim * config.block_size


def rows_that_fit(config, most):
    """The rows, a power of two up to `most`, for which `CACHE_BYTES` suffice."""
    fitting = min(most, max(CACHE_BYTES // row_bytes(config), 1))
    return 1 << (fitting.bit_length() - 1)
