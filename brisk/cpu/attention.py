"""Causal attention for training on a CPU, in blocks that stay in its cache, with dropout.

PyTorch's fused attention for CPUs has no dropout: with it, every matrix of probabilities is written
to memory and read again a dozen times. Here a block of them, some hundred thousand, goes through
all steps at once; what lies above the diagonal is not computed beyond the block.
"""

import torch

from brisk.cpu.dropout import dropout_mask

BLOCK = 2**18  # probabilities worked on at a time: 1 MiB, about half of a core's second-level cache
QUERIES = 64  # of one sequence in a block, at most


def attention(q, k, v, dropout=0.0):
    """`dropout(softmax(q kᵀ / √head_dim)) v` under a causal mask.

    Args:
        q: (B, n_head, T, head_dim).
        k, v: the same, or with fewer heads, each for n_head / n_kv_head of the queries'.
        dropout: probability that a probability is set to zero, from 0 to below 1; the others are
            scaled up (Vaswani et al. 2017, section 5.4). To a resolution of 1/65536.

    Returns:
        (B, n_head, T, head_dim). Draws from the CPU's global generator.
    """
    each = q.size(1) // k.size(1)
    if each > 1:
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    with torch.autocast("cpu", enabled=False):
        return CausalAttention.apply(q, k, v, dropout)


class CausalAttention(torch.autograd.Function):
    """What is kept for the backward pass is the probabilities, with a minus where one was dropped.

    With P the probabilities, M the mask and g the gradient of the output y (Dao et al. 2022,
    FlashAttention, appendix B.2): dv = (M P)ᵀ g, and ds = M P (g vᵀ) - P (g · y).
    """

    @staticmethod
    def forward(ctx, q, k, v, dropout):
        (B, H, T, D), scale, kept = q.shape, q.size(3) ** -0.5, 1.0
        q, k, v = (t.reshape(B * H, T, D) for t in (q * scale, k, v))
        y, saved = torch.empty_like(q), []
        for rows, start, end in blocks(B * H, T):
            scores = torch.bmm(q[rows, start:end], k[rows, :end].mT)
            above = torch.full((end - start, end - start), -torch.inf, dtype=q.dtype).triu(1)
            scores[:, :, start:].add_(above)
            p = torch.softmax(scores, -1)
            if dropout:
                is_kept, kept = dropout_mask(p.shape, dropout)
                p.mul_(is_kept.to(p.dtype).mul_(2).sub_(1))
            y[rows, start:end] = torch.bmm(p.clamp_min(0) if dropout else p, v[rows, :end])
            saved.append(p)
        y.div_(kept)
        ctx.save_for_backward(q, k, v, y, *saved)
        ctx.scale, ctx.kept = scale, kept
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, y, *saved = ctx.saved_tensors
        T = q.size(1)
        shape, grad = grad.shape, grad.reshape(q.shape)
        minus_delta = (grad * y).sum(-1, keepdim=True).neg_()
        grad = grad / ctx.kept
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (rows, start, end) in zip(saved, blocks(len(q), T), strict=True):
            dropped = ctx.kept < 1
            seen = p.clamp_min(0) if dropped else p
            dv[rows, :end] += torch.bmm(seen.mT, grad[rows, start:end])
            ds = torch.bmm(grad[rows, start:end], v[rows, :end].mT).mul_(seen)
            ds.addcmul_(p.abs() if dropped else p, minus_delta[rows, start:end])
            dq[rows, start:end] = torch.bmm(ds, k[rows, :end])
            dk[rows, :end] += torch.bmm(ds.mT, q[rows, start:end])
        return dq.mul_(ctx.scale).view(shape), dk.view(shape), dv.view(shape), None


def blocks(rows, T):
    """Triples (slice of rows, first query, end of queries) of about `BLOCK` probabilities each."""
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        step = max(1, BLOCK // ((end - start) * end))
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows)), start, end
