"""KV cache for ragged batches: prefill, decode and recycled rows.

Keys and values of earlier positions are kept (Shazeer 2019, section 2.4; Pope et al. 2022, section
2), so a new token costs one position. A cache has a fixed number of rows, one sequence each. Any
rows can be emptied (`KVCache.reset`), extended by a prompt or a part of one (`prefill`), or
extended by one token (`decode_step`), while the other rows stay as they are.
"""

from copy import copy

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


class KVCache:
    """Keys and values of each layer of `model`, a `GPT`, at up to `positions` positions a row.

    It has the device of the model and the dtype of its keys: create it under the autocast in which
    it is used.

    Attributes:
        lengths: (rows,), the number of positions that each row holds. It is on the host, where the
            scheduling happens, and does not depend on what is sampled: no step waits for a GPU.
        memory: a tensor (2, rows, n_kv_head, size, head_dim) a layer: keys, then values.
        size: positions a row can hold, at most the model's block_size.
        last_ids: (rows, ngrams - 1), the newest ids of each row, -1 before its first.
        positions: (size,), 0 to size - 1 on the device.
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
        """Empty `rows`, a list of row numbers, for other sequences.

        The memory is cleared as well: a mask hides old numbers, but not an infinity or NaN.
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
        """The numbers of the rows that hold `size` positions."""
        return [row for row, length in enumerate(self.lengths.tolist()) if length == self.size]

    def extend(self, idx, rows=None, counts=None):
        """Extend `rows` by the ids idx (R, T) and return the `CacheStep` that computes them.

        Args:
            rows: R row numbers, each once; None: all rows.
            counts: how many ids of each row are its own, on the left; None: all T. For T > 1 all
                `rows` hold the same number of positions.

        Raises:
            ValueError: a row has no room for T more positions, or T > 1 and lengths differ.
        """
        T = idx.size(1)
        starts = self.lengths if rows is None else self.lengths[rows]
        lengths = starts.tolist()
        start, longest = min(lengths), max(lengths) + T
        if longest > self.size:
            raise ValueError(f"a cache of {self.size} positions is full")
        if T > 1 and start + T < longest:
            raise ValueError("rows of unlike length are extended by one token each")
        before = self.push_ids(idx, rows, counts)
        if rows is None:
            self.lengths = starts + (T if counts is None else counts)
        else:
            self.lengths[rows] = starts + (T if counts is None else counts)
        if start + T == longest:
            positions, masked = None, T > 1 and start > 0
        else:
            start, positions, masked = None, starts[:, None].to(idx.device), True
        return CacheStep(self, rows, positions, longest, before, start, masked)

    def static_step(self, idx, positions):
        """The `CacheStep` of all rows for idx (rows, 1) at `positions` (rows, 1), a tensor.

        Its shapes do not depend on the positions, and no number in it comes from the host: it can
        be captured in a CUDA graph. The caller adds 1 to the `lengths`.
        """
        before = self.push_ids(idx)
        return CacheStep(self, None, positions, self.size, before, start=None, masked=True)

    def push_ids(self, idx, rows=None, counts=None):
        """Shift the ids idx (R, T) into `last_ids`; the ids (R, ngrams - 1) before them, which
        `NgramEmbedding` reads, or None for a model without n-grams."""
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
    """One forward pass over rows of a `KVCache`: the argument `cache` of `GPT.forward`.

    Args:
        rows: R row numbers, or None for all.
        positions: of the new ids, (R, 1) on the device, or None where `start` is given.
        longest: positions that attention reads, the new ones included.
        before: see `KVCache.push_ids`.
        start: the position of the first new id of every row; None where they differ.
        masked: whether a query must not see some of the `longest` positions.

    Attributes:
        mask: added to the scores, (R or 1, 1, T, longest), or None.
    """

    def __init__(self, cache, rows, positions, longest, before, start, masked):
        self.memory, self.own_positions, self.before = cache.memory, positions, before
        self.start, self.longest, self.all_positions = start, longest, cache.positions
        self.every, self.rows = rows is None, None
        if self.every:
            self.span = 0, len(cache.lengths)
        else:
            self.span = rows[0], len(rows)  # adjacent rows are read as a view, others as a copy
            if rows != [*range(rows[0], rows[0] + len(rows))]:
                self.rows = torch.tensor(rows, device=cache.positions.device)
        self.slots = self.mask = None
        if start is None or self.rows is not None:  # written by indices that broadcast to (R, T)
            first, R = self.span
            adjacent = torch.arange(first, first + R, device=cache.positions.device)
            numbers = adjacent if self.rows is None else self.rows
            self.slots = numbers[:, None], self.positions
        if masked:
            hidden = cache.positions[:longest] > self.positions[..., None]
            mask = hidden.float().masked_fill_(hidden, -torch.inf)
            self.mask = mask.view(-1, 1, *mask.shape[-2:])

    @property
    def positions(self):
        """Of the new ids, on the device: (T,), the same for all rows, or (R, 1)."""
        if self.start is None:
            return self.own_positions
        return self.all_positions[self.start : self.longest]

    def layer(self, i):
        """Layer i of the cache, for its attention."""
        return CacheLayer(self, self.memory[i])

    def write(self, memory, new):
        """Store new (..., R, n_kv_head, T, head_dim), keys, values or both, in `memory`."""
        if self.slots is None:
            memory = memory if self.every else memory.narrow(-4, *self.span)
            memory.narrow(-2, self.start, self.longest - self.start).copy_(new)
        else:
            rows, positions = self.slots
            memory.transpose(-3, -2)[..., rows, positions, :, :] = new.transpose(-3, -2)

    def read(self, memory):
        """What attention reads of `memory`: (..., R, n_kv_head, longest, head_dim)."""
        memory = memory.narrow(-2, 0, self.longest)
        if self.rows is not None:
            return memory.index_select(-4, self.rows)
        return memory if self.every else memory.narrow(-4, *self.span)


