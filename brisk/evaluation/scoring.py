"""Negative log-likelihoods of given tokens, for batches of rows of different lengths.

Rows are padded on the right. A causal model does not see that padding, so the results of a row do
not depend on the other rows of its batch. A target of -1 is not scored.
"""

import numpy as np
import torch
from torch.nn import functional as F

LOGITS_AT_ONCE = 2**26  # entries of the logits held at a time: 256 MB in float32


@torch.no_grad()
def token_losses(model, inputs, targets):
    """Cross-entropy of each target, and whether it is the most likely token.

    Only the logits of scored positions are computed, `LOGITS_AT_ONCE` at a time.

    Args:
        inputs: token ids (B, T), T at most `block_size`.
        targets: the token after each one (B, T), or -1.

    Returns:
        (nll, is_top), both (B, T): -ln p(target) in nats, float32, and whether no other token has
        a higher logit; 0 and True where the target is -1.
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
    """Rows padded to one length: inputs and targets (B, T), int64 tensors on `device`.

    Args:
        rows: arrays of ids, each one longer than its inputs: its last id is a target only.
        scored: how many targets of each row, counted from its end, are to be scored.
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
    """The numbers of rows with these `lengths` (an array) in batches, longest rows first: as many
    in a batch as take, padded, at most `room` tokens, and one at least."""
    order = np.argsort(-lengths, kind="stable")
    found, first = [], 0
    while first < len(order):
        count = max(1, room // int(lengths[order[first]]))
        found.append(order[first : first + count])
        first += count
    return found


def windows(n_targets, block_size, stride):
    """Windows of `block_size` inputs that start every `stride` tokens, over each of some texts.

    A target is new in the first window that has it, which is the one that shows the model most of
    what stands before it (https://huggingface.co/docs/transformers/perplexity; theirs spend a
    window's last token on being a target only, ours give it an input each).

    Args:
        n_targets: how many targets each text has, an array of positive ints.
        stride: from 1 to `block_size`.

    Returns:
        (text, begin, end, new), arrays with an entry for each window: the text it lies in, its
        targets begin to end - 1, and the first of them that no earlier window has.
    """
    count = 1 + np.maximum(0, -((block_size - n_targets) // stride))  # 1 + ⌈(n - block) / stride⌉
    text = np.repeat(np.arange(len(n_targets)), count)
    number = np.arange(len(text)) - np.repeat(np.cumsum(count) - count, count)
    begin = number * stride
    end = np.minimum(begin + block_size, n_targets[text])
    new = np.where(number == 0, 0, begin - stride + block_size)
    return text, begin, end, new
