"""Asynchronous checkpoints."""

import math
import threading
from pathlib import Path

import torch

from brisk.checkpoint import latest_checkpoint, save_checkpoint
from brisk.distributed.process_group import is_sharded
from brisk.errors import UserError


class Saver:
    """Writes checkpoints on a thread; training blocks only for the copy to host memory.

    One save runs at a time: the next one waits for it. A failed save keeps the old files and prints
    one line; training continues. As a context manager it waits for the last write at the end. Every
    rank creates one, and rank 0 `writes`.
    """

    def __init__(self, out_dir, say=print, writes=True):
        self.out_dir, self.say, self.writes = Path(out_dir), say, writes
        self.thread = None
        self.failure = None  # one line, if the newest save failed
        self.error = None  # an unexpected exception on the thread, raised by `wait`

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    def save(self, state, as_best, keep=0, losses=()):
        """Save `state`. With FSDP, call it on all ranks.

        Args:
            state: nested dicts of tensors and plain values.
            as_best: save as `ckpt.pt` too, not only as `last.pt`.
            keep: if not 0, also save as `step-<step>.pt`, and keep the `keep` newest of these.
            losses: evaluated on this state. If a loss, a weight or a moment is not finite, nothing
                is written.
        """
        self.wait()
        args = (copy_to_host(state, self.writes), as_best, keep, losses)
        if not self.writes:
            return
        self.thread = threading.Thread(target=self.write, args=args, name="saver")
        self.thread.start()

    def write(self, state, as_best, keep, losses):
        step = state["iter_num"]
        names = [self.out_dir / f"step-{step:06d}.pt"] if keep else []
        if as_best:
            names.append(self.out_dir / "ckpt.pt")  # last, since a run can resume from it
        try:
            if reason := find_nonfinite(state, losses):
                raise UserError(f"step {step} is not saved: {reason}; the old files are unchanged")
            save_checkpoint(state, self.out_dir / "last.pt", names)
            if keep:
                remove_older(self.out_dir, step, keep)
            self.failure = None
        except UserError as error:
            self.failure = str(error)
            self.say(f"{error}; retrying at the next save")
        except BaseException as error:
            self.error = error

    def wait(self):
        """Wait for the save in progress."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.error:
            error, self.error = self.error, None
            raise error

    def newest(self):
        """Path of the newest valid checkpoint, or None. Waits for the save in progress."""
        self.wait()
        try:
            return latest_checkpoint(self.out_dir)
        except UserError:
            return None


def copy_to_host(value, keep=True, copies=None):
    """Copy the tensors in nested dicts to host memory; other values are shared. DTensors are
    gathered, and a tied tensor is copied once. With `keep=False` a rank takes part in the gather
    and keeps no copies."""
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        return {key: copy_to_host(part, keep, copies) for key, part in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    sharded = is_sharded(value)
    key = id(value) if sharded else (value.data_ptr(), value.shape)
    if key not in copies:
        if sharded:
            from brisk.distributed.fsdp import full_tensor

            whole = full_tensor(value)
            copies[key] = whole.to("cpu") if keep else None
        else:
            copies[key] = value.detach().to("cpu", copy=True) if keep else None
    return copies[key]


def find_nonfinite(state, losses):
    """A description of the first non-finite value in a checkpoint, or None."""
    for loss in losses:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
    for name, weight in state["model"].items():
        if has_nonfinite(weight):
            return f"{name} has values that are not finite"
    for moments in state["optimizer"]["state"].values():
        if any(map(has_nonfinite, moments.values())):
            return "the optimizer's moments are not finite"
    return None


def has_nonfinite(tensor):
    """Whether a value is infinite or NaN; then so is the minimum or the maximum."""
    return tensor.numel() > 0 and not torch.stack(tensor.aminmax()).isfinite().all()


def remove_older(out_dir, step, keep):
    """Remove the files `step-<number>.pt` up to `step`, except the `keep` newest. Later ones are
    from before a rewind or resume, and are kept until the run reaches their step."""
    numbered = [(path.stem.removeprefix("step-"), path) for path in out_dir.glob("step-*.pt")]
    history = sorted((int(n), path) for n, path in numbered if n.isdecimal() and int(n) <= step)
    for _, path in history[:-keep]:
        path.unlink(missing_ok=True)
