"""Ids after ids: how a model's logits become a sample, and a sample becomes text as it comes.

`generate` draws; `TextStream` turns the drawn ids into text that can be shown at once. Text
needs a tokenizer with `token_bytes`; drawing needs a model that takes a cache and has the sizes
`config.block_size` and `config.n_layer`.
"""

import codecs
import math
import re

import numpy as np
import torch

from brisk.decoding import Decoder

# A word is a run without white space. Chinese and Japanese write no spaces: there a character is
# one, with the signs around it, as word processors count them.
UNSPACED = "\u3005-\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[^\w\s]*[{UNSPACED}][^\w\s]*|[^\s{UNSPACED}]+")


class KVCache:
    """Keys and values of one layer at the positions read so far, so that a further token costs one
    position rather than the whole window (Shazeer 2019, section 2.4; Pope et al. 2022, section 2).

    The memory for all `positions` is taken once, with the first keys: what they are in precision
    and device, it is too. Keys stand upright, (B, n_kv_head, head_dim, positions), values lie
    down, (B, n_kv_head, positions, head_dim): both as the products that read them want them.
    """

    def __init__(self, positions):
        self.positions = positions
        self.length = 0  # positions that are filled; 0 begins anew in the same memory
        self.keys = self.values = None

    def extend(self, k, v):
        """Add keys and values (B, n_kv_head, T, head_dim) of T positions, several only where there
        are none yet; all so far, in that layout."""
        T = k.size(2)
        if self.length > 0 and T > 1:
            raise ValueError("after the first positions a cache takes one at a time")
        if self.keys is None:
            shape = (k.size(0), k.size(1), self.positions, k.size(3))
            self.keys, self.values = k.mT.new_empty(shape[:2] + shape[:1:-1]), v.new_empty(shape)
        self.keys.narrow(3, self.length, T).copy_(k.mT)
        self.values.narrow(2, self.length, T).copy_(v)
        self.length += T
        if self.length == T:
            return k, v
        return self.keys.narrow(3, 0, self.length).mT, self.values.narrow(2, 0, self.length)

    def append(self, k, v):
        """Add the key and the value (B, n_kv_head, head_dim) of one position; all so far with
        heads in the place of sequences: (B * n_kv_head, head_dim, T), and lying down the same."""
        self.keys.select(3, self.length).copy_(k)
        self.values.select(2, self.length).copy_(v)
        self.length += 1
        keys, values = self.keys.flatten(0, 1), self.values.flatten(0, 1)
        return keys.narrow(2, 0, self.length), values.narrow(1, 0, self.length)


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
    first_sample=0,
    on_token=None,
    exact_window=False,
):
    """Continue each of B prompts by up to `max_new_tokens` drawn tokens.

    The model sees all tokens so far, up to `block_size` of them, and each is read once: its keys
    and values are kept (`KVCache`). Beyond, it sees the newest of them, from half of `block_size`
    to all of it: when the window is full, its older half is dropped and the newer half read again
    at the positions from 0 on, for its position, learned or rotary, is part of what is kept. So a
    token costs there what it costs before, and one position more, read in a batch of them. On the
    characters of Shakespeare (4 layers of 128, block_size 64, 2000 steps) it costs no quality:
    validation tokens seen so, after 33 to 64 tokens, have a mean loss of 1.877 nats
    (evaluate.py --stride=32), those after the full 64 1.893 (--stride=1). What the model sees
    depends on the number of tokens alone: a text continued in two calls is that of one. It is put
    in eval mode for the call.

    Args:
        idx: ids of the prompts (B, T), T at least 1, on the model's device.
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; None or 0 means all.
        top_p: draw among the fewest likeliest tokens that together reach this probability
            (nucleus sampling, Holtzman et al. 2020); None or 1 means all.
        stop_ids: a sample that drew one of these is finished and repeats it from there on.
        vocab_size: ids from here on are never drawn (rows that only pad the vocabulary).
        suppress: these ids are never drawn either, the unknown word for instance.
        seed: sample i draws its random numbers from (`seed`, `first_sample` + i), whatever is
            in the batch beside it. None takes torch's global generator.
        first_sample: the number of this batch's first sample in a larger set.
        on_token: called as `on_token(step, ids)` with the ids (B,) just drawn; returning True
            ends the generation.
        exact_window: past `block_size` see the newest `block_size` tokens at every step, as
            nanoGPT does, which means to read all of them at every step.

    Returns:
        Prompts and drawn tokens (B, T + n); n is less than `max_new_tokens` where every sample
        was finished or `on_token` ended it.

    Raises:
        ValueError: an empty prompt, a negative temperature, top_k or number of tokens, a top_p
            outside 0 to 1, every token suppressed.
    """
    (B, T), block_size = idx.shape, model.config.block_size
    if T == 0:
        raise ValueError("the prompt is empty; a model needs one token to go on from")
    if max_new_tokens < 0 or temperature < 0 or (top_k or 0) < 0:
        raise ValueError("max_new_tokens, temperature and top_k cannot be negative")
    if top_p is not None and not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p} is not a probability")

    ids = torch.empty(B, T + max_new_tokens, dtype=torch.long, device=idx.device)
    ids[:, :T] = idx
    # Drawn before the loop, so that the device need not wait for the host at each token.
    uniforms = draw_uniforms(B, max_new_tokens, seed, first_sample).to(idx.device)
    stops = torch.tensor(sorted(stop_ids), dtype=torch.long, device=idx.device)
    finished = torch.zeros(B, dtype=torch.bool, device=idx.device)
    never = never_drawn(suppress, vocab_size, idx.device)
    cache = new_cache(model, T + max_new_tokens)
    decoder = Decoder.of(model, idx.device)

    was_training = model.training
    model.eval()
    try:
        end = T
        with torch.inference_mode():
            for step in range(max_new_tokens):
                kept = None if exact_window and end > block_size else cache
                logits = next_token_logits(model, ids[:, :end], kept, decoder)
                logits = without(logits[:, :vocab_size], never)
                new = draw(logits, uniforms[:, step], temperature, top_k, top_p)
                if len(stops):
                    new = torch.where(finished, ids[:, end - 1], new)
                ids[:, end] = new
                end += 1
                if on_token is not None and on_token(step, new):
                    break
                if len(stops):
                    finished |= torch.isin(new, stops)
                    if finished.all():
                        break
    finally:
        model.train(was_training)
    return ids[:, :end]


