"""Activation checkpointing, DDP or FSDP, and gradient clipping, applied to a model from outside."""

from contextlib import nullcontext

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from brisk.errors import UserError

# FSDP is imported inside functions: the import takes longer than the rest of the startup.


def checkpoint_activations(block, preserve_rng):
    """Keep only the input of `block` for the backward pass, and recompute its activations there
    (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).

    `preserve_rng` restores the state of the random number generators for the recomputation, which
    dropout needs. Call it before the block is compiled or sharded. Parameter names do not change.
    """
    forward = block.forward

    def checkpointed(*inputs):
        if not torch.is_grad_enabled():  # evaluation
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=preserve_rng)

    block.forward = checkpointed


def wrap_model(model, ranks, device, offload=False):
    """Move `model` from the CPU to its device and apply DDP or FSDP, with the weights of rank 0 on
    all ranks. Returns the module to call in training: `model` itself, or DDP around it."""
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
    """Raise `UserError` if `--cpu_offload` is not supported in this run."""
    if not ranks.shards:
        raise UserError("--cpu_offload needs --parallel=fsdp, and several processes (torchrun)")
    if device.type != "cuda":
        raise UserError(f"--cpu_offload saves GPU memory; the device is {device.type}")
    if device.dtype_name == "float16":
        raise UserError("--cpu_offload does not support the gradient scaler of --dtype=float16")


def set_grad_sync(ddp_model, ranks, sync):
    """Set whether the next backward pass averages gradients over the ranks."""
    if ranks.shards:
        ddp_model.set_requires_gradient_sync(sync)
    elif not ranks.is_alone:
        ddp_model.require_backward_grad_sync = sync


def clip_grad_norm(model, max_norm, ranks, device):
    """Clip the gradients to a total norm of `max_norm`. Returns the norm before clipping, a tensor
    () on the device."""
    if not ranks.shards:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    from brisk.distributed.fsdp import full_tensor

    weights = [p for p in model.parameters() if p.grad is not None]
    norm = full_tensor(torch.nn.utils.get_total_norm([p.grad for p in weights]))
    torch.nn.utils.clip_grads_with_norm_(weights, max_norm, norm.to(weights[0].device))
    return norm.to(device.device)


def load_weights(model, weights, ranks):
    """Load the state dict `weights` of rank 0 into `model`, sharded or not."""
    if not ranks.shards:
        model.load_state_dict(weights)
        return
    from brisk.distributed import fsdp

    fsdp.load_weights(model, weights)


def full_weights(model, ranks):
    """A context in which rank 0 can run `model` on its own."""
    if not ranks.shards:
        return nullcontext()
    from brisk.distributed import fsdp

    return fsdp.full_weights(model)
