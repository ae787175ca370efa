"""Activation checkpointing: memory for the activations of one block instead of all, for the price
of one more forward pass (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost)."""

import torch
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(block, draws):
    """Let `block` keep nothing of its forward pass in training but its input: the backward pass
    computes the rest again.

    With `draws`, of dropout, it draws the same random numbers again, which costs a look at the
    generators' states. Call it before `block.compile()` and before the block is sharded: both then
    act around it. Names of weights stay as they are.
    """
    forward = block.forward

    def recomputed(*inputs):
        if not torch.is_grad_enabled():  # an evaluation: there is no backward pass
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws)

    block.forward = recomputed
