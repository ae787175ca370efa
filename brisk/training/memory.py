"""Memory of a training run: what it will need, and what it took."""

import copy
import os
import sys

import torch
from torch import nn

from brisk.errors import UserError, format_bytes
from brisk.training.loss import chunk_size

OF_A_BLOCK = 50_000  # bytes that its Python objects take, whatever its size


def check_fits(config):
    """Raise `UserError` where the float32 weights of a model of these sizes (a `GPTConfig`) take
    more than this machine's memory, before an attempt to build it takes all there is."""
    C, kv = config.n_embd, config.kv_heads * config.head_dim
    matrices = 3 if config.mlp == "swiglu" else 2
    block = C * (2 * C + 2 * kv + matrices * config.hidden_width)
    rows = config.vocab_size * (1 if config.tied else 2)
    rows += config.block_size if config.position == "learned" else 0
    rows += (config.ngrams - 1) * config.ngram_rows
    needed = config.n_layer * (4 * block + OF_A_BLOCK) + 4 * C * rows
    if needed > machine_memory():
        has = f"this machine has {format_bytes(machine_memory())}"
        raise UserError(f"the weights of this model take {format_bytes(needed)} of memory, {has}")


def machine_memory():
    """Bytes of this machine's memory; where that is unknown (Windows), of the largest machines."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 2**45


def expected_memory(
    model, batch_size, device, recomputed=False, ranks=None, accumulates=False, offload=False
):
    """Bytes that training `model`, which is on the CPU still, takes at its peak on `device`.

    All blocks that learn keep for the backward pass what one does (`kept_by_block`), or,
    `recomputed` there, their input, and one of them the rest. Around the head come the logits that
    are in memory at a time, twice, and four tensors as large as its input. And there is the state
    (`state_memory`). What PyTorch itself occupies, and what the allocator loses between tensors, is
    not counted.

    Args:
        batch_size: sequences in a micro-batch, on this device.
        recomputed: whether with activation checkpointing.
        ranks: the processes that train together, a `Ranks`; None for one.
        accumulates: whether a step is of several micro-batches in a process.
        offload: whether under FSDP the state is on the host.
    """
    config, learning = model.config, sum(map(learns, model.transformer.h))
    low = torch.bfloat16 if ranks and ranks.shards and device.dtype is torch.bfloat16 else None
    each, once, x = kept_by_block(model, device, low)
    blocks = learning * (once + batch_size * each)
    if recomputed:
        blocks = learning * (once + batch_size * x) + batch_size * each
    around_head = 4 * batch_size * x
    chunk = chunk_size(device.type, compiled=False)  # compiled: twice as many, of half the bytes
    logits = min(chunk, batch_size * config.block_size * config.vocab_size)
    state = state_memory(model, ranks, accumulates, offload, 2 if low else 4)
    return state + blocks + around_head + 8 * logits


def state_memory(model, ranks, accumulates, offload, width):
    """Bytes on a device of weights, gradients and AdamW's two moments: 16 a parameter, or 4 where
    it is frozen.

    DDP holds the gradients of several micro-batches beside the buckets in which they meet. Under
    FSDP a device has its share; of whole tensors, in `width` bytes, what is around the blocks, a
    block at work, the next one, and that one again as it arrives; gradients on their way of two
    blocks, or of what is around them, in `width` bytes and in float32; and, of several
    micro-batches, the sum of all gradients, which are shared out with the last.
    """
    parameters = sum(weight.numel() for weight in model.parameters())
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if ranks is None or ranks.is_alone:
        return 4 * parameters + 12 * learned
    if not ranks.shards:
        return 4 * parameters + (16 if accumulates else 12) * learned
    block = sum(weight.numel() for weight in model.transformer.h[0].parameters())
    around = parameters - model.config.n_layer * block
    on_their_way = (width + 4) * max(2 * block, around)
    share = 0 if offload else shared_state(model, ranks)
    summed = 4 * learned if accumulates else 0
    return share + width * (around + 3 * block) + on_their_way + summed


def shared_state(model, ranks):
    """Bytes of the part of the state that a process has under FSDP."""
    return state_memory(model, None, False, False, 4) / ranks.world_size


def learns(block):
    return any(weight.requires_grad for weight in block.parameters())


def kept_by_block(model, device, low=None):
    """(bytes for each sequence, bytes whatever their number, bytes of a sequence going in): what
    autograd keeps of a block of `model` from the forward pass for the backward pass, added up while
    it runs on one sequence of zeros, and on two. What is there once is copies of its weights in
    autocast's precision. With `low` weights and what goes in are of that type.

    Autocast runs norms in float32 on a GPU, but not on a CPU; a CPU, which `low` is seldom for, is
    reckoned with as if it did: a dry run there is about GPUs elsewhere."""
    block = copy.deepcopy(model.transformer.h[-1]).to(device.device, low).train()
    if low and device.type == "cpu":
        for norm in [
            part for part in block.modules() if isinstance(part, nn.LayerNorm | nn.RMSNorm)
        ]:
            norm.float().register_forward_pre_hook(lambda _, inputs: inputs[0].float())
    devices = [device.device] if device.type == "cuda" else []
    mine = {weight.untyped_storage().data_ptr() for weight in block.parameters()}

    def kept_of(sequences):
        kept = {}

        def count(tensor):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        idx = torch.zeros(sequences, model.config.block_size, dtype=torch.int64)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            x, cos_sin = model.embed(idx)
        x = x.to(device.device, low).requires_grad_()
        cos_sin = cos_sin and tuple(t.to(device.device) for t in cos_sin)
        with torch.random.fork_rng(devices):  # dropout draws here must not move the run's
            with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), device.autocast():
                _graph = block(x, None, cos_sin)  # while it lives what it keeps stays apart
        return sum(size for key, size in kept.items() if key not in mine), x.nbytes

    (one, x), (two, _) = kept_of(1), kept_of(2)
    return two - one, max(0, 2 * one - two), x


def peak_memory(device):
    """Bytes at the peak so far: of the GPU's memory, or of the process (None where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
