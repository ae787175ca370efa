"""FSDP: every rank keeps a shard of each weight, of its gradient and of its moments.

The weights of a block are gathered just before it runs and freed after it (Rajbhandari et al. 2020,
ZeRO, stage 3; Zhao et al. 2023, PyTorch FSDP). A shard is a `DTensor`: rows of a tensor, for which
it stands in every operation. All functions here are called by all ranks together.
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

from brisk.distributed.process_group import local


def shard(model, device, world_size, offload=False):
    """Shard `model`, a `GPT` on the CPU, over `world_size` processes: each block is gathered by
    itself, and so is what is around them (embeddings, the last norm, the head). All begin with the
    main process's weights; what the others' models have in theirs is not read.

    Blocks are moved to the device and sharded one after another: none has to hold the whole model.
    In bfloat16 weights are gathered in it, and gradients added up in float32. A gradient scaler's
    float16 reaches the products only, by autocast: gradients would overflow on their way.
    """
    weights = dict(model.state_dict())
    mesh = init_device_mesh(device.type, (world_size,))
    low = torch.bfloat16 if device.dtype is torch.bfloat16 else None
    how = {
        "mesh": mesh,
        # inputs are left as they come: rotary cosines and sines stay in float32
        "mp_policy": MixedPrecisionPolicy(low, torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy(),
    }
    for block in model.transformer.h:
        fully_shard(block, **how)
    fully_shard(model, **how)
    load_weights(model, weights)


@torch.no_grad()
def load_weights(model, weights):
    """Give a sharded `model` the weights of a state dict, of which the main process's are read."""
    for name, shards in model.state_dict(keep_vars=True).items():
        local(shards).copy_(local(shard_like(weights[name], shards)))


def shard_like(whole, like):
    """The tensor `whole` of rank 0, sharded as the DTensor `like`; on other ranks only its shape is
    read. Raises ValueError where the shapes differ."""
    if whole.shape != like.shape:
        raise ValueError(f"{tuple(whole.shape)} for {tuple(like.shape)}")
    mesh = like.device_mesh
    if mesh.get_rank() != 0:
        whole = torch.empty(whole.shape, dtype=whole.dtype, device=mesh.device_type)
    shards = torch.empty_like(like)  # on the host, where those of `like` are
    local(shards).copy_(local(distribute_tensor(whole.detach(), mesh, like.placements)))
    return shards


def full_tensor(tensor):
    """A DTensor gathered on every rank, on the device of its mesh."""
    return tensor.detach().to(tensor.device_mesh.device_type).full_tensor()


@contextmanager
def full_weights(model):
    """A context in which every rank has all weights of a sharded `model`, in the precision in which
    they are gathered, and may use it without the others."""
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
