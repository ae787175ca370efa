"""The processes that train together under `torchrun`: who they are, and what each one does."""

import math
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from brisk.errors import UserError


@dataclass
class Ranks:
    """This process among `world_size` processes; a plain `python` start is one of one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls):
        """What torchrun says in the environment."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        return cls(*(int(os.environ.get(n, d)) for n, d in zip(names, (0, 0, 1), strict=True)))

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def is_alone(self):
        return self.world_size == 1

    def join(self, backend, device):
        """Start the process group: NCCL between GPUs, gloo between CPUs, or as `backend` says."""
        if self.is_alone:
            return
        if backend == "auto":
            backend = "nccl" if device.type == "cuda" else "gloo"
        if backend == "nccl" and device.type != "cuda":
            raise UserError(f"--backend=nccl needs GPUs, the device is {device.type}; use gloo")
        if backend == "nccl":
            backend = "cpu:gloo,cuda:nccl"  # what hosts agree on need not wait for their devices
        if device.type == "cpu":  # torchrun gives each process one thread unless told otherwise
            local = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
            torch.set_num_threads(max(torch.get_num_threads(), (os.cpu_count() or 1) // local))
        try:
            dist.init_process_group(backend)
        except (ValueError, RuntimeError) as error:
            raise UserError(f"--backend={backend}: {str(error).splitlines()[0]}") from error

    def leave(self):
        """End the process group, all processes together: one that goes first takes gloo's
        connections away from under the others."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def agree(self, value):
        """The main process's `value` (plain Python), in every process."""
        values = [value]
        if not self.is_alone:
            dist.broadcast_object_list(values)
        return values[0]

    def sum(self, tensor):
        """`tensor` added up over all processes, in place."""
        if not self.is_alone:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number):
        """The largest of the processes' whole numbers, in all; no device is waited for."""
        if self.is_alone:
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def wrap(self, model, device):
        """`model` with its gradients averaged over the processes in the backward pass."""
        if self.is_alone:
            return model
        ids = [device.device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def share(self, gradient_accumulation_steps, batch_size):
        """This process's micro-batches of a global batch: a list of (index, first, count).

        The global batch is `gradient_accumulation_steps * batch_size` rows however many processes
        share it. `index` numbers the micro-batches over all processes, `first` is the row it
        starts at, `count` its rows, at most `batch_size`.

        Raises `UserError` where the rows cannot be shared evenly.
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