def new_cache(model, positions):
    """An empty cache of each block, for at most `positions`."""
    positions = min(positions, model.config.block_size)
    return [KVCache(positions) for _ in range(model.config.n_layer)]


def never_drawn(suppress, vocab_size, device):
    """The ids to suppress as a tensor, without those that `vocab_size` rules out already."""
    ids = sorted(i for i in set(suppress) if vocab_size is None or i < vocab_size)
    return torch.tensor(ids, dtype=torch.long, device=device)


def without(logits, ids):
    """The logits (B, V) with those of `ids`, a tensor, at minus infinity."""
    if len(ids) == 0:
        return logits
    logits = logits.index_fill(1, ids, -torch.inf)
    if logits.size(1) == len(ids):
        raise ValueError("every token is suppressed; there is nothing to draw")
    return logits


def next_token_logits(model, ids, cache=None, decoder=None):
    """Logits (B, vocab_size) of the token after `ids` (B, T), of any T.

    With a `cache` that calls with the beginnings of `ids` have filled, only what is new is read,
    in the window of `window_start`, a single token by the `decoder` where there is one; without a
    cache, the newest `block_size` tokens are.
    """
    T, block_size = ids.size(1), model.config.block_size
    if cache is None:
        return model(ids[:, -block_size:])[0][:, -1]
    start = window_start(T, block_size)
    if start + cache[0].length >= T:  # the window has moved on: what is kept was read at its start
        for layer in cache:
            layer.length = 0
    new = ids[:, start + cache[0].length :]
    if decoder is not None and new.size(1) == 1 and cache[0].length > 0:
        return decoder.logits_after(new[:, 0], cache)
    logits, _ = model(new, cache=cache)
    return logits[:, -1]


def window_start(T, block_size):
    """Where the window on T tokens begins: half of `block_size` later each time it is full."""
    if T <= block_size:
        return 0
    dropped = (block_size + 1) // 2
    return math.ceil((T - block_size) / dropped) * dropped


