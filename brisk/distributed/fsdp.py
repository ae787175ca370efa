"""FSDP: every rank keeps a shard of each weight, its gradient and its optimizer state.

The weights of a block are gathered just before it runs and freed after it (Rajbhandari et al. 2020,
ZeRO, stage 3; Zhao et al. 2023, PyTorch FSDP). Shards are `DTensor`s, split by rows. All functions
in this file are collective: call them on every rank.
"""

from contextlib import contextmanager

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import distribute_tensor

from brisk.distributed.process_group import to_local


def shard(model, device, world_size, offload=False):
    """Shard `model`, a `GPT` on the CPU, over `world_size` processes, with the weights of rank 0.
    Each block is one unit of sharding; embeddings, final norm and head are another.

    Blocks are moved to the device and sharded one by one, so no device holds the whole model. In
    bfloat16, weights are gathered in bfloat16 and gradients are reduced in float32. In float16 only
    autocast uses the lower precision: gradients would overflow in the reduction.
    """
    weights = dict(model.state_dict())
    mesh = init_device_mesh(device.type, (world_size,))
    low = torch.bfloat16 if device.dtype is torch.bfloat16 else None
    options = {
        "mesh": mesh,
        # no cast of the inputs: rotary cosines and sines stay in float32
        "mp_policy": MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in model.transformer.h:
        fully_shard(block, **options)
    fully_shard(model, **options)
    load_weights(model, weights)


@torch.no_grad()
def load_weights(model, weights):
    """Load the state dict `weights` of rank 0 into a sharded `model`."""
    for name, shards in model.state_dict(keep_vars=True).items():
        to_local(shards).copy_(to_local(shard_like(weights[name], shards)))


def shard_like(whole, like):
    """Shard the tensor `whole` of rank 0 like the DTensor `like`. On other ranks only the shape of
    `whole` is used. Raises ValueError if the shapes differ."""
    if whole.shape != like.shape:
        raise ValueError(f"{tuple(whole.shape)} for {tuple(like.shape)}")
    mesh = like.device_mesh
    if mesh.get_rank() != 0:
        whole = torch.empty(whole.shape, dtype=whole.dtype, device=mesh.device_type)
    shards = torch.empty_like(like)  # in host memory if `like` is offloaded
    to_local(shards).copy_(to_local(distribute_tensor(whole.detach(), mesh, like.placements)))
    return shards


def full_tensor(tensor):
    """Gather a DTensor on every rank, on the device of its mesh."""
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


@contextmanager
def full_weights(model):
    """A context in which every rank holds all weights of a sharded `model`, in the precision of
    the gather, and can run it on its own."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not model, recurse=False)
            unit.reshard()
