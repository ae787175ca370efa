"""The process group of a run: which rank this process is, and what ranks tell one another."""

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
    """This process among `world_size`; started by plain `python` it is the only one.

    A single process that a launcher started has a process group too: DDP and FSDP can be tried and
    measured on one device.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    parallel: str = "ddp"  # or "fsdp": each rank keeps a shard of the weights
    launched: bool = False  # by torchrun, which sets RANK, or by something like it

    @classmethod
    def from_environment(cls, parallel="ddp"):
        """What torchrun says in the environment."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        numbers = (int(os.environ.get(n, d)) for n, d in zip(names, (0, 0, 1), strict=True))
        return cls(*numbers, parallel, launched="RANK" in os.environ)

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
        """Initialize the process group: NCCL between GPUs, gloo between CPUs, or as `backend` says.
        A rank that waits `timeout` seconds for another gives up."""
        if self.is_alone:
            return
        if not dist.is_available():
            raise UserError("this PyTorch has no torch.distributed; start without torchrun")
        if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
            raise UserError(f"RANK is set, {missing[0]} is not: start with torchrun, or unset RANK")
        if backend == "auto":
            backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl" and device.type != "cuda":
            raise UserError(f"--backend=nccl needs GPUs, the device is {device.type}; use gloo")
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # collectives on host tensors do not wait for the GPU
        local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        if device.type == "cpu" and local > 1:  # torchrun gives each of several one thread
            torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // local))
        init_process_group(backend, self.rank, self.world_size, timeout)

    def destroy(self):
        """Destroy the process group, all ranks together: one that goes first would take gloo's
        connections away from under the others."""
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def broadcast(self, value):
        """The `value` of rank 0 (plain Python), on every rank."""
        values = [value]
        if not self.is_alone:
            dist.broadcast_object_list(values)
        return values[0]

    def run_on_main(self, work):
        """Call `work()` on rank 0; return what it returns (plain Python), or raise its
        `UserError`, on every rank."""
        result = mistake = None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                mistake = str(error)
        result, mistake = self.broadcast((result, mistake))
        if mistake:
            raise UserError(mistake)
        return result

    def all_reduce_sum(self, tensor):
        """Sum `tensor` over the ranks, in place."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, number):
        """The largest of the ranks' integers, on every rank; waits for no device."""
        if self.is_alone:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def micro_batches(self, gradient_accumulation_steps, batch_size):
        """This rank's micro-batches of a global batch: a list of (index, first, count).

        The global batch has `gradient_accumulation_steps * batch_size` rows, whatever the number of
        ranks. `index` numbers the micro-batches over all ranks, `first` is the row it starts at,
        `count` its number of rows, at most `batch_size`.

        Raises `UserError` where the rows cannot be divided evenly.
        """
        rows = gradient_accumulation_steps * batch_size
        if rows % self.world_size:
            step = self.world_size // math.gcd(batch_size, self.world_size)
            near = max(1, round(gradient_accumulation_steps / step)) * step
            raise UserError(
                f"gradient_accumulation_steps={gradient_accumulation_steps} times batch_size="
                f"{batch_size} is {rows} sequences, which {self.world_size} processes cannot "
                f"share evenly; --gradient_accumulation_steps={near} can be"
            )
        mine = rows // self.world_size
        number = math.ceil(mine / batch_size)
        edges = [mine * k // number for k in range(number + 1)]
        return [
            (self.rank * number + k, self.rank * mine + edges[k], edges[k + 1] - edges[k])
            for k in range(number)
        ]


@contextmanager
def clean_end():
    """A process of several ends with its status as soon as what is inside has ended.

    gloo's threads outlive `destroy_process_group` where a model was wrapped (PyTorch 2.13), and now
    and then one of them aborts the process while the interpreter takes itself down.
    """
    status, alone = 0, Ranks.from_environment().is_alone
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
    """Whether it is a `DTensor`; importing the class would take a second of every start."""
    return hasattr(tensor, "device_mesh")


def local(tensor):
    """This process's rows of a tensor that is sharded; all of any other."""
    return tensor.to_local() if is_sharded(tensor) else tensor