class CacheLayer:
    """One layer of a `CacheStep`."""

    def __init__(self, step, memory):
        self.step, self.memory = step, memory

    def update(self, k, v):
        """Store the new keys and values, (R, n_kv_head, T, head_dim) each; all keys, all values
        and the mask, as `CausalSelfAttention` takes them."""
        step, memory = self.step, self.memory
        step.write(memory[0], k)
        step.write(memory[1], v)
        if step.start == 0:  # they are all there is
            return k, v, None
        k, v = step.read(memory)
        return k, v, None if step.mask is None else step.mask.type_as(k)


@torch.no_grad()
def prefill(model, prompts, cache, rows):
    """Extend each of `rows`, a list of row numbers, by its prompt, a tensor (T,) of ids, T >= 0.

    A long prompt may come in parts, by several calls. Leave the last token of a sequence to
    `decode_step`, which gives the logits after it. Rows of equal length are read as one batch,
    padded on the right: causal attention does not see the padding, and later positions overwrite
    it.
    """
    starts = cache.lengths[rows].tolist()
    for start in sorted(set(starts)):
        group = [i for i, length in enumerate(starts) if length == start and len(prompts[i])]
        if group:
            prefill_batch(model, [prompts[i] for i in group], cache, [rows[i] for i in group])


def prefill_batch(model, prompts, cache, rows):
    """`prefill` of rows of equal length. The last block computes keys and values only: nothing
    reads its output."""
    counts = torch.tensor([len(prompt) for prompt in prompts])
    ids = pad_sequence(prompts, batch_first=True)
    if cache.lengths[rows[0]] + ids.size(1) == cache.size - 1:
        ids = pad(ids, (0, 1))  # attention on 63 positions takes longer than on 64
    step = cache.extend(ids, None if rows == [*range(len(cache.lengths))] else rows, counts)
    *blocks, last = model.transformer.h
    x, cos_sin = model.embed(ids, step.positions, step.before)
    for i, block in enumerate(blocks):
        x = block(x, step.layer(i), cos_sin)
    _, k, v = last.attn.queries_keys_values(last.ln_1(x), cos_sin)
    step.layer(len(blocks)).update(k, v)


@torch.no_grad()
def prefill_window(model, texts, cache, rows, exact_window=False):
    """Empty `rows` and read into each the window of its text, a tensor (T,), T >= 1, but for the
    last token, which is `decode_step`'s. For new sequences, and for those that fill their row:
    positions are part of what is cached, so a window that moves is read again."""
    if held := [row for row, n in zip(rows, cache.lengths[rows].tolist(), strict=True) if n]:
        cache.reset(held)
    size = model.config.block_size
    windows = [text[window_start(len(text), size, exact_window) : -1] for text in texts]
    prefill(model, windows, cache, rows)


@torch.no_grad()
def decode_step(model, ids, cache, rows=None, decoder=None):
    """Extend `rows` by one token each, ids (R, 1); the logits (R, vocab_size) after them.

    Args:
        rows: R row numbers; None: all rows. The others are neither computed nor advanced.
        decoder: a `brisk.cpu.decode.Decoder` of the model, used in its place.

    Raises:
        ValueError: a row is full; see `prefill_window`.
    """
    step = cache.extend(ids, rows)
    if decoder is not None:
        return decoder.decode_step(ids, step)
    return model(ids, cache=step)[0][:, -1]


def window_start(T, block_size, exact_window=False):
    """Index of the first of T tokens that the model sees: it moves by half of `block_size` each
    time the window is full, or, with `exact_window`, by one at each token."""
    if T <= block_size:
        return 0
    step = 1 if exact_window else (block_size + 1) // 2
    return -((block_size - T) // step) * step
