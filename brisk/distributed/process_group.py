"""The processes that train together under `torchrun`: who they are, and what each one does."""

import math
import os
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from brisk.distributed.rendezvous import join
from brisk.errors import UserError


@dataclass
class Ranks:
    """This process among `world_size` processes; a plain `python` start is one of one."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    parallel: str = "ddp"  # or "fsdp": each process keeps a part of the weights

    @classmethod
    def from_environment(cls, parallel="ddp"):
        """What torchrun says in the environment."""
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        numbers = (int(os.environ.get(n, d)) for n, d in zip(names, (0, 0, 1), strict=True))
        return cls(*numbers, parallel)

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def is_alone(self):
        return self.world_size == 1

    @property
    def shards(self):
        return self.parallel == "fsdp" and not self.is_alone

    def join(self, backend, device, timeout=600):
        """Start the process group: NCCL between GPUs, gloo between CPUs, or as `backend` says. A
        process that waits `timeout` seconds for another gives up."""
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
        join(backend, self.rank, self.world_size, timeout)

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

    def told(self, work):
        """What `work()` returns in the main process (plain Python), in every process; or its
        `UserError`, in all of them."""
        result = mistake = None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                mistake = str(error)
        result, mistake = self.agree((result, mistake))
        if mistake:
            raise UserError(mistake)
        return result

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

    def check_offload(self, device):
        """Raise `UserError` where the shards of the weights cannot be kept on the host."""
        if not self.shards:
            raise UserError("--cpu_offload needs --parallel=fsdp, and several processes (torchrun)")
        if device.type != "cuda":
            raise UserError(f"--cpu_offload spares memory of GPUs, the device is {device.type}")
        if device.dtype_name == "float16":
            raise UserError("--cpu_offload does not go with the gradient scaler of --dtype=float16")

    def build(self, build_model):
        """The model of `build_model()` on the CPU. Under FSDP only the main process calls it; the
        others get one of its shape with nothing in it, and its `UserError`."""
        if not self.shards:
            return build_model()
        built = []

        def build():
            built.append(build_model())
            return type(built[0]), built[0].config

        kind, config = self.told(build)
        return built[0] if self.is_main else kind.empty(config)

    def wrap(self, model, device, offload=False):
        """`model`, so far on the CPU, as it is to be trained: on its device, with its gradients
        averaged over the processes in the backward pass, under FSDP sharded. All processes begin
        with the main one's weights."""
        if self.shards:
            from brisk.distributed.parallelize import shard

            shard(model, device, self.world_size, offload)
            return model
        model.to(device.device)
        if self.is_alone:
            return model
        ids = [device.device.index] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)

    def average_gradients(self, trained, now):
        """Whether the gradients of the processes meet in the next backward pass."""
        if self.shards:
            trained.set_requires_gradient_sync(now)
        elif not self.is_alone:
            trained.require_backward_grad_sync = now

    def clip_gradients(self, model, limit, device):
        """Shorten the gradient to a norm of `limit`; its norm before, a tensor () on the device."""
        if not self.shards:
            return torch.nn.utils.clip_grad_norm_(model.parameters(), limit)
        from brisk.distributed.parallelize import gathered

        weights = [p for p in model.parameters() if p.grad is not None]
        norm = gathered(torch.nn.utils.get_total_norm([p.grad for p in weights]))
        torch.nn.utils.clip_grads_with_norm_(weights, limit, norm.to(weights[0].device))
        return norm.to(device.device)

    def load_weights(self, model, weights):
        """Give `model`, which may be sharded, the main process's `weights`, a state dict."""
        if not self.shards:
            model.load_state_dict(weights)
            return
        from brisk.distributed.parallelize import load_weights

        load_weights(model, weights)

    def whole_weights(self, model):
        """A context in which the main process may use `model` without the others."""
        if not self.shards:
            return nullcontext()
        from brisk.distributed.parallelize import whole_weights

        return whole_weights(model)

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
