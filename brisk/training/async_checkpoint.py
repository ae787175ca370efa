"""A run's checkpoints, written while the run goes on."""

import math
import threading
from pathlib import Path

import torch

from brisk.checkpoint import latest_checkpoint, save_checkpoint
from brisk.distributed.process_group import is_sharded
from brisk.errors import UserError


class Saver:
    """Writes a run's checkpoints on a thread: training waits for a copy of the state and no more.

    One write is under way at a time, a save waits for the one before. A save that fails leaves what
    is there as it is and says why; the next one is another try. Leaving it as a context manager
    waits for the last write. All processes have one; the main one's `writes`.
    """

    def __init__(self, out_dir, say=print, writes=True):
        self.out_dir, self.say, self.writes = Path(out_dir), say, writes
        self.thread = None
        self.failure = None  # why the newest save failed, in a line
        self.mistake = None  # an error of ours on the thread, for the one who waits for it

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    def save(self, state, as_best, keep=0, losses=()):
        """Save `state` as `last.pt`, where `as_best` is true as `ckpt.pt` too, and with `keep` as
        `step-<step>.pt`, of which the `keep` newest stay.

        `losses` are those measured on this state. Where one of them, a weight or a moment is not
        finite, nothing is written.

        Under FSDP all processes call it together, and give their shards.
        """
        self.wait()
        todo = (on_host(state, self.writes), as_best, keep, losses)
        if not self.writes:
            return
        self.thread = threading.Thread(target=self.write, args=todo, name="saver")
        self.thread.start()

    def write(self, state, as_best, keep, losses):
        step = state["iter_num"]
        names = [self.out_dir / f"step-{step:06d}.pt"] if keep else []
        if as_best:
            names.append(self.out_dir / "ckpt.pt")  # last: once it is there a run resumes at it
        try:
            if broken := not_finite(state, losses):
                raise UserError(f"step {step} is not saved: {broken}; what was there is kept")
            save_checkpoint(state, self.out_dir / "last.pt", names)
            if keep:
                remove_older(self.out_dir, step, keep)
            self.failure = None
        except UserError as error:
            self.failure = str(error)
            self.say(f"{error}; the next save tries again")
        except BaseException as error:
            self.mistake = error

    def wait(self):
        """Return when nothing is being written."""
        if self.thread:
            self.thread.join()
            self.thread = None
        if self.mistake:
            mistake, self.mistake = self.mistake, None
            raise mistake

    def newest(self):
        """Path of the newest whole checkpoint, after the write under way; None where none is."""
        self.wait()
        try:
            return latest_checkpoint(self.out_dir)
        except UserError:
            return None


def on_host(value, keeps=True, copies=None):
    """`value` with each tensor in it, or in dicts in it, copied to the host's memory, those that
    are sharded put together. Two names of one tensor stay two names of one; what is no tensor is
    shared. A process that `keeps` none of it only gives its shards, one tensor after another."""
    copies = {} if copies is None else copies
    if isinstance(value, dict):
        return {key: on_host(part, keeps, copies) for key, part in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    sharded = is_sharded(value)
    key = id(value) if sharded else (value.data_ptr(), value.shape)
    if key not in copies:
        if sharded:
            from brisk.distributed.fsdp import full_tensor

            whole = full_tensor(value)
            copies[key] = whole.to("cpu") if keeps else None
        else:
            copies[key] = value.detach().to("cpu", copy=True) if keeps else None
    return copies[key]


def not_finite(state, losses):
    """What is not finite in a checkpoint, in words, or None."""
    for loss in losses:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
    for name, weight in state["model"].items():
        if has_nonfinite(weight):
            return f"{name} has numbers that are not finite"
    for moments in state["optimizer"]["state"].values():
        if any(map(has_nonfinite, moments.values())):
            return "the optimizer's moments are not finite"
    return None


def has_nonfinite(tensor):
    """Whether a number is infinite or NaN: the smallest or the largest then is, too."""
    return tensor.numel() > 0 and not torch.stack(tensor.aminmax()).isfinite().all()


def remove_older(out_dir, step, keep):
    """Of the files `step-<number>.pt` up to `step`, all but the `keep` newest are removed. Those of
    later steps are of another start of the run, and stay until it comes there."""
    numbered = [(path.stem.removeprefix("step-"), path) for path in out_dir.glob("step-*.pt")]
    history = sorted((int(n), path) for n, path in numbered if n.isdecimal() and int(n) <= step)
    for _, path in history[:-keep]:
        path.unlink(missing_ok=True)
