"""Batch shapes for which a row's result is bit-exact in any batch."""

import random

import pytest
import torch
from networks import MODERN, random_model

from brisk.cpu.decode import Decoder
from brisk.generation.batch_shapes import ROWS, BatchShapes, agreeing_shapes
from brisk.generation.kv_cache import KVCache, compute_step, prefill

NETWORKS = [{}, {**MODERN, "n_kv_head": 1}, {"ngrams": 3, "ngram_rows": 50}]
NETWORK = pytest.mark.parametrize("network", NETWORKS, ids=["gpt2", "modern", "ngrams"])


def prompt(length, seed=0):
    return random.Random(seed).choices(range(61), k=length)


@NETWORK
def test_rows_have_the_same_bits_in_all_shapes(network):
    """Every row in every pair of agreeing shapes, with other texts and lengths in the batch."""
    model = random_model(**{**network, "block_size": 200})
    with torch.inference_mode():
        cache, decoder = KVCache(model, 16, 999), Decoder.of(model)
        shapes = agreeing_shapes(model, cache, decoder)
        assert shapes.rows[-1] <= 16 and shapes.positions[-1] == 200
        text = torch.tensor(prompt(50))
        found = set()
        for positions in [n for n in shapes.positions if n >= 50]:
            for rows in shapes.rows:
                for row in range(rows):
                    cache.reset([*range(16)])
                    others = [torch.tensor(prompt(5 + i, i)) for i in range(rows)]
                    others[row] = text[:-1]
                    prefill_each(model, others, cache)
                    ids = torch.full((rows, 1), 7)
                    ids[row] = text[-1]
                    step = cache.padded_step(ids, 0, [*range(rows)], positions)
                    logits = compute_step(model, ids, step, decoder)[row]
                    found.add(tuple(logits.tolist()))
    assert len(found) == 1


def prefill_each(model, texts, cache):
    for row, text in enumerate(texts):
        prefill(model, [text], cache, [row])


def test_steps_cover_the_live_rows():
    shapes = BatchShapes([4, 8, 16], [64, 128, 200])
    assert [*shapes.split([0])] == [(0, 4, [0])]
    assert [*shapes.split([1, 7])] == [(0, 8, [1, 7])]
    assert [*shapes.split([3, 16, 30, 47])] == [(0, 4, [3]), (16, 16, [16, 30]), (32, 16, [47])]
    assert [shapes.longest(n) for n in (1, 64, 65, 128, 129, 200)] == [64, 64, 128, 128, 200, 200]
    assert [*BatchShapes([1], [9]).split([0, 2])] == [(0, 1, [0]), (2, 1, [2])]


def test_kernel_with_a_different_last_row():
    """Then steps have the size at which all rows agree."""

    class Odd(torch.nn.Module):
        def forward(self, ids, cache):
            logits = torch.ones(len(ids), 1, 5)
            if len(ids) > 4:
                logits[-1] += 1e-6
            return logits, None

    cache = KVCache(random_model(), 16, 99)
    assert agreeing_shapes(Odd(), cache).rows == [1, 2, 4]
    assert ROWS[0] == 1  # a row alone always agrees with itself


def test_idle_rows_lose_nothing_in_a_padded_step():
    model = random_model(ngrams=3, ngram_rows=50)
    cache = KVCache(model, 4, 99)
    texts = [torch.tensor(prompt(n, n)) for n in (5, 20, 24, 3)]
    prefill_each(model, texts, cache)
    before = [memory[:, 1, :, :20].clone() for memory in cache.memory]
    last = cache.last_ids[[1, 2]].clone()
    ids = torch.tensor([[1], [9], [9], [2]])
    with torch.no_grad():
        compute_step(model, ids, cache.padded_step(ids, 0, [0, 3], 8))
    assert cache.lengths.tolist() == [6, 20, 24, 4] and cache.last_ids[[1, 2]].equal(last)
    assert cache.last_ids[[0, 3], -1].tolist() == [1, 2]
    for memory, kept in zip(cache.memory, before, strict=True):
        assert memory[:, 1, :, :20].equal(kept)
