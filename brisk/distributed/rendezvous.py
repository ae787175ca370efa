"""Rendezvous that survives torchrun restarts, and the error when a rank is lost."""

import time
import uuid
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from brisk.errors import RunError, UserError


def init_process_group(backend, rank, world_size, seconds):
    """Initialize the process group. It, and every collective, fails after `seconds` of waiting.

    Raises `UserError` for a `backend` that this PyTorch does not support.
    """
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

    timeout = timedelta(seconds=seconds)
    with lost_peers():
        store, *_ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        name = agree_on_name(store, rank, world_size, seconds)
        try:
            store = dist.PrefixStore(name, store)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=world_size, timeout=timeout
            )
        except (ValueError, RuntimeError) as error:
            if is_network_error(error):
                raise
            raise UserError(f"--backend={backend}: {str(error).splitlines()[0]}") from error


def agree_on_name(store, rank, world_size, seconds):
    """A random name that all ranks of this start share, for the keys of this start in `store`.

    torchrun keeps one store over restarts, with the addresses of processes that have died
    (pytorch/pytorch#135712), and its restart count differs between hosts. So every rank announces a
    random id, rank 0 answers each id with the name, and returns when all ranks have confirmed it.
    """
    own_id = uuid.uuid4().hex
    if rank > 0:
        store.set(f"id/{rank}", own_id)
        name = store.get(f"answer/{own_id}").decode()
        store.set(f"{name}/{rank}", "confirmed")
        return name
    missing, deadline = set(range(1, world_size)), time.monotonic() + seconds
    while missing:
        for other in sorted(missing):
            if store.check([f"{own_id}/{other}"]):
                missing.remove(other)
            elif store.check([f"id/{other}"]):  # of this start, or left over from an earlier one
                store.set(f"answer/{store.get(f'id/{other}').decode()}", own_id)
        if time.monotonic() > deadline:
            present = world_size - len(missing)
            raise dist.DistNetworkError(
                f"only {present} of {world_size} processes joined within {seconds} s"
            )
        time.sleep(0.01)
    return own_id


@contextmanager
def lost_peers():
    """A context that raises `RunError` when another process is gone or does not respond."""
    try:
        yield
    except RuntimeError as error:
        if not is_network_error(error):
            raise
        hint = "--init_from=auto continues from the newest checkpoint"
        raise RunError(f"lost the run's other processes ({reason_of(error)}); {hint}") from error


def is_network_error(error):
    """Whether `error` is about another process. gloo raises a plain RuntimeError."""
    if not dist.is_available():
        return False
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def reason_of(error):
    """PyTorch's message, without its source location and advice."""
    line = str(error).splitlines()[0]
    line = line.partition(".cc:")[2].partition("] ")[2] or line
    return line.partition(". ")[0]
