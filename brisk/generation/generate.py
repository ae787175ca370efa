"""Autoregressive sampling from a `GPT`."""

import numpy as np
import torch

from brisk.cpu.decode import Decoder
from brisk.cuda_graph import GraphPool
from brisk.generation.decode_graph import DecodeGraphs
from brisk.generation.kv_cache import KVCache, decode_step, prefill_window


def generate(
    model,
    idx,
    max_new_tokens,
    temperature=1.0,
    top_k=None,
    *,
    top_p=None,
    stop_ids=(),
    vocab_size=None,
    suppress=(),
    seed=None,
    samples=None,
    on_token=None,
    exact_window=False,
    cuda_graph=False,
):
    """Continue each of B prompts by up to `max_new_tokens` sampled tokens.

    Prompts of any lengths run as one batch, each as if it were alone. The model sees the whole text
    up to `block_size` tokens, each computed once (see `kv_cache`). A longer text is seen through a
    window of its newest tokens: when it is full its older half is dropped, and the newer half is
    computed again at positions from 0, because cached keys and values depend on their position. The
    window depends on the number of tokens alone. The model is in eval mode for the call.

    Each of `temperature`, `top_k`, `top_p` and `seed` is one value, or a list with one per prompt.

    Args:
        idx: token ids of the prompts: (B, T), T at least 1; or a list of B prompts of any lengths,
            each a tensor (T,) or a list of ints.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens; None or 0 means all.
        top_p: sample from the smallest set of most likely tokens with at least this total
            probability (nucleus sampling, Holtzman et al. 2020); None or 1 means all.
        stop_ids: a sample that reaches one of these is finished.
        vocab_size: ids from here on are never sampled (padding of the vocabulary).
        suppress: further ids that are never sampled, such as that of the unknown word.
        seed: the random numbers of sample i follow from (`seed`, `samples`[i]) alone. None takes
            PyTorch's global generator.
        samples: the numbers of the samples in a larger set; None: 0 to B - 1.
        on_token: called as `on_token(step, ids)` with the sampled ids (B,). It returns True to end
            the generation, or a list of B bools that are True for finished samples, or None.
        exact_window: past `block_size` see the newest `block_size` tokens at every step, as nanoGPT
            does, at the cost of computing all of them at every step.
        cuda_graph: on a CUDA device, replay steps as graphs (`decode_graph`): faster where the host
            is the limit, after a slow start. It needs one setting for all prompts; other devices
            and batches are sampled without.

    Returns:
        Prompts and samples: (B, T + n), or, for a list of prompts, a list of tensors (T + n,). A
        finished sample repeats its last token. n is less than `max_new_tokens` where every sample
        finished or `on_token` ended the generation.

    Raises:
        ValueError: no prompt or an empty one, a negative temperature, top_k or number of tokens,
            a top_p outside 0 to 1, a list of another length than B, every token suppressed.
    """
    prompts, device = as_tensors(idx, model), model.lm_head.weight.device
    B, settings = len(prompts), sampling_settings(len(prompts), temperature, top_k, top_p)
    as_graphs = cuda_graph and GraphPool.supports(device) and len(set(settings)) == 1
    # Fewer rows would be another graph.
    batch = Batch(model, prompts, max_new_tokens, exact_window, keeps_rows=as_graphs)
    stop_ids = frozenset(stop_ids)
    # Drawn before the loop, so that the device need not wait for the host at each token.
    uniforms = draw_uniforms(range(B) if samples is None else samples, max_new_tokens, seed)
    uniforms, never = uniforms.to(device), suppressed_ids(suppress, vocab_size, device)

    def draw(logits, uniform):
        logits = mask_logits(logits[:, :vocab_size], never)
        return sample_rows(logits, uniform, [settings[text] for text in batch.texts])

    graphs = DecodeGraphs(batch, draw, uniforms) if as_graphs else None
    was_training = model.training
    model.eval()
    try:
        # A first capture in inference mode leaves the device's generator with tensors that a later
        # capture in training may not change (PyTorch 2.10).
        with torch.no_grad() if graphs else torch.inference_mode():
            for step in range(max_new_tokens):
                if graphs:
                    new = graphs.next_ids()
                else:
                    new = draw(batch.next_logits(), uniforms[batch.rows, step])
                new = batch.append(new)
                ends = on_token(step, new) if on_token is not None else None
                if ends is True or (ends and batch.finish(ends)):
                    break
                if stop_ids and batch.finish([token in stop_ids for token in new.tolist()]):
                    break
    finally:
        model.train(was_training)
    if isinstance(idx, torch.Tensor):
        return batch.ids[:, : batch.end]
    return [batch.text(i) for i in range(B)]


