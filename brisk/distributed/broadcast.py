"""Broadcast a checkpoint from rank 0, its tensors one by one."""

import torch
import torch.distributed as dist


def broadcast_checkpoint(ranks, read, *arguments, before_tensors=lambda plan: None):
    """Call `read(*arguments)` on rank 0, the only one that needs the files, and return what it
    returns, dicts of tensors on the CPU and plain values, on every rank.

    Under FSDP the numbers of weights and moments stay in the main process, which scatters them
    later (`fsdp.shard_like`): the others' tensors are of the same shapes, with nothing in them.

    `before_tensors` is called in every process with all but the tensors, before those are sent.

    Raises its `UserError` in all of them.
    """
    if ranks.is_alone:
        whole = read(*arguments)
        before_tensors(whole)
        return whole
    tensors = {}  # by where they are in memory: one of two names is sent once
    plan = ranks.run_on_main(lambda: planned(read(*arguments), tensors))
    before_tensors(plan)
    mine = (tensor for _, tensor in tensors.values())
    return filled(plan, mine, [], scalars_only=ranks.shards)


class Tensor:
    """Stands for a tensor in a plan: the `number`-th to be sent, of this shape and dtype."""

    def __init__(self, number, shape, dtype):
        self.number, self.shape, self.dtype = number, shape, dtype


def planned(value, tensors):
    """`value` with a `Tensor` in the place of each tensor, which `tensors` takes in; odd ones (no
    plain numbers in memory of their own) stay, and are sent with the plan."""
    if isinstance(value, dict):
        return {key: planned(part, tensors) for key, part in value.items()}
    if not isinstance(value, torch.Tensor) or is_nonstandard(value):
        return value
    key = (value.data_ptr(), value.shape, value.stride(), value.dtype)
    number, _ = tensors.setdefault(key, (len(tensors), value))
    return Tensor(number, value.shape, value.dtype)


def filled(plan, mine, sent, scalars_only):
    """`plan` with the tensors in their places again: `mine` where this process has them, others as
    they arrive, in the plan's order. `sent` has those so far."""
    if isinstance(plan, dict):
        return {key: filled(part, mine, sent, scalars_only) for key, part in plan.items()}
    if not isinstance(plan, Tensor):
        return plan
    if plan.number == len(sent):
        tensor = next(mine, None)
        whole = torch.empty(plan.shape, dtype=plan.dtype) if tensor is None else tensor
        if whole.numel() and not (scalars_only and whole.dim()):
            # as bytes: gloo has not every dtype
            dist.broadcast(whole.contiguous().reshape(-1).view(torch.uint8), 0)
        sent.append(whole)
    return sent[plan.number]


def is_nonstandard(tensor):
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return True
    return tensor.nbytes > tensor.untyped_storage().nbytes()
