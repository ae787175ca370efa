"""Where a run's numbers go: the console, a progress bar, `metrics.jsonl` and a picture of it,
TensorBoard, wandb.

`metrics.jsonl` has one JSON object per line, in which a number that is not finite is null. Both
kinds of line have `step`, `tokens` (seen so far) and `seconds` (of all starts together). Training
lines: `loss` (nats), `lr`, `grad_norm` (before clipping), `clipped` (share of the steps since the
line before whose norm was over `grad_clip`), `step_ms`, `tokens_per_second`, `mfu`, `memory` (bytes
at the peak so far, where known). Evaluation lines: `train_loss`, `val_loss` and, if asked for,
`samples`, a list of texts.
"""

import html
import json
import math
import netrc
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlparse

from tqdm import tqdm

from brisk.errors import without_controls
from brisk.reporting.curves import leave_picture


class RunLog:
    """The log of one run. In processes other than the main one (`active=False`) it is silent."""

    def __init__(self, active=True):
        self.active = active
        self.file = self.bar = self.board = self.wandb = self.out_dir = None
        self.warned = False  # that the loss is not finite
        self.losing = False  # whether lines of metrics.jsonl are being lost
        self.began = time.monotonic()  # the wall clock may be set back

    def say(self, text):
        """Print a line, above the progress bar where there is one."""
        if self.active:
            encoding = sys.stdout.encoding or "utf-8"  # a Windows console's lacks many characters
            tqdm.write(text.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()

    def open(self, out_dir, step, last_step, settings, tensorboard=False, wandb=None):
        """Begin to record at `step`; lines that an earlier start wrote for it or later are cut.

        `wandb` is (project, run name), or None. A recorder that cannot be had is left out with
        one line; the run goes on.
        """
        if not self.active:
            return
        path = Path(out_dir, "metrics.jsonl")
        seconds = cut_metrics(path, step)
        self.began = time.monotonic() - seconds
        self.file = open(path, "a", encoding="utf-8")
        tty = sys.stderr.isatty()
        self.bar = tqdm(total=last_step + 1, initial=step, unit="step", disable=not tty)
        self.out_dir = out_dir
        if tensorboard:
            self.board = open_tensorboard(out_dir, step, self.say)
        if wandb:
            self.wandb = open_wandb(*wandb, settings, out_dir, self.say)

    def iteration(self, step, record):
        """A training step's numbers: nanoGPT's line on the console, all of them in the files."""
        if not self.active:
            return
        loss, milliseconds, mfu = record["loss"], record["step_ms"], record["mfu"]
        self.say(f"iter {step}: loss {loss:.4f}, time {milliseconds:.2f}ms, mfu {mfu * 100:.2f}%")
        if not math.isfinite(loss) and not self.warned:
            self.say("the loss is not finite any more: try a lower --learning_rate")
            self.warned = True
        speed = f"{record['tokens_per_second']:,.0f}"
        self.bar.set_postfix({"loss": f"{loss:.3f}", "tokens/s": speed}, refresh=False)
        self.record(step, record)

    def evaluation(self, step, record):
        """An evaluation's numbers, likewise, and the texts that were drawn at it."""
        train, val = record["train_loss"], record["val_loss"]
        self.say(f"step {step}: train loss {train:.4f}, val loss {val:.4f}")
        for number, text in enumerate(record.get("samples", ()), 1):
            self.say(f"  sample {number}:\n{quoted(text, '  | ')}")
        self.record(step, record)

    def record(self, step, record):
        if not self.file:
            return
        record = {key: value for key, value in record.items() if value is not None}
        line = {"step": step, **record, "seconds": round(time.monotonic() - self.began, 3)}
        for key, value in line.items():
            if isinstance(value, float) and not math.isfinite(value):
                line[key] = None  # JSON has no NaN
        self.write_line(json.dumps(line, allow_nan=False))
        samples = record.pop("samples", ())
        names = {"train_loss": "train/loss", "val_loss": "val/loss", "loss": "train/batch_loss"}
        numbers = {names.get(key, key): value for key, value in record.items()}
        if self.board:
            self.trying("board", send_to_tensorboard, step, numbers, samples)
        if self.wandb:
            self.trying("wandb", send_to_wandb, step, numbers, samples)

    def write_line(self, line):
        """A disk that is full costs lines, not the run."""
        try:
            self.file.write(line + "\n")
            self.file.flush()
            self.losing = False
        except OSError as error:
            if not self.losing:
                self.say(f"metrics.jsonl cannot be written: {error.strerror}; going on without")
            self.losing = True

    def back_to(self, step):
        """The run goes on from an earlier `step`: the lines from there on are cut."""
        if not self.file:
            return
        self.file.close()
        path = Path(self.out_dir, "metrics.jsonl")
        cut_metrics(path, step)
        self.file = open(path, "a", encoding="utf-8")
        self.bar.n = step
        self.bar.refresh()

    def trying(self, part, send, *what):
        """Send to a recorder; one that fails, in whatever way, is left: training matters more."""
        try:
            send(getattr(self, part), *what)
        except Exception as error:
            name = {"board": "TensorBoard"}.get(part, part)
            reason = " ".join(str(error).split())
            self.say(f"{name} stopped taking numbers ({reason}); going on without it")
            setattr(self, part, None)

    def advance(self):
        """One step is done."""
        if self.bar:
            self.bar.update()

    def close(self):
        """All that was opened is closed, and the losses are drawn in `loss.png`."""
        for part in (self.bar, self.file):
            if part is not None:
                with suppress(OSError):  # a full disk, of which a line was said
                    part.close()
        if self.board:
            self.trying("board", lambda board: board.close())
        if self.wandb:
            self.trying("wandb", lambda run: run.finish())
        if self.file:
            leave_picture(self.out_dir, self.say)


def quoted(text, mark):
    """`text` with `mark` before each line, and without control characters."""
    return "\n".join(mark + without_controls(line) for line in text.splitlines() or [""])


def cut_metrics(path, step):
    """Drop the lines of `path` from `step` on, and a last line that was not written whole.
    Returns the most seconds of a line kept, 0 where there is none."""
    if not path.exists():
        return 0.0
    kept, seconds = [], 0.0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] < step:
                kept.append(line)
                seconds = max(seconds, float(record["seconds"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    writing = path.with_name(path.name + ".writing")
    writing.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(writing, path)
    return seconds


def open_tensorboard(out_dir, step, say):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        say("TensorBoard is not installed (pip install tensorboard); going on without it")
        return None
    try:
        return SummaryWriter(Path(out_dir, "tensorboard"), purge_step=step)
    except Exception as error:  # no room, no permission
        say(f"TensorBoard could not start ({error}); going on without it")
        return None


def send_to_tensorboard(board, step, numbers, samples):
    for key, value in numbers.items():
        board.add_scalar(key, value, step)
    if samples:  # four spaces: Markdown for text as it stands
        texts = [quoted(text, "    ") for text in samples]
        board.add_text("samples", "\n\n---\n\n".join(texts), step)


def open_wandb(project, name, settings, out_dir, say):
    """A wandb run: online with a key, offline without one, None without wandb. Never asks."""
    try:
        import wandb
    except ImportError:
        say("wandb is not installed (pip install wandb); going on without it")
        return None
    try:
        mode = os.environ.get("WANDB_MODE")
        if not mode and not (os.environ.get("WANDB_API_KEY") or wandb_key()):
            say("wandb has no key (wandb login); it records offline, `wandb sync` sends it later")
            mode = "offline"
        return wandb.init(project=project, name=name, config=settings, dir=out_dir, mode=mode)
    except Exception as error:  # no network, no room, a version it does not like
        say(f"wandb could not start ({' '.join(str(error).split())}); going on without it")
        return None


def send_to_wandb(run, step, numbers, samples):
    record = {"iter": step, **numbers}
    if samples:
        import wandb

        pages = [f"<pre>{html.escape(text)}</pre>" for text in samples]
        record["samples"] = wandb.Html("<hr>".join(pages))
    run.log(record, step=step)


def wandb_key():
    """The key that `wandb login` stored, None without one. (Asking wandb itself may prompt.)"""
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        return known[2] if known else None
    except (OSError, netrc.NetrcParseError):
        return None
