"""Memory of a training run: what it will need, and what it took."""

import sys

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def expected_memory(build_model, batch_size, block_size, device):
    """Bytes that training takes at its peak, counted without allocating them.

    The model that `build_model()` returns runs once on fake tensors, which have shapes but no
    storage, and what autograd keeps for the backward pass is added up. On top come the weights
    with gradient and two AdamW moments (16 bytes a parameter) and three tensors as large as the
    largest, which the backward pass through the loss holds at once. What PyTorch itself occupies,
    and what the allocator loses between tensors, is not counted: a CPU has been seen to take a
    quarter more, and half as much again with dropout.
    """
    kept = {}

    def count(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode(), torch.device(device.device):
        model = build_model().train()
        mine = {weight.untyped_storage()._cdata for weight in model.parameters()}
        idx = torch.zeros((batch_size, block_size), dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t), device.autocast():
            model(idx, idx, return_logits=False)
    activations = [size for key, size in kept.items() if key not in mine]
    parameters = sum(weight.numel() for weight in model.parameters())
    return 16 * parameters + sum(activations) + 3 * max(activations)


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


def in_bytes(number):
    """`number` of bytes in MB or GB, to two or three digits."""
    return f"{number / 1e6:.0f} MB" if number < 1e9 else f"{number / 1e9:.1f} GB"
