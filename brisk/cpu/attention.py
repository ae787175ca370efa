"""Causal attention with dropout for training on a CPU, in blocks that fit its cache.

PyTorch's fused attention has no dropout on a CPU. The unfused one writes all attention
probabilities to memory and reads them again about a dozen times. Here each block of probabilities
goes through all steps while it is in the cache, and blocks above the diagonal are skipped.
"""

import torch

from brisk.cpu.dropout import dropout_mask

BLOCK = 2**18  # probabilities in a block: 1 MiB in float32, about half of a core's L2 cache
QUERIES = 64  # at most, of one sequence, in a block


def attention(q, k, v, dropout=0.0):
    """`dropout(softmax(q kᵀ / √head_dim)) v` under a causal mask.

    Args:
        q: (B, n_head, T, head_dim).
        k, v: (B, n_kv_head, T, head_dim), where n_kv_head divides n_head.
        dropout: dropout of the attention probabilities, 0 <= dropout < 1, rounded to a multiple of
            1/65536. Uses the default CPU generator.

    Returns:
        (B, n_head, T, head_dim).
    """
    each = q.size(1) // k.size(1)
    if each > 1:
        k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
    with torch.autocast("cpu", enabled=False):
        return CausalAttention.apply(q, k, v, dropout)


class CausalAttention(torch.autograd.Function):
    """Saves the probabilities for the backward pass, negated where they were dropped.

    With probabilities P, dropout mask M, output y and its gradient g: dv = (M P)ᵀ g and
    ds = M P (g vᵀ) - P (g · y) (Dao et al. 2022, FlashAttention, appendix B.2).
    """

    @staticmethod
    def forward(ctx, q, k, v, dropout):
        (B, H, T, D), scale, keep_prob = q.shape, q.size(3) ** -0.5, 1.0
        q, k, v = (t.reshape(B * H, T, D) for t in (q * scale, k, v))
        y, saved = torch.empty_like(q), []
        for rows, start, end in blocks(B * H, T):
            scores = torch.bmm(q[rows, start:end], k[rows, :end].mT)
            future = torch.full((end - start, end - start), -torch.inf, dtype=q.dtype).triu(1)
            scores[:, :, start:].add_(future)
            p = torch.softmax(scores, -1)
            if dropout:
                mask, keep_prob = dropout_mask(p.shape, dropout)
                p.mul_(mask.to(p.dtype).mul_(2).sub_(1))
            y[rows, start:end] = torch.bmm(p.clamp_min(0) if dropout else p, v[rows, :end])
            saved.append(p)
        y.div_(keep_prob)
        ctx.save_for_backward(q, k, v, y, *saved)
        ctx.scale, ctx.keep_prob = scale, keep_prob
        return y.view(B, H, T, D)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, y, *saved = ctx.saved_tensors
        T = q.size(1)
        shape, grad = grad.shape, grad.reshape(q.shape)
        minus_delta = (grad * y).sum(-1, keepdim=True).neg_()
        grad = grad / ctx.keep_prob
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p, (rows, start, end) in zip(saved, blocks(len(q), T), strict=True):
            has_dropout = ctx.keep_prob < 1
            masked = p.clamp_min(0) if has_dropout else p
            dv[rows, :end] += torch.bmm(masked.mT, grad[rows, start:end])
            ds = torch.bmm(grad[rows, start:end], v[rows, :end].mT).mul_(masked)
            ds.addcmul_(p.abs() if has_dropout else p, minus_delta[rows, start:end])
            dq[rows, start:end] = torch.bmm(ds, k[rows, :end])
            dk[rows, :end] += torch.bmm(ds.mT, q[rows, start:end])
        return dq.mul_(ctx.scale).view(shape), dk.view(shape), dv.view(shape), None


def blocks(rows, T):
    """Yield (slice of rows, first query, end of queries), with about `BLOCK` probabilities each."""
    for start in range(0, T, QUERIES):
        end = min(start + QUERIES, T)
        step = max(1, BLOCK // ((end - start) * end))
        for first in range(0, rows, step):
            yield slice(first, min(first + step, rows)), start, end
