"""Rendezvous that survives torchrun restarts, and the error when a rank is lost."""

import time
import uuid
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from brisk.errors import RunError, UserError


def init_process_group(backend, rank, world_size, seconds):
    """Initialize the process group. A rank that waits `seconds` for another gives up, here and in
    every collective.

    Raises `UserError` for a `backend` that this PyTorch does not have.
    """
    from torch.distributed.rendezvous import rendezvous  # not in every PyTorch

    patience = timedelta(seconds=seconds)
    with lost_peers():
        store, *_ = next(rendezvous("env://", rank, world_size, timeout=patience))
        store.set_timeout(patience)
        name = name_of_this_start(store, rank, world_size, seconds)
        try:
            store = dist.PrefixStore(name, store)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=patience
            )
        except (ValueError, RuntimeError) as error:
            if is_of_the_network(error):
                raise
            raise UserError(f"--backend={backend}: {str(error).splitlines()[0]}") from error


def name_of_this_start(store, rank, world_size, seconds):
    """A random name, the same in all processes of this start and of no other.

    torchrun keeps one store for all starts of a group, with the addresses of the processes that
    died in it (pytorch/pytorch#135712), and its count of restarts is each host's own. So every
    process says hello with a word of its own, the main one answers to each word with the name, and
    is done when all have repeated that.
    """
    word = uuid.uuid4().hex
    if rank > 0:
        store.set(f"hello/{rank}", word)
        name = store.get(f"answer/{word}").decode()
        store.set(f"{name}/{rank}", "heard")
        return name
    missing, until = set(range(1, world_size)), time.monotonic() + seconds
    while missing:
        for other in sorted(missing):
            if store.check([f"{word}/{other}"]):
                missing.remove(other)
            elif store.check([f"hello/{other}"]):  # of this start, or still of one before
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", word)
        if time.monotonic() > until:
            few = f"{world_size - len(missing)} of {world_size} processes are there"
            raise dist.DistNetworkError(f"after {seconds} s only {few}")
        time.sleep(0.01)
    return word


@contextmanager
def lost_peers():
    """A process that is gone, or silent for too long, ends the others with a `RunError`."""
    try:
        yield
    except RuntimeError as error:
        if not is_of_the_network(error):
            raise
        mend = "its newest checkpoint is whole, --init_from=auto goes on from it"
        raise RunError(f"lost the run's other processes ({reason_of(error)}); {mend}") from error


def is_of_the_network(error):
    """Whether it is about the other processes; gloo's errors have no class of their own."""
    if not dist.is_available():
        return False
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def reason_of(error):
    """PyTorch's reason without the place in its source and the advice."""
    line = str(error).splitlines()[0]
    line = line.partition(".cc:")[2].partition("] ")[2] or line
    return line.partition(". ")[0]
