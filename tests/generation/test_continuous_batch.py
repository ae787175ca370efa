"""Continuous batching beside `generate`: equal logits up to rounding, and so equal texts, except
where a random number lies on the edge between two tokens."""

import copy
import math
import random

import pytest
import torch
from networks import MODERN, random_model

from brisk.generation import continuous_batch, generate
from brisk.generation.continuous_batch import ContinuousBatch, Sequence

SIZES = dict(n_layer=4, n_head=8, n_embd=128, block_size=200, vocab_size=1024)
GROUPED = {**MODERN, "n_kv_head": 2}
# Length and seed of a prompt, seed and number of its sample. At token 46 of the first, the grouped
# network draws 96 where `generate` draws 97 (on an AMD EPYC): see `test_texts_part_at_edges_only`.
PROMPTS = [(76, 142, 77, 1), (20, 1, 5, 0), (9, 2, 6, 3)]
COUNT = 48


def prompt(length, seed):
    return random.Random(seed).choices(range(1024), k=length)


def with_logits(module, run, monkeypatch):
    """What `run` returns, and the logits (V,) that it draws each token from."""
    drawn, original = [], module.sample_rows

    def sample_rows(logits, uniform, settings):
        drawn.append(logits[0].clone())
        return original(logits, uniform, settings)

    with monkeypatch.context() as patch:
        patch.setattr(module, "sample_rows", sample_rows)
        return run(), drawn


def in_batch(model, ids, seed, number):
    """The ids of a sample from a `ContinuousBatch`, and the random numbers of its tokens."""
    with torch.inference_mode():
        batch, sequence = ContinuousBatch(model, 8), Sequence([*ids], COUNT, seed=seed)
        sequence.number = number
        batch.add(sequence)
        while sequence.drawn < COUNT:
            batch.step()
    return sequence.ids, sequence.uniforms


def rounding_error(exact, ids):
    """How far float32 may change each row of the logits after `ids`, (T,).

    A product of n terms in float32 is the exact product with weights changed by about sqrt(n) *
    2^-24 of their size (Higham and Mary, A new approach to probabilistic rounding error analysis,
    2019), here in float64 and with random signs; the largest change in 8 trials.
    """
    relative = math.sqrt(max(exact.config.block_size, 4 * exact.config.n_embd)) * 2.0**-24
    logits, largest = logits_of(exact, ids), torch.zeros(len(ids), dtype=torch.float64)
    for trial in range(8):
        changed, random_signs = copy.deepcopy(exact), torch.Generator().manual_seed(trial)
        for weight in changed.parameters():
            signs = 2 * torch.randint(2, weight.shape, generator=random_signs) - 1
            weight.data.mul_(1 + relative * signs)
        change = (logits_of(changed, ids) - logits).abs().amax(-1)
        largest = torch.maximum(largest, change)
    return largest


@torch.no_grad()
def logits_of(model, ids):
    ids = torch.tensor([ids])
    return model(ids, ids)[0][0]


@pytest.mark.parametrize(("length", "prompt_seed", "seed", "number"), PROMPTS)
@pytest.mark.parametrize("network", [{}, GROUPED], ids=["gpt2", "grouped"])
def test_texts_part_at_edges_only(network, length, prompt_seed, seed, number, monkeypatch):
    """The logits of both are within rounding of float64's. Where the tokens differ first, the
    random number is within rounding of an edge of float64's cumulative distribution."""
    model = random_model(**network, **SIZES)
    exact, ids = copy.deepcopy(model).double(), prompt(length, prompt_seed)
    (batched, uniforms), mine = with_logits(
        continuous_batch, lambda: in_batch(model, ids, seed, number), monkeypatch
    )
    idx, options = torch.tensor([ids]), dict(seed=seed, samples=[number])
    (text,), its = with_logits(generate, lambda: model.generate(idx, COUNT, **options), monkeypatch)
    pairs = zip(batched, text.tolist(), strict=True)
    equal = next((i for i, (a, b) in enumerate(pairs) if a != b), len(batched))
    steps = min(equal - length + 1, COUNT)
    expected = logits_of(exact, batched[:-1])[length - 1 :]
    error = rounding_error(exact, batched[:-1])[length - 1 :]
    for step in range(steps):
        for logits in (mine[step], its[step]):
            assert (logits - expected[step]).abs().max() <= error[step]
    if equal < len(batched):
        cdf, uniform = expected[steps - 1].softmax(-1).cumsum(-1), uniforms[steps - 1]
        first, last = sorted((batched[equal], text[equal].item()))
        # A change of the logits by e changes a probability by the factor exp(2 e) at most.
        allowed = uniform * math.expm1(2 * error[steps - 1].item()) + 2.0**-24
        assert (cdf[first:last] - uniform).abs().max() <= allowed