def draw_uniforms(B, n, seed, first_sample):
    """Numbers (B, n) from 0 to 1; row i depends on (`seed`, `first_sample` + i) alone, and a
    longer row begins with the shorter one."""
    if seed is None:
        return torch.rand(B, n)
    rows = torch.empty(B, n)
    for i, row in enumerate(rows):
        # numpy mixes both numbers into the state: seed 1, sample 2 is not seed 2, sample 1
        generator = np.random.default_rng((seed % 2**64, first_sample + i))
        row.copy_(torch.from_numpy(generator.random(n, dtype=np.float32)))
    return rows


def draw(logits, uniform, temperature=1.0, top_k=None, top_p=None):
    """One id per row (B,) from logits (B, V) by inverting the cumulative distribution at
    `uniform` (B,)."""
    if temperature < 1e-6 or top_k == 1 or top_p == 0:  # dividing by less could overflow
        return logits.argmax(dim=-1)
    nucleus = top_p is not None and top_p < 1
    top, ids = logits.float(), None
    kept = min(top_k or top.size(-1), top.size(-1))
    if nucleus or kept < top.size(-1):
        top, ids = top.topk(kept)  # likeliest first
    probs = torch.softmax(top / temperature, dim=-1)
    if nucleus:
        before = probs.cumsum(dim=-1) - probs
        probs = probs.where(before < top_p, 0)
    cdf = probs.cumsum(dim=-1)
    choice = torch.searchsorted(cdf, uniform.unsqueeze(1) * cdf[:, -1:], right=True)
    choice = choice.clamp(max=cdf.size(-1) - 1)
    # At an edge, rounding may choose a token that has no probability: the likeliest instead.
    likeliest = probs.argmax(dim=-1, keepdim=True)
    choice = choice.where(probs.gather(1, choice) > 0, likeliest)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


class TextStream:
    """One sample's ids, one at a time, as text that can be shown at once.

    Never gives half a character (one may be several tokens), nor anything of the stop text:
    what may be its beginning is held back until the next tokens tell. With `max_words` never
    half a word either: one is given when what follows it has begun, and the last one ends the
    text (see `WORD`).
    """

    def __init__(self, tokenizer, stop_text="", stop_ids=(), max_words=0):
        self.token_bytes = tokenizer.token_bytes
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self.stop_text = stop_text
        self.stop_ids = frozenset(stop_ids)
        self.words_left = max_words or None  # None is no limit
        self.held = ""  # may be the beginning of the stop text
        self.word = ""  # white space and a word that may go on
        self.stopped = False  # a stop id, the stop text or the last word has come; nothing follows

    def feed(self, token_id):
        """The text that `token_id` completes, often none."""
        if self.stopped:
            return ""
        if token_id in self.stop_ids:
            return self._end(whole=True)
        return self._release(self.decoder.decode(self.token_bytes(token_id)))

    def finish(self):
        """What is still held back; an incomplete character becomes U+FFFD, and with `max_words`
        a word that was not seen to end is left out."""
        return "" if self.stopped else self._end(whole=False)

    def _end(self, whole):
        """The rest of the text; `whole` where it ends here by itself, and its last word too."""
        text = self._before_stop(self.decoder.decode(b"", final=True)) + self.held
        ends = whole or self.stopped
        self.held, self.stopped = "", True
        return self._whole_words(text, ends)

    def _release(self, text):
        text = self._before_stop(text)
        return self._whole_words(text, self.stopped)

    def _before_stop(self, text):
        text, self.held = self.held + text, ""
        if not self.stop_text:
            return text
        shown, stop, _ = text.partition(self.stop_text)
        if stop:
            self.stopped = True
            return shown
        for length in range(min(len(self.stop_text) - 1, len(text)), 0, -1):
            if self.stop_text.startswith(text[-length:]):
                self.held = text[-length:]
                return text[:-length]
        return text

    def _whole_words(self, text, ends):
        if self.words_left is None:
            return text
        text, end = self.word + text, 0
        for match in WORD.finditer(text):
            if match.end() == len(text) and not ends:
                break
            end = match.end()
            self.words_left -= 1
            if self.words_left == 0:
                self.stopped = True
                break
        self.word = text[end:]
        return text[:end]