class Batch:
    """Texts of any lengths that grow by one token a step, with their KV cache.

    Attributes:
        ids: (B, longest prompt + max_new_tokens). The texts end in the same column `end`, so that
            sampled tokens have one column a step, and begin in the columns `starts`.
        texts: numbers of the texts that are in the cache, in the order of its rows.
        rows: the same as an index into `ids`.
        finished: for each text whether it is finished; `is_finished` is the same on the device.
        keeps_rows: whether finished texts stay in the cache.
    """

    def __init__(self, model, prompts, max_new_tokens, exact_window=False, keeps_rows=False):
        if not prompts or 0 in map(len, prompts):
            raise ValueError("the prompt is empty; a model needs one token to go on from")
        if max_new_tokens < 0:
            raise ValueError("max_new_tokens cannot be negative")
        self.model, self.exact_window, self.keeps_rows = model, exact_window, keeps_rows
        self.end = max(map(len, prompts))
        self.starts = [self.end - len(prompt) for prompt in prompts]
        self.ids = prompts[0].new_zeros(len(prompts), self.end + max_new_tokens)
        for row, start, prompt in zip(self.ids, self.starts, prompts, strict=True):
            row[start : self.end] = prompt
        self.texts, self.rows = [*range(len(prompts))], slice(None)
        self.finished, self.is_finished = [False] * len(prompts), None
        self.cache, self.is_read = KVCache(model, *self.ids.shape), False
        self.decoder = Decoder.of(model)

    def fill(self):
        """Compute the windows that the cache does not hold: all at first, then those that have
        moved. Returns whether there was one."""
        rows = self.cache.full_rows() if self.is_read else [*range(len(self.texts))]
        if rows:
            texts = [self.text(self.texts[row]) for row in rows]
            prefill_window(self.model, texts, self.cache, rows, exact_window=self.exact_window)
            self.is_read = True
        return bool(rows)

    def newest(self):
        """The last ids (R, 1) of the R texts in the cache."""
        return self.ids[self.rows, self.end - 1 : self.end]

    def next_logits(self):
        """Logits (R, vocab_size) after each of the R texts in the cache."""
        self.fill()
        return decode_step(self.model, self.newest(), self.cache, decoder=self.decoder)

    def append(self, new):
        """Append the ids `new` (R,) to the texts in the cache; finished texts repeat their last id.
        Returns the ids appended to all texts, (B,)."""
        last, column = self.ids[:, self.end - 1], self.ids[:, self.end]
        column[self.rows] = new
        if self.is_finished is not None:
            column.copy_(torch.where(self.is_finished, last, column))
        self.end += 1
        return column

    def finish(self, ends):
        """Finish the texts at which `ends`, B bools, is True. They leave the cache as soon as half
        of its rows are finished: to copy the keys and values of the others takes time. Returns
        whether all texts are finished."""
        finished = [a or b for a, b in zip(self.finished, ends, strict=True)]
        if finished != self.finished:
            self.finished = finished
            self.is_finished = torch.tensor(finished, device=self.ids.device)
            keep = [row for row, text in enumerate(self.texts) if not finished[text]]
            if 0 < 2 * len(keep) <= len(self.texts) and not self.keeps_rows:
                self.cache = self.cache.select(keep)
                self.texts = [self.texts[row] for row in keep]
                self.rows = torch.tensor(self.texts, device=self.ids.device)
        return all(finished)

    def text(self, i):
        """Ids (T,) of text i."""
        return self.ids[i, self.starts[i] : self.end]


