"""Dropout for training on a CPU, where PyTorch's takes longer than the layer it follows.

PyTorch draws a number for each channel there, one after another; here one draw of 64 bits decides
four.
"""

import math

import torch


def dropout(x, p):
    """`x` with each entry set to zero with probability `p`, from above 0 to below 1 and to a
    resolution of 1/65536, and the others scaled up (Srivastava et al. 2014). Draws from the CPU's
    global generator."""
    return Dropout.apply(x, p)


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        is_kept, ctx.kept = dropout_mask(x.shape, p)
        ctx.save_for_backward(is_kept)
        return scaled(is_kept, ctx.kept, x)

    @staticmethod
    def backward(ctx, grad):
        return scaled(*ctx.saved_tensors, ctx.kept, grad), None


def scaled(is_kept, kept, x):
    return is_kept.to(x.dtype).mul_(1 / kept).mul_(x)


def dropout_mask(shape, p):
    """(which entries of a tensor of this shape are kept, as bools; the probability of that)."""
    threshold, n = max(1, round((1 - p) * 2**16)), math.prod(shape)
    bits = torch.empty(-(-n // 4), dtype=torch.int64).random_(-(2**63), None)
    is_kept = bits.view(torch.int16)[:n] < threshold - 2**15
    return is_kept.view(shape), threshold / 2**16
