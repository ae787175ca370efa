"""A run from its start to its end: processes, device, signals, folder, log, checkpoints."""

import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from brisk.checkpoint import archive_previous_run, remove_partial
from brisk.device import open_device
from brisk.distributed.process_group import Ranks
from brisk.distributed.rendezvous import lost_peers
from brisk.errors import RunError, UserError, format_bytes
from brisk.reporting.run_log import RunLog
from brisk.training.async_checkpoint import Saver
from brisk.training.lock import FolderLock
from brisk.training.memory import peak_memory
from brisk.training.signals import stop_requests

RUN_FILES = ("ckpt.pt", "last.pt", "metrics.jsonl", "loss.png", "tensorboard", "wandb", "step-*.pt")


@dataclass(frozen=True)
class Outcome:
    """How a run ended: at its last step, or by a signal, or by a failure."""

    signal: int = 0
    saved_step: int | None = None  # at which a run that a signal ended is saved
    failure: str = ""  # why, in one line
    reason: str = ""  # why no further step was made, where that was no signal or failure


class Run:
    """What a run holds while it lasts. `open_run` makes one and gives all of it back."""

    def __init__(self, given, ranks, device, stop, at_end):
        self.out_dir, self.ranks, self.device, self.stop = given.out_dir, ranks, device, stop
        self.log = RunLog(active=ranks.is_main)
        self.saver, self.at_end = None, at_end
        self.removed = ""  # the folder, and what that means
        self.lock = at_end.enter_context(FolderLock(given.out_dir, ranks))

    def say(self, text):
        """Print a line, in the main process."""
        self.log.say(text)

    def stop_signal(self):
        """The number of a signal to stop that any of the processes got, or 0."""
        return self.ranks.all_reduce_max(self.stop.number or 0)

    def take_folder(self, make=False):
        """Lock the folder, if it is there or with `make`, and clear it of half-written files."""
        self.lock.take(make)
        if self.ranks.is_main:
            remove_partial(self.out_dir)

    def lost_folder(self, step):
        """Why the run may write to its folder no longer, or "". A folder that was removed as a
        whole is made again; the run then ends with status 1, since earlier files are lost."""

        def check():
            if self.lock.is_held() or Path(self.out_dir).is_file():
                return ""
            if Path(self.out_dir).exists():
                return f"{self.lock.path} was removed, another run may write to {self.out_dir}"
            self.removed = f"{self.out_dir} was removed during the run: its earlier files are lost"
            self.say(f"{self.removed}; going on in a new one")
            self.lock.give_back()
            refusal = self.lock.try_to(make=True)
            self.log.back_to(step)
            return refusal or ""

        return self.ranks.broadcast(check() if self.ranks.is_main else None)

    def open_folder(self, config, plan, resuming):
        """Make the folder, move an earlier run's files out of the way, and begin to record."""
        self.saver = self.at_end.enter_context(Saver(self.out_dir, self.say, self.ranks.is_main))
        if config.eval_only:
            return
        self.take_folder(make=True)
        if not self.ranks.is_main:
            return
        if not resuming and (folder := archive_previous_run(self.out_dir, RUN_FILES)):
            self.say(f"moved an earlier run's files to {folder}")
        wandb = (config.wandb_project, config.wandb_run_name) if config.wandb_log else None
        settings = {**asdict(config), "resolved": plan.resolved}
        where = (self.out_dir, plan.first_step, plan.last_step)
        self.log.open(*where, settings, config.tensorboard, wandb)

    def close(self):
        """End together, after the last write. Raises `RunError` if that failed."""
        self.log.close()
        failure = None
        if self.saver:
            self.saver.wait()
            failure = self.ranks.broadcast(self.saver.failure or self.removed)
        self.ranks.destroy()
        if failure:
            raise RunError(failure)


@contextmanager
def open_run(given, stop=None):
    """The `Run` of the settings `given`, closed at the end however that comes about.

    Processes that end by an exception do not wait for one another. `stop` takes the place of the
    signals to stop, for tests. Raises `UserError` where the machine does not have what is asked
    for, or another run is in the folder.
    """
    if given.dry_run_world_size and not given.dry_run:
        raise UserError("--dry_run_world_size goes with --dry_run=True; torchrun starts processes")
    if not given.out_dir:
        raise UserError("--out_dir= is empty; name a folder for the run")
    with lost_peers(), ExitStack() as at_end:
        ranks = Ranks.from_environment(given.parallel)
        local_rank = None if ranks.is_alone else ranks.local_rank
        device = open_device(given.device, given.dtype, local_rank)
        ranks.init(given.backend, device, given.timeout)
        stop = stop or at_end.enter_context(stop_requests())  # nothing to finish up to here
        run = Run(given, ranks, device, stop, at_end)
        if not (given.eval_only or given.dry_run):
            run.take_folder()  # before anything is read that another run may be writing
        yield run
        run.close()


def conclude(outcome, config, best_val_loss, run):
    """Say how a run ended and make its exit status of it: 0 at its last step, 128 and the number of
    the signal that stopped it, or 1 (`RunError`)."""
    if outcome.failure:
        raise RunError(outcome.failure)
    if outcome.saved_step is not None:
        where = f"step {outcome.saved_step} to {config.out_dir}"
        run.say(f"saved {where}; --init_from=resume goes on")
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    if outcome.reason:
        run.say(f"stopped early: {outcome.reason}")
    if not config.eval_only:
        peak = peak_memory(run.device)
        memory = f", memory at its peak {format_bytes(peak)}" if peak else ""
        run.say(f"best val loss {best_val_loss:.4f}{memory}")
        left = [name for name in RUN_FILES if Path(config.out_dir, name).exists()]
        run.say(f"{config.out_dir} has {', '.join(left)}; read what the model writes:")
        run.say(f"  python sample.py --out_dir={config.out_dir}")


def peak_flops_of(run, device):
    """FLOP/s of the devices of all processes together, in the precision of `device`."""
    flops, source = device.peak_flops() if run.ranks.is_main else (1.0, "")
    flops *= run.ranks.world_size
    run.say(f"mfu is a share of {flops / 1e12:.3g} TFLOP/s, {source}")
    return flops
