"""A stand-in for CUDA graphs on a CPU: the operations of a function, repeated on the same tensors.

As in a CUDA graph, nothing is computed during a capture; a replay has the tensors and the Python
numbers of the capture; and what was allocated during the capture holds garbage before the first
replay. Reading a number on the host, a shape that depends on numbers, and a tensor made from Python
numbers, which would be a copy to the device, are errors. Random numbers are those of the generator
at a replay.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brisk.cuda_graph import GraphPool

READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Tape(TorchDispatchMode):
    """Records the operations inside it; `replay` repeats them."""

    def __init__(self):
        super().__init__()
        self.operations = []  # (function, arguments, keyword arguments, results)
        self.before = {}  # address of a memory that was there before → (it, its contents)
        self.made = {}  # address of a memory that was allocated inside → it
        self.random_state = torch.get_rng_state()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reads_numbers(func, args):
            raise RuntimeError(f"{func} reads numbers on the host during a capture")
        if func is torch.ops.aten.lift_fresh.default:
            raise RuntimeError("a tensor is made from Python numbers during a capture")
        for memory in written(func, args, kwargs):
            if memory.data_ptr() not in self.made:
                self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        results = func(*args, **kwargs)
        given = {memory.data_ptr() for memory in memories((args, kwargs))}
        for memory in memories(results):
            if memory.data_ptr() not in given:
                self.made[memory.data_ptr()] = memory
        self.operations.append((func, args, kwargs, results))
        return results

    def undo(self):
        """Leave things as a capture does, which computes nothing."""
        for memory, contents in self.before.values():
            memory.copy_(contents)
        for memory in self.made.values():  # not a number, or -1
            torch.empty(0, dtype=torch.uint8).set_(memory).fill_(255)
        torch.set_rng_state(self.random_state)

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, results in self.operations:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(results), tensors(again), strict=True):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.copy_(new)


def reads_numbers(func, args):
    """Whether the host must wait for what a function computes, for a number or a shape."""
    aten = torch.ops.aten
    if func is aten.index.Tensor:  # by numbers, or by a mask
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool(READS & set(func.tags)) or func is aten._local_scalar_dense.default


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memories(tree):
    return [t.untyped_storage() for t in tensors(tree) if t.numel()]


def written(func, args, kwargs):
    """The memories of the arguments that a function changes."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from memories(args[i] if i < len(args) else kwargs.get(argument.name))


class TapePool:
    """A `GraphPool` of tapes; `captures` and `replays` are counted over all of them."""

    captures = replays = 0

    def __init__(self, device):
        self.device = device

    @staticmethod
    def supports(device):
        return True

    def call(self, function):
        return function()

    def capture(self, function):
        with Tape() as tape:
            outputs = function()
        tape.undo()
        TapePool.captures += 1

        def replay():
            TapePool.replays += 1
            tape.replay()

        return replay, outputs


def use_tapes(monkeypatch):
    """Replace CUDA graphs by tapes. Returns `TapePool`, whose counts start at 0."""
    for name in ("__init__", "supports", "call", "capture"):
        monkeypatch.setattr(GraphPool, name, vars(TapePool)[name])
    TapePool.captures = TapePool.replays = 0
    return TapePool
