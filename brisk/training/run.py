"""The resources of a run: process group, device, signals, folder, log and checkpoint writer."""

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
    """How a run ended: at its last step, early, by a signal, or by a failure."""

    signal: int = 0
    saved_step: int | None = None  # step of the checkpoint saved after a signal
    failure: str = ""  # one line
    reason: str = ""  # why it ended early without a signal or failure


class Run:
    """The resources that a run holds. `open_run` creates and releases them."""

    def __init__(self, given, ranks, device, stop, exit_stack):
        self.out_dir, self.ranks, self.device, self.stop = given.out_dir, ranks, device, stop
        self.log = RunLog(active=ranks.is_main)
        self.saver, self.exit_stack = None, exit_stack
        self.folder_lost = ""  # a message, if the folder was removed during the run
        self.lock = exit_stack.enter_context(FolderLock(given.out_dir, ranks))

    def say(self, text):
        """Print a line on rank 0."""
        self.log.say(text)

    def stop_signal(self):
        """The number of a stop signal that any rank received, or 0."""
        return self.ranks.all_reduce_max(self.stop.number or 0)

    def lock_folder(self, create=False):
        """Lock the folder if it exists, or create it first with `create`, and remove partial
        files."""
        self.lock.acquire(create)
        if self.ranks.is_main:
            remove_partial(self.out_dir)

    def lost_folder(self, step):
        """Why the run must not write to its folder any more, or "". A folder that was removed is
        created again; the run then ends with status 1, since earlier files are lost."""

        def check():
            if self.lock.is_held() or Path(self.out_dir).is_file():
                return ""
            if Path(self.out_dir).exists():
                return f"{self.lock.path} was removed, another run may write to {self.out_dir}"
            self.folder_lost = f"{self.out_dir} was removed during the run; earlier files are lost"
            self.say(f"{self.folder_lost}; continuing in a new folder")
            self.lock.release()
            refusal = self.lock.try_acquire(create=True)
            self.log.back_to(step)
            return refusal or ""

        return self.ranks.broadcast(check() if self.ranks.is_main else None)

    def open_folder(self, config, plan, resuming):
        """Create the folder, archive the files of an earlier run, and open the log."""
        saver = Saver(self.out_dir, self.say, self.ranks.is_main)
        self.saver = self.exit_stack.enter_context(saver)
        if config.eval_only:
            return
        self.lock_folder(create=True)
        if not self.ranks.is_main:
            return
        if not resuming and (folder := archive_previous_run(self.out_dir, RUN_FILES)):
            self.say(f"moved the files of an earlier run to {folder}")
        wandb = (config.wandb_project, config.wandb_run_name) if config.wandb_log else None
        settings = {**asdict(config), "resolved": plan.resolved}
        where = (self.out_dir, plan.first_step, plan.last_step)
        self.log.open(*where, settings, config.tensorboard, wandb)

    def close(self):
        """Wait for the last save and destroy the process group. Raises `RunError` if the save
        failed or the folder was removed."""
        self.log.close()
        failure = None
        if self.saver:
            self.saver.wait()
            failure = self.ranks.broadcast(self.saver.failure or self.folder_lost)
        self.ranks.destroy()
        if failure:
            raise RunError(failure)


@contextmanager
def open_run(given, stop=None):
    """A context with the `Run` of the settings `given`.

    Ranks that end with an exception do not wait for the others. `stop` replaces the signal
    handlers, for tests. Raises `UserError` if the machine does not support the settings, or another
    run has locked the folder.
    """
    if given.dry_run_world_size and not given.dry_run:
        raise UserError("--dry_run_world_size needs --dry_run=True; torchrun starts processes")
    if not given.out_dir:
        raise UserError("--out_dir= is empty; set a folder for the run")
    with lost_peers(), ExitStack() as exit_stack:
        ranks = Ranks.from_environment(given.parallel)
        local_rank = None if ranks.is_alone else ranks.local_rank
        device = open_device(given.device, given.dtype, local_rank)
        ranks.init(given.backend, device, given.timeout)
        stop = stop or exit_stack.enter_context(stop_requests())
        run = Run(given, ranks, device, stop, exit_stack)
        if not (given.eval_only or given.dry_run):
            run.lock_folder()  # before reading files that another run may be writing
        yield run
        run.close()


def conclude(outcome, config, best_val_loss, run):
    """Print how a run ended and set the exit status: 0 at its last step, 128 + n after signal n, 1
    after a failure (`RunError`)."""
    if outcome.failure:
        raise RunError(outcome.failure)
    if outcome.saved_step is not None:
        where = f"step {outcome.saved_step} to {config.out_dir}"
        run.say(f"saved {where}; --init_from=resume continues")
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    if outcome.reason:
        run.say(f"stopped early: {outcome.reason}")
    if not config.eval_only:
        peak = peak_memory(run.device)
        memory = f", peak memory {format_bytes(peak)}" if peak else ""
        run.say(f"best val loss {best_val_loss:.4f}{memory}")
        files = [name for name in RUN_FILES if Path(config.out_dir, name).exists()]
        run.say(f"{config.out_dir} has {', '.join(files)}; to sample from the model:")
        run.say(f"  python sample.py --out_dir={config.out_dir}")


def peak_flops_of(run, device):
    """Peak FLOP/s of all ranks together, in the precision of `device`."""
    flops, source = device.peak_flops() if run.ranks.is_main else (1.0, "")
    flops *= run.ranks.world_size
    run.say(f"mfu is relative to {flops / 1e12:.3g} TFLOP/s, {source}")
    return flops
