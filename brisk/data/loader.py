"""Batches from token files. A batch is a pure function of (seed, position).

`position` is the number of rows consumed so far. It is the only state, so a run resumes exactly, on
any number of ranks. Each epoch visits every row once, in a new random order and with a new random
offset of the windows.
"""

import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from brisk import repository
from brisk.data.document_index import document_index
from brisk.errors import UserError, did_you_mean

SCAN = 1 << 26  # tokens checked against the vocabulary when a file is opened


class TokenFile:
    """A file of little-endian token ids, divided into rows of `block_size` tokens with targets.

    With `rows="windows"`, a row is a window of `block_size + 1` consecutive tokens. With
    `rows="documents"`, it is the end-of-text token `eot` followed by one document, truncated to
    `block_size` tokens; targets after its end are -1.

    `evenly=n`, for evaluation, takes n rows spread evenly over the file, in order and independent
    of the seed, instead of shuffled epochs.

    Raises `UserError` if the file is too short, truncated, or has ids of `vocab_size` or more.
    """

    def __init__(
        self,
        path,
        block_size,
        vocab_size,
        dtype="uint16",
        seed=1337,
        rows="windows",
        eot=None,
        evenly=0,
    ):
        self.path, self.block_size, self.vocab_size, self.seed = path, block_size, vocab_size, seed
        self.evenly = evenly
        size, width = os.path.getsize(path), np.dtype(dtype).itemsize
        if size % width:
            raise UserError(f"{path} is truncated: {size} bytes is not a multiple of {width}")
        if size // width <= block_size:
            counts = f"{size // width} tokens, block_size={block_size} needs {block_size + 1}"
            raise UserError(f"{path} has {counts}; use a longer text or a smaller --block_size")
        self.tokens = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
        self.check(self.tokens[:SCAN])
        self.documents = self.find_documents(eot) if rows == "documents" else None
        self.eot = eot
        if self.documents is None:
            self.rows = max(1, len(self.tokens) // block_size - 1)  # leaves room for the offset
        else:
            self.rows = len(self.documents)

    def find_documents(self, eot):
        """Return (first, end) of each document, see `document_index`."""
        if eot is None:
            raise UserError(f"rows=documents: the tokenizer of {self.path} has no end-of-text")
        documents = document_index(self.path, self.tokens, eot)
        if len(documents) == 0:
            raise UserError(f"rows=documents: {self.path} has no end-of-text after a document")
        return documents

    def indices(self, positions):
        """Return the arrays (epochs, rows) for an array of positions."""
        if self.evenly:
            return np.zeros_like(positions), positions * self.rows // self.evenly % self.rows
        epochs, ranks = np.divmod(positions, self.rows)
        rows = np.empty_like(ranks)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            rows[now] = shuffled(ranks[now], self.rows, hash64(self.seed, int(epoch)))
        return epochs, rows

    def batch(self, position, count):
        """Return inputs and targets (x, y) of `count` rows from `position` on: int64 tensors,
        (count, block_size)."""
        epochs, rows = self.indices(position + np.arange(count))
        T = self.block_size
        if self.documents is None:
            slack = len(self.tokens) - 1 - self.rows * T  # largest offset of the windows
            keys = [hash64(self.seed + 1, int(epoch)) for epoch in epochs]
            offsets = [0 if self.evenly else key % (slack + 1) for key in keys]
            first = rows * T + np.array(offsets, dtype=np.int64)
            window = self.tokens[first[:, None] + np.arange(T + 1)].astype(np.int64)
            x, y = window[:, :-1], window[:, 1:]
        else:
            first, end = self.documents[rows].T[:, :, None]
            at = first + np.arange(T)
            y = np.where(at < end, self.tokens[np.minimum(at, end - 1)].astype(np.int64), -1)
            x = np.concatenate([np.full((count, 1), self.eot), np.maximum(y[:, :-1], 0)], axis=1)
        for ids in (x, y):
            self.check(ids, f" (rows {position} to {position + count - 1})")
        return torch.from_numpy(np.ascontiguousarray(x)), torch.from_numpy(np.ascontiguousarray(y))

    def targets(self, position, count):
        """The number of targets other than -1 in `count` rows from `position` on."""
        if self.documents is None:
            return count * self.block_size
        _, rows = self.indices(position + np.arange(count))
        first, end = self.documents[rows].T
        return int(np.minimum(end - first, self.block_size).sum())

    def check(self, ids, where=""):
        if ids.size and (highest := int(ids.max())) >= self.vocab_size:
            raise UserError(
                f"{self.path} has the token id {highest}{where}, but the model's vocabulary ends "
                f"at {self.vocab_size - 1}; prepare the data with the model's tokenizer"
            )


def find_data_dir(data_dir, dataset):
    """The folder of token files: `data_dir` if given, else `data/<dataset>`.

    Raises `UserError` if it is missing, with the command that makes it.
    """
    folder = Path(data_dir) if data_dir else Path("data", dataset)
    clone = repository()
    if not folder.is_dir() and not data_dir and clone:
        folder = clone / folder  # the working directory is not the repository
    path = data_dir or dataset
    if not folder.is_dir() and os.path.isfile(path):
        raise UserError(f"{path} is a file; to train on its text: --input={path}")
    missing = [name for name in ("train.bin", "val.bin") if not os.path.isfile(folder / name)]
    if missing:
        made = f"make it with: python {folder / 'prepare.py'}"
        known = sorted(path.parent.name for path in folder.parent.glob("*/prepare.py"))
        if not known and not clone:
            made = "prepare it in a clone of briskGPT and name its folder: --data_dir=PATH"
        elif not (folder / "prepare.py").exists():
            made = f"known data sets: {', '.join(known) or 'none'}"
            made += did_you_mean(folder.name, known)
        raise UserError(f"no {' and no '.join(missing)} in {folder}; {made}")
    return folder


def to_device(batch, device):
    """Move the tensors of `batch` to `device`; to a GPU asynchronously, from pinned memory.

    Between log lines the host is therefore ahead of the GPU: it prepares and sends the next batch
    while the GPU computes. PyTorch reuses pinned memory only after the copy from it.
    """
    if device.type == "cuda":
        return tuple(t.pin_memory().to(device.device, non_blocking=True) for t in batch)
    return tuple(t.to(device.device) for t in batch)


def shuffled(ranks, n, key):
    """Apply a pseudo-random permutation of range(n), selected by `key`, to the array `ranks`.

    A Feistel network over the smallest even number of bits that holds n, repeated for values
    outside range(n) (cycle walking; Black & Rogaway 2002, Ciphers with Arbitrary Finite Domains,
    section 3). It needs no table of n entries, and does not depend on the random generator of a
    library, whose stream might change.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = np.uint64((1 << int(half)) - 1)
    values, outside = ranks.astype(np.uint64), np.ones(len(ranks), dtype=bool)
    while outside.any():
        left, right = values[outside] >> half, values[outside] & low
        for number in range(6):
            left, right = right, left ^ (mix(right + np.uint64(hash64(key, number))) & low)
        values[outside] = left << half | right
        outside = values >= n
    return values.astype(np.int64)


@lru_cache(maxsize=256)  # each step of an epoch needs the same hashes
def hash64(*numbers):
    """A 64-bit hash of integers."""
    value = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        value = mix(value + np.uint64(number % (1 << 64)) + np.uint64(0x9E3779B97F4A7C15))
    return int(value[0])


def mix(x):
    """The finalizer of SplitMix64 (Steele et al. 2014), on a uint64 array."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
