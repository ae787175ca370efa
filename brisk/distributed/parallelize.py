"""What is applied to a model from outside: activation checkpointing, DDP or FSDP, clipping."""

from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from brisk.errors import UserError

# FSDP is imported where it is used: it takes longer than the rest of a start.


def checkpoint_activations(block, draws):
    """Let `block` keep nothing of its forward pass in training but its input: the backward pass
    computes the rest again (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).

    With `draws`, of dropout, it draws the same random numbers again, which costs a look at the
    generators' states. Call it before the block is compiled and before it is sharded: both then act
    around it. Names of weights stay as they are.
    """
    forward = block.forward

    def recomputed(*inputs):
        if not torch.is_grad_enabled():  # an evaluation: there is no backward pass
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=draws)

    block.forward = recomputed


def wrap_model(model, ranks, device, offload=False):
    """Put `model`, so far on the CPU, on its device, such that the backward pass averages gradients
    over the ranks; with FSDP its weights are sharded. All ranks begin with the weights of rank 0.

    Returns what a training step calls: `model` itself, or DDP around it.
    """
    if ranks.shards:
        from brisk.distributed.fsdp import shard

        shard(model, device, ranks.world_size, offload)
        return model
    model.to(device.device)
    if ranks.is_alone:
        return model
    ids = [device.device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def check_offload(ranks, device):
    """Raise `UserError` where the shards of the weights cannot be kept on the host."""
    if not ranks.shards:
        raise UserError("--cpu_offload needs --parallel=fsdp, and several processes (torchrun)")
    if device.type != "cuda":
        raise UserError(f"--cpu_offload spares memory of GPUs, the device is {device.type}")
    if device.dtype_name == "float16":
        raise UserError("--cpu_offload does not go with the gradient scaler of --dtype=float16")


def set_grad_sync(ddp_model, ranks, sync):
    """Whether the next backward pass averages the gradients over the ranks."""
    if ranks.shards:
        ddp_model.set_requires_gradient_sync(sync)
    elif not ranks.is_alone:
        ddp_model.require_backward_grad_sync = sync


def clip_grad_norm(model, max_norm, ranks, device):
    """Clip the norm of all gradients together to `max_norm`. Returns it as it was before, a tensor
    () on the device."""
    if not ranks.shards:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    from brisk.distributed.fsdp import full_tensor

    weights = [p for p in model.parameters() if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in weights]))
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm.to(weights[0].device))
    return norm.to(device.device)


def load_weights(model, weights, ranks):
    """Load `weights`, a state dict of rank 0, into `model`, sharded or not."""
    if not ranks.shards:
        model.load_state_dict(weights)
        return
    from brisk.distributed import fsdp

    fsdp.load_weights(model, weights)


def full_weights(model, ranks):
    """A context in which rank 0 may use `model` without the others."""
    if not ranks.shards:
        return nullcontext()
    from brisk.distributed import fsdp

    return fsdp.full_weights(model)
