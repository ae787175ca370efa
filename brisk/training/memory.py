"""Expected and peak memory of training."""

import copy
import os
import sys

import torch
from torch import nn

from brisk.errors import UserError, format_bytes
from brisk.training.loss import chunk_size

BLOCK_OVERHEAD = 50_000  # bytes of the Python objects of a block of any size


def check_fits(config):
    """Raise `UserError` if the float32 weights of a model (its `GPTConfig`) exceed this machine's
    memory. Call it before building the model."""
    C, kv = config.n_embd, config.kv_heads * config.head_dim
    matrices = 3 if config.mlp == "swiglu" else 2
    block = C * (2 * C + 2 * kv + matrices * config.hidden_width)
    rows = config.vocab_size * (1 if config.tied else 2)
    rows += config.block_size if config.position == "learned" else 0
    rows += (config.ngrams - 1) * config.ngram_rows
    needed = config.n_layer * (4 * block + BLOCK_OVERHEAD) + 4 * C * rows
    if needed > machine_memory():
        has = f"this machine has {format_bytes(machine_memory())}"
        raise UserError(f"the weights of this model take {format_bytes(needed)} of memory, {has}")


def machine_memory():
    """Bytes of this machine's memory, or 2^45 where it is unknown (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError):
        return 2**45


def expected_memory(
    model, batch_size, device, recomputed=False, ranks=None, accumulates=False, offload=False
):
    """Expected peak memory in bytes of training `model`, which is still on the CPU, on `device`.

    It is the sum of the state (`state_memory`), the activations that the backward pass needs
    (`kept_by_block`, for every block that learns), a chunk of logits with its gradient, and four
    tensors of the size of the head's input. Activation checkpointing keeps only the input of each
    block, and the activations of one block at a time. Memory of PyTorch itself and fragmentation
    are not included.

    Args:
        batch_size: sequences in a micro-batch on this device.
        recomputed: whether activation checkpointing is on.
        ranks: the `Ranks` that train together; None for a single process.
        accumulates: whether a rank accumulates gradients over several micro-batches.
        offload: whether FSDP keeps the state in host memory.
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
    """Bytes on a device of weights, gradients and AdamW's two moments: 16 for each parameter, 4 for
    a frozen one.

    With several micro-batches, DDP holds accumulated gradients in addition to its buckets. With
    FSDP, a device holds its share of the state, and unsharded tensors of `width` bytes per
    parameter: the parts around the blocks, and three blocks (in use, prefetched, and its copy in
    the all-gather). Gradients in reduction, of two blocks or of the parts around them, are held in
    `width` bytes and in float32. With several micro-batches it also accumulates all gradients
    unsharded, which are reduced after the last one.
    """
    parameters = sum(weight.numel() for weight in model.parameters())
    learned = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    if ranks is None or ranks.is_alone:
        return 4 * parameters + 12 * learned
    if not ranks.shards:
        return 4 * parameters + (16 if accumulates else 12) * learned
    block = sum(weight.numel() for weight in model.transformer.h[0].parameters())
    around = parameters - model.config.n_layer * block
    in_reduction = (width + 4) * max(2 * block, around)
    share = 0 if offload else shared_state(model, ranks)
    summed = 4 * learned if accumulates else 0
    return share + width * (around + 3 * block) + in_reduction + summed


def shared_state(model, ranks):
    """Bytes of the state in one rank's FSDP shard."""
    return state_memory(model, None, False, False, 4) / ranks.world_size


def learns(block):
    return any(weight.requires_grad for weight in block.parameters())


def kept_by_block(model, device, low=None):
    """Measure the activations that autograd keeps for the backward pass of one block.

    The block runs on one sequence of zeros, then on two, and the bytes of all saved tensors are
    added up. `low` is the dtype of weights and inputs under FSDP with mixed precision, else None.

    Autocast computes norms in float32 on a GPU, but not on a CPU. With `low`, a CPU is treated like
    a GPU: a dry run on a CPU plans for GPUs elsewhere.

    Returns:
        (each, once, x): bytes for each sequence, bytes for any number of sequences (weights cast by
        autocast), and bytes of the block's input for one sequence.
    """
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
        with torch.random.fork_rng(devices):  # keeps the state of the run's generator
            with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), device.autocast():
                _graph = block(x, None, cos_sin)  # keeps the saved tensors alive
        return sum(size for key, size in kept.items() if key not in mine), x.nbytes

    (one, x), (two, _) = kept_of(1), kept_of(2)
    return two - one, max(0, 2 * one - two), x


def peak_memory(device):
    """Peak memory in bytes so far, of the GPU or of the process; None where it is unknown."""
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
