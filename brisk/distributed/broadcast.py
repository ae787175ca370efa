"""Broadcast a checkpoint from rank 0, one tensor at a time."""

import torch
import torch.distributed as dist


def broadcast_checkpoint(ranks, read, *arguments, before_tensors=lambda plan: None):
    """Call `read(*arguments)` on rank 0, and return its result on every rank: nested dicts of plain
    values and of tensors on the CPU. Only rank 0 needs the files.

    With FSDP, weights and moments are not sent: the tensors on other ranks have the same shapes and
    uninitialized data, and `fsdp.shard_like` scatters the values later.

    Args:
        before_tensors: called on every rank before tensors are sent, with the result in which
            `Placeholder` objects stand for the tensors.

    Raises:
        UserError: on every rank, if `read` raised it.
    """
    if ranks.is_alone:
        whole = read(*arguments)
        before_tensors(whole)
        return whole
    tensors = {}  # keyed by storage, so that a tied weight is sent once
    outline = ranks.run_on_main(lambda: extract_tensors(read(*arguments), tensors))
    before_tensors(outline)
    to_send = (tensor for _, tensor in tensors.values())
    return insert_tensors(outline, to_send, [], scalars_only=ranks.shards)


class Placeholder:
    """Stands for the `number`-th tensor to be sent."""

    def __init__(self, number, shape, dtype):
        self.number, self.shape, self.dtype = number, shape, dtype


def extract_tensors(value, tensors):
    """Replace each tensor in `value` with a `Placeholder` and add it to `tensors`. Nonstandard
    tensors stay, and are pickled with the rest."""
    if isinstance(value, dict):
        return {key: extract_tensors(part, tensors) for key, part in value.items()}
    if not isinstance(value, torch.Tensor) or is_nonstandard(value):
        return value
    key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
    number, _ = tensors.setdefault(key, (len(tensors), value))
    return Placeholder(number, value.shape, value.dtype)


def insert_tensors(outline, to_send, done, scalars_only):
    """Broadcast the tensors, and replace each `Placeholder` with its tensor. `to_send` has the
    tensors of rank 0 and is empty elsewhere; `done` collects them in order."""
    if isinstance(outline, dict):
        items = outline.items()
        return {key: insert_tensors(part, to_send, done, scalars_only) for key, part in items}
    if not isinstance(outline, Placeholder):
        return outline
    if outline.number == len(done):
        tensor = next(to_send, None)
        if tensor is None:
            tensor = torch.empty(outline.shape, dtype=outline.dtype)
        if tensor.numel() and not (scalars_only and tensor.dim()):
            # as bytes, since gloo does not support every dtype
            dist.broadcast(tensor.contiguous().reshape(-1).view(torch.uint8), 0)
        done.append(tensor)
    return done[outline.number]


def is_nonstandard(tensor):
    """Whether `tensor` is sparse, quantized, a meta tensor or an expanded view."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return True
    return tensor.nbytes > tensor.untyped_storage().nbytes()
