"""Negative log-likelihoods of tokens, for batches of rows of different lengths.

Rows are padded on the right. A causal model does not see the padding, so the result for a row does
not depend on the rest of its batch. A target of -1 is not scored.
"""

import numpy as np
import torch
from torch.nn import functional as F

LOGITS_AT_ONCE = 2**26  # logits in memory: 256 MB in float32


@torch.no_grad()
def token_losses(model, inputs, targets):
    """Compute the cross-entropy of each target, and whether it is the most likely token.

    Computes the logits of scored positions only, `LOGITS_AT_ONCE` at a time.

    Args:
        inputs: token ids (B, T), T at most `block_size`.
        targets: the next token of each position (B, T), or -1.

    Returns:
        (nll, is_top), both (B, T): -ln p(target) in nats, float32, and whether the target has the
        highest logit. Where the target is -1, they are 0 and True.
    """
    scored = targets >= 0
    x, wanted = model.backbone(inputs)[scored], targets[scored]  # (N, n_embd), (N,)
    nll = torch.zeros(targets.shape, device=targets.device)
    is_top = torch.ones_like(scored)
    losses, hits = [], []
    step = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    for part, ids in zip(x.split(step), wanted.split(step), strict=True):
        logits = model.lm_head(part).float()
        losses.append(F.cross_entropy(logits, ids, reduction="none"))
        hits.append(logits.argmax(dim=-1) == ids)
    nll[scored], is_top[scored] = torch.cat(losses), torch.cat(hits)
    return nll, is_top


def collate(rows, scored, device):
    """Pad rows to the same length. Returns inputs and targets (B, T), int64 tensors on `device`.

    Args:
        rows: arrays of ids. The last id of a row is only a target.
        scored: the number of targets to score in each row, counted from its end.
    """
    T = max(map(len, rows)) - 1
    inputs = np.zeros((len(rows), T), dtype=np.int64)
    targets = np.full((len(rows), T), -1, dtype=np.int64)
    for row, count, x, y in zip(rows, scored, inputs, targets, strict=True):
        n = len(row) - 1
        x[:n] = row[:-1]
        y[n - count : n] = row[len(row) - count :]
    return torch.from_numpy(inputs).to(device), torch.from_numpy(targets).to(device)


def batches(lengths, room):
    """Group rows of the given `lengths` (an array) into batches, longest first. A batch has at
    least one row, and at most `room` tokens with padding. Returns arrays of row indices."""
    order = np.argsort(-lengths, kind="stable")
    found, first = [], 0
    while first < len(order):
        count = max(1, room // int(lengths[order[first]]))
        found.append(order[first : first + count])
        first += count
    return found


def windows(n_targets, block_size, stride):
    """Windows of `block_size` inputs that start every `stride` tokens, for each of several texts.

    A target is scored in the first window that has it, which gives it the longest context
    (https://huggingface.co/docs/transformers/perplexity, except that windows there have
    `block_size` - 1 targets).

    Args:
        n_targets: number of targets in each text, an array of positive ints.
        stride: from 1 to `block_size`.

    Returns:
        (text, begin, end, new), arrays with an entry for each window: the index of its text, its
        targets [begin, end), and the first target that no earlier window has.
    """
    count = 1 + np.maximum(0, -((block_size - n_targets) // stride))  # 1 + ⌈(n - block) / stride⌉
    text = np.repeat(np.arange(len(n_targets)), count)
    number = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count)
    begin = number * stride
    end = np.minimum(begin + block_size, n_targets[text])
    new = np.where(number == 0, 0, begin - stride + block_size)
    return text, begin, end, new
