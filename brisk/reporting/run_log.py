"""Logging: console, progress bar, `metrics.jsonl`, a plot of the losses, TensorBoard and wandb.

`metrics.jsonl` has one JSON object per line. Non-finite numbers are null. All lines have `step`,
`tokens` (seen so far) and `seconds` (total, over resumes). Training lines have `loss` (nats), `lr`,
`grad_norm` (before clipping), `clipped` (fraction of the steps since the last line whose norm
exceeded `grad_clip`), `step_ms`, `tokens_per_second`, `mfu` and `memory` (peak bytes so far, if
known). Evaluation lines have `train_loss`, `val_loss` and optionally `samples`, a list of texts.
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

from brisk.errors import discard_stdout, without_controls
from brisk.reporting.curves import leave_picture


class RunLog:
    """The log of one run. With `active=False`, on ranks other than 0, it does nothing."""

    def __init__(self, active=True):
        self.active = active
        self.file = self.bar = self.board = self.wandb = self.out_dir = None
        self.warned = False  # about a non-finite loss
        self.write_failed = False  # the last line of metrics.jsonl was lost
        self.began = time.monotonic()  # not affected by changes of the wall clock

    def say(self, text):
        """Print a line above the progress bar."""
        if self.active:
            encoding = sys.stdout.encoding or "utf-8"  # Windows consoles lack many characters
            try:
                tqdm.write(text.encode(encoding, "replace").decode(encoding))
                sys.stdout.flush()
            except OSError as error:  # the reader is gone, or the disk of a redirected log is full
                discard_stdout()
                with suppress(OSError):
                    print(f"note: no console output any more ({error.strerror})", file=sys.stderr)

    def open(self, out_dir, step, last_step, settings, tensorboard=False, wandb=None):
        """Start recording at `step`. Existing lines of this step and later ones are removed.

        `wandb` is (project, run name), or None. If a backend is unavailable, one line says so and
        the run continues without it.
        """
        if not self.active:
            return
        path = Path(out_dir, "metrics.jsonl")
        seconds = truncate_metrics(path, step)
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
        """Log a training step: nanoGPT's line on the console, the whole `record` in the files."""
        if not self.active:
            return
        loss, milliseconds, mfu = record["loss"], record["step_ms"], record["mfu"]
        self.say(f"iter {step}: loss {loss:.4f}, time {milliseconds:.2f}ms, mfu {mfu * 100:.2f}%")
        if not math.isfinite(loss) and not self.warned:
            self.say("the loss is no longer finite: try a lower --learning_rate")
            self.warned = True
        speed = f"{record['tokens_per_second']:,.0f}"
        self.bar.set_postfix({"loss": f"{loss:.3f}", "tokens/s": speed}, refresh=False)
        self.record(step, record)

    def evaluation(self, step, record):
        """Log an evaluation and its samples."""
        train, val = record["train_loss"], record["val_loss"]
        self.say(f"step {step}: train loss {train:.4f}, val loss {val:.4f}")
        for number, text in enumerate(record.get("samples", ()), 1):
            self.say(f"  sample {number}:\n{prefix_lines(text, '  | ')}")
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
            self.send("board", send_to_tensorboard, step, numbers, samples)
        if self.wandb:
            self.send("wandb", send_to_wandb, step, numbers, samples)

    def write_line(self, line):
        """Write a line of metrics.jsonl. On a full disk the line is lost and the run continues."""
        try:
            self.file.write(line + "\n")
            self.file.flush()
            self.write_failed = False
        except OSError as error:
            if not self.write_failed:
                self.say(f"cannot write metrics.jsonl: {error.strerror}; continuing without it")
            self.write_failed = True

    def back_to(self, step):
        """Remove the lines from `step` on, from which the run continues after a rewind."""
        if not self.file:
            return
        self.file.close()
        path = Path(self.out_dir, "metrics.jsonl")
        truncate_metrics(path, step)
        self.file = open(path, "a", encoding="utf-8")
        self.bar.n = step
        self.bar.refresh()

    def send(self, name, call, *arguments):
        """Call `call` with the backend `name`, "board" or "wandb". If it raises any exception, the
        run continues without this backend."""
        try:
            call(getattr(self, name), *arguments)
        except Exception as error:
            backend = {"board": "TensorBoard"}.get(name, name)
            reason = " ".join(str(error).split())
            self.say(f"{backend} failed ({reason}); continuing without it")
            setattr(self, name, None)

    def advance(self):
        """Advance the progress bar by one step."""
        if self.bar:
            self.bar.update()

    def close(self):
        """Close all files and backends, and plot the losses in `loss.png`."""
        for part in (self.bar, self.file):
            if part is not None:
                with suppress(OSError):  # a full disk, reported before
                    part.close()
        if self.board:
            self.send("board", lambda board: board.close())
        if self.wandb:
            self.send("wandb", lambda run: run.finish())
        if self.file:
            leave_picture(self.out_dir, self.say)


def prefix_lines(text, prefix):
    """`text` with `prefix` before each line, and without control characters."""
    return "\n".join(prefix + without_controls(line) for line in text.splitlines() or [""])


def truncate_metrics(path, step):
    """Remove lines from `step` on, and an incomplete last line, from the file at `path`. Returns
    the maximum `seconds` of the remaining lines, or 0."""
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
        say("TensorBoard is not installed (pip install tensorboard); continuing without it")
        return None
    try:
        return SummaryWriter(Path(out_dir, "tensorboard"), purge_step=step)
    except Exception as error:  # a full disk, no permission
        say(f"TensorBoard could not start ({error}); continuing without it")
        return None


def send_to_tensorboard(board, step, numbers, samples):
    for key, value in numbers.items():
        board.add_scalar(key, value, step)
    if samples:  # indented by four spaces: a code block in Markdown
        texts = [prefix_lines(text, "    ") for text in samples]
        board.add_text("samples", "\n\n---\n\n".join(texts), step)


def open_wandb(project, name, settings, out_dir, say):
    """Start a wandb run: online with an API key, else offline. Never prompts. Returns None if wandb
    is not installed or fails."""
    try:
        import wandb
    except ImportError:
        say("wandb is not installed (pip install wandb); continuing without it")
        return None
    try:
        mode = os.environ.get("WANDB_MODE")
        if not mode and not (os.environ.get("WANDB_API_KEY") or wandb_key()):
            say("wandb has no API key (wandb login); recording offline, upload with `wandb sync`")
            mode = "offline"
        return wandb.init(project=project, name=name, config=settings, dir=out_dir, mode=mode)
    except Exception as error:  # no network, a full disk, an incompatible version
        say(f"wandb could not start ({' '.join(str(error).split())}); continuing without it")
        return None


def send_to_wandb(run, step, numbers, samples):
    record = {"iter": step, **numbers}
    if samples:
        import wandb

        pages = [f"<pre>{html.escape(text)}</pre>" for text in samples]
        record["samples"] = wandb.Html("<hr>".join(pages))
    run.log(record, step=step)


def wandb_key():
    """The API key that `wandb login` stored, or None. (wandb's own function may prompt.)"""
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
        return known[2] if known else None
    except (OSError, netrc.NetrcParseError):
        return None