def as_tensors(prompts, model):
    """The prompts of `generate` as a list of tensors (T,) on the model's device."""
    device = model.lm_head.weight.device
    return [torch.as_tensor(prompt, dtype=torch.long, device=device) for prompt in prompts]


def per_row(value, rows):
    """`value` as a list with one entry for each of `rows` rows."""
    values = list(value) if isinstance(value, (list, tuple)) else [value] * rows
    if len(values) != rows:
        raise ValueError(f"{len(values)} settings for {rows} rows")
    return values


def sampling_settings(rows, temperature=1.0, top_k=None, top_p=None):
    """A list of (temperature, top_k, top_p), one for each of `rows` rows, for `sample_rows`; each
    of the three is one value or a list. Raises ValueError for values out of range."""
    values = (per_row(value, rows) for value in (temperature, top_k, top_p))
    settings = list(zip(*values, strict=True))
    for temperature, top_k, top_p in settings:
        if temperature < 0 or (top_k or 0) < 0:
            raise ValueError("temperature and top_k cannot be negative")
        if top_p is not None and not 0 <= top_p <= 1:
            raise ValueError(f"top_p={top_p} is not a probability")
    return settings


def suppressed_ids(suppress, vocab_size, device):
    """The ids of `suppress` below `vocab_size` as a tensor."""
    ids = sorted(i for i in set(suppress) if vocab_size is None or i < vocab_size)
    return torch.tensor(ids, dtype=torch.long, device=device)


def mask_logits(logits, ids):
    """The logits (B, V) with those of `ids`, a tensor, at minus infinity."""
    if len(ids) == 0:
        return logits
    logits = logits.index_fill(1, ids, -torch.inf)
    if logits.size(1) == len(ids):
        raise ValueError("every token is suppressed; there is nothing to draw")
    return logits


def draw_uniforms(samples, n, seed):
    """Uniform random numbers (B, n) from 0 to 1. Those of a row depend on its seed and its number
    in `samples` alone, and a longer row begins with the shorter one. `seed` is one for all rows or
    a list; None draws from PyTorch's global generator."""
    rows = torch.empty(len(samples), n)
    if seed is None:
        return rows.uniform_()
    for row, number, own in zip(rows, samples, per_row(seed, len(samples)), strict=True):
        # NumPy hashes the pair into the state: seed 1, sample 2 is not seed 2, sample 1
        generator = np.random.default_rng((own % 2**64, number))
        row.copy_(torch.from_numpy(generator.random(n, dtype=np.float32)))
    return rows


def sample_rows(logits, uniform, settings):
    """`sample_token` with settings for each row, a list of B (temperature, top_k, top_p). Rows of
    equal settings are sampled together, so a row is sampled as if it were alone."""
    if len(groups := set(settings)) == 1:
        return sample_token(logits, uniform, *settings[0])
    ids = torch.empty(len(logits), dtype=torch.long, device=logits.device)
    for one in groups:
        rows = [row for row, own in enumerate(settings) if own == one]
        ids[rows] = sample_token(logits[rows], uniform[rows], *one)
    return ids


def sample_token(logits, uniform, temperature=1.0, top_k=None, top_p=None):
    """One id per row (B,) from logits (B, V), by inverting the cumulative distribution at `uniform`
    (B,)."""
    if temperature < 1e-6 or top_k == 1 or top_p == 0:  # dividing by less could overflow
        return logits.argmax(dim=-1)
    nucleus = top_p is not None and top_p < 1
    top, ids = logits.float(), None
    kept = min(top_k or top.size(-1), top.size(-1))
    if nucleus or kept < top.size(-1):
        top, ids = top.topk(kept)  # in descending order
    probs = torch.softmax(top / temperature, dim=-1)
    if nucleus:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.where(before < top_p, 0)
    cdf = probs.cumsum(dim=-1)
    choice = torch.searchsorted(cdf, uniform.unsqueeze(1) * cdf[:, -1:], right=True)
    choice = choice.clamp(max=cdf.size(-1) - 1)
    # At an edge, rounding may choose a token of probability 0: take the most likely one instead.
    likeliest = probs.argmax(dim=-1, keepdim=True)
    choice = choice.where(probs.gather(1, choice) > 0, likeliest)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)
