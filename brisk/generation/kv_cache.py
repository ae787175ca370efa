"""What a model has read so far, so that a further token costs one position and not all of them.

Keys and values of earlier positions are kept (Shazeer 2019, section 2.4; Pope et al. 2022, section
2). The rows of a batch may be of unlike length: `fill` reads the beginnings of some, and from there
on all rows go forward together, one position a step, each at a position of its own.
"""

import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence


class KVCache:
    """The keys and values of each layer at the positions that each of `rows` rows has read.

    Row i has positions 0 to `lengths[i]` - 1. Of `model`, a `GPT`, only the sizes are taken; no
    row has more than `positions`, or than the model's block_size.
    """

    def __init__(self, model, rows, positions):
        positions = min(positions, model.config.block_size)
        self.positions, self.lengths = positions, [0] * rows
        self.layers = [LayerCache(rows, positions) for _ in range(model.config.n_layer)]
        self.ends = None  # `lengths` on the device, where they differ
        shape, device = (rows, model.config.ngrams - 1), model.lm_head.weight.device
        self.newest = torch.full(shape, -1, device=device)  # of the ids read; -1 before the first

    def set_lengths(self, rows, lengths, device):
        """These `rows` have so many positions now."""
        for row, length in zip(rows, lengths, strict=True):
            self.lengths[row] = length
        differ = min(self.lengths) < max(self.lengths)
        self.ends = torch.tensor(self.lengths, device=device)[:, None] if differ else None

    def step(self, idx):
        """Let each row be one position longer, that of `idx` (B, 1), which `LayerCache.append` of
        every layer is to fill.

        Returns:
            The number of that position, an int, or (B, 1) where they differ; and the ids before
            it, as `NgramEmbedding` takes them.
        """
        position = longest = max(self.lengths)
        if longest == self.positions:
            raise ValueError(f"a cache of {longest} positions is full")
        self.lengths = [length + 1 for length in self.lengths]
        mask = None
        if self.ends is not None:
            position, self.ends = self.ends, self.ends + 1
            beyond = torch.arange(longest + 1, device=position.device) > position
            mask = beyond.float().masked_fill_(beyond, -torch.inf)[:, None, None]
        for layer in self.layers:
            layer.place(position, longest + 1, mask)
        before = self.newest
        if before.size(1):
            self.newest = torch.cat((before[:, 1:], idx), dim=1)
        return position, before


class LayerCache:
    """One layer of a `KVCache`: `memory` (2, B, n_kv_head, positions, head_dim) of keys, then
    values. It is taken once, with the first keys: what they are in precision and device, it is
    too. It begins as zeros, for what a mask hides must still be numbers."""

    def __init__(self, rows, positions):
        self.rows, self.positions, self.memory = rows, positions, None

    def reserve(self, like):
        """Take the memory, for keys such as `like` (B, n_kv_head, T or none, head_dim)."""
        if self.memory is None:
            shape = (2, self.rows, like.size(1), self.positions, like.size(-1))
            self.memory = like.new_zeros(shape)

    def fill(self, rows, k, v):
        """Take keys and values (R, n_kv_head, T, head_dim) of the rows with the numbers `rows`
        (R,), at the positions from 0 on."""
        self.reserve(k)
        for part, new in zip(self.memory.narrow(3, 0, k.size(2)), (k, v), strict=True):
            if len(rows) == self.rows:  # four times as fast
                part.copy_(new)
            else:
                part.index_copy_(0, rows, new)

    def place(self, position, longest, mask):
        """Say where `append` is to put what comes next: at `position`, an int or (B, 1); that the
        longest row is then so long; and what hides the others' ends, (B, 1, 1, longest) or None."""
        self.position, self.longest, self.mask = position, longest, mask

    def append(self, new):
        """Take the keys and values (2, B, n_kv_head, head_dim) of one more position; those of all
        positions of the longest row, (2, B, n_kv_head, longest, head_dim)."""
        self.reserve(new[0])
        if isinstance(self.position, int):
            self.memory.select(3, self.position).copy_(new)
        else:
            rows = torch.arange(self.rows, device=new.device)
            self.memory[:, rows, :, self.position.squeeze(1)] = new.transpose(0, 1)
        return self.memory.narrow(3, 0, self.longest)

    def extend(self, k, v):
        """`append` for the model: keys and values (B, n_kv_head, 1, head_dim), those of all
        positions, and the mask."""
        keys, values = self.append(torch.stack((k, v)).squeeze(3))
        return keys, values, None if self.mask is None else self.mask.type_as(k)


class Filling:
    """A layer of a cache while `fill` reads some rows from their beginning."""

    def __init__(self, layer, rows):
        self.layer, self.rows = layer, rows

    def extend(self, k, v):
        self.layer.fill(self.rows, k, v)
        return k, v, None


@torch.no_grad()
def fill(model, prompts, cache, rows):
    """Read `prompts`, tensors (T,) of ids, T at least 0, from position 0 on into the `rows` (their
    numbers) of the `cache`. What these rows had is forgotten.

    Shorter prompts are padded on their right, where a causal model does not see it, and where the
    next positions will be written. Of the last block only keys and values are computed: nothing
    else of it is read again.
    """
    lengths = [len(prompt) for prompt in prompts]
    ids = pad_sequence(prompts, batch_first=True)
    cache.set_lengths(rows, lengths, ids.device)
    if kept := cache.newest.size(1):
        for row, prompt in zip(rows, prompts, strict=True):
            tail = prompt[-kept:]
            cache.newest[row] = pad(tail, (kept - len(tail), 0), value=-1)
    if ids.size(1) == 0:
        return
    if ids.size(1) == cache.positions - 1:  # attention on 63 takes longer than on 64
        ids = pad(ids, (0, 1))
    rows = torch.tensor(rows, device=ids.device)
    *blocks, last = model.transformer.h
    layers = [Filling(layer, rows) for layer in cache.layers]
    x, angles = model.embed(ids)
    for block, layer in zip(blocks, layers[:-1], strict=True):
        x = block(x, layer, angles)
    _, k, v = last.attn.queries_keys_values(last.ln_1(x), angles)
    layers[-1].extend(k, v)


@torch.no_grad()
def next_token_logits(model, ids, lengths, cache, decoder=None, exact_window=False):
    """Logits (B, vocab_size) of the token after each of B texts, of which the `cache` has what
    earlier calls have read.

    Only what is new is read: the last token of each text, by the `decoder` where there is one, and
    before it the whole window of a text whose window has moved.

    Args:
        ids: (B, W), the texts, which all end in the last column.
        lengths: how many tokens each of them has, at least 1; none has more than W.
        exact_window: see `window_start`.
    """
    block_size = model.config.block_size
    starts = [window_start(T, block_size, exact_window) for T in lengths]
    moved = [
        row
        for row, (T, start) in enumerate(zip(lengths, starts, strict=True))
        if cache.lengths[row] != T - start - 1
    ]
    if moved:
        W = ids.size(1)
        unread = [ids[row, W - lengths[row] + starts[row] : -1] for row in moved]
        fill(model, unread, cache, moved)
    if decoder is not None:
        return decoder.logits_after(ids[:, -1:], cache)
    return model(ids[:, -1:], cache=cache)[0][:, -1]


def window_start(T, block_size, exact_window=False):
    """Where the window on T tokens begins: half of `block_size` later each time it is full, or,
    with `exact_window`, one later at each token."""
    if T <= block_size:
        return 0
    step = 1 if exact_window else (block_size + 1) // 2
    return -((block_size - T) // step) * step
