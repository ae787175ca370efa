"""The process group of a run: this process's rank, and collectives."""

import math
import os
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from brisk.distributed.rendezvous import init_process_group
from brisk.errors import UserError


@dataclass
class Ranks:
    """The rank of this process, and collectives over all ranks.

    Started by plain `python`, a process is alone. A single process under torchrun has a process
    group, so that DDP and FSDP can be tested and measured on one device.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    parallel: str = "ddp"  # or "fsdp"
    launched: bool = False  # by torchrun or another launcher that sets RANK

    @classmethod
    def from_environment(cls, parallel="ddp"):
        """The `Ranks` that torchrun's environment variables describe."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        texts = [os.environ.get(n, d) for n, d in zip(names, ("0", "0", "1"), strict=True)]
        if not all(text.isdecimal() for text in texts) or int(texts[0]) >= int(texts[2]):
            found = ", ".join(f"{n}={t}" for n, t in zip(names, texts, strict=True))
            raise UserError(f"{found} in the environment describe no rank; use torchrun")
        return cls(*map(int, texts), parallel, launched="RANK" in os.environ)

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def is_alone(self):
        return self.world_size == 1 and not self.launched

    @property
    def shards(self):
        return self.parallel == "fsdp" and not self.is_alone

    def init(self, backend, device, timeout=600):
        """Initialize the process group. `backend` "auto" is NCCL on GPUs and gloo on CPUs. A
        collective fails after `timeout` seconds. Raises `UserError` for a wrong environment or
        backend."""
        if self.is_alone:
            return
        if not dist.is_available():
            raise UserError("this PyTorch has no torch.distributed; start without torchrun")
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"RANK is set without {missing[0]}; use torchrun, or unset RANK")
        if backend == "auto":
            backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl" and device.type != "cuda":
            raise UserError(f"--backend=nccl needs GPUs, but the device is {device.type}; use gloo")
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # collectives on host tensors do not wait for the GPU
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        if device.type == "cpu" and local > 1:  # torchrun sets OMP_NUM_THREADS=1
            torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // local))
        init_process_group(backend, self.rank, self.world_size, timeout)

    def destroy(self):
        """Destroy the process group, after a barrier: gloo fails on ranks that are still
        communicating when another one closes its connections."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def broadcast(self, value):
        """Broadcast `value` (plain Python) from rank 0. Returns it on every rank."""
        values = [value]
        if not self.is_alone:
            dist.broadcast_object_list(values)
        return values[0]

    def run_on_main(self, work):
        """Call `work()` on rank 0. Returns its result (plain Python), or raises its `UserError`, on
        every rank."""
        result = message = None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                message = str(error)
        result, message = self.broadcast((result, message))
        if message:
            raise UserError(message)
        return result

    def all_reduce_sum(self, tensor):
        """Sum `tensor` over the ranks, in place."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, number):
        """The maximum of the ranks' integers, on every rank. Does not synchronize with the GPU."""
        if self.is_alone:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def micro_batches(self, gradient_accumulation_steps, batch_size):
        """This rank's micro-batches of the global batch: a list of (index, first, count).

        The global batch has `gradient_accumulation_steps * batch_size` rows, independent of the
        world size. `index` numbers the micro-batches of all ranks, `first` is the first row of a
        micro-batch, and `count` its number of rows, at most `batch_size`.

        Raises `UserError` if the rows cannot be divided evenly among the ranks.
        """
        rows = gradient_accumulation_steps * batch_size
        if rows % self.world_size:
            step = self.world_size // math.gcd(batch_size, self.world_size)
            near = max(1, round(gradient_accumulation_steps / step)) * step
            raise UserError(
                f"gradient_accumulation_steps={gradient_accumulation_steps} times batch_size="
                f"{batch_size} is {rows} sequences, not divisible by {self.world_size} processes; "
                f"--gradient_accumulation_steps={near} works"
            )
        per_rank = rows // self.world_size
        n = math.ceil(per_rank / batch_size)
        edges = [per_rank * k // n for k in range(n + 1)]
        return [
            (self.rank * n + k, self.rank * per_rank + edges[k], edges[k + 1] - edges[k])
            for k in range(n)
        ]


@contextmanager
def clean_end():
    """A context that exits a process of a group with `os._exit`, without interpreter shutdown.

    With DDP, gloo's threads outlive `destroy_process_group` (PyTorch 2.13), and sometimes one of
    them aborts the process during shutdown.
    """
    status, alone = 0, "RANK" not in os.environ
    try:
        yield
    except SystemExit as end:
        if alone or not isinstance(end.code, int):
            raise
        status = end.code
    if not alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def is_sharded(tensor):
    """Whether `tensor` is a `DTensor`. `isinstance` would need an import that takes a second."""
    return hasattr(tensor, "device_mesh")


def to_local(tensor):
    """This rank's rows of a DTensor; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor
