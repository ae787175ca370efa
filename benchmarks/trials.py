"""Train on the first 95 % of the training text and evaluate on the rest, to choose settings.

val.bin is not used.
"""

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory

import numpy as np

from brisk.data.dataset import load_tokenizer, read_meta, write_dataset
from brisk.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def write_tuning_set(data_dir, folder):
    """Write a data set to `folder`: the first 95 % of a train.bin for training, the rest as val."""
    meta, tokenizer = read_meta(data_dir), load_tokenizer(data_dir)
    if meta is None:
        raise UserError(f"{data_dir} has no meta.json; prepare it with briskGPT")
    ids = np.fromfile(Path(data_dir, "train.bin"), dtype=np.dtype(meta["dtype"]))
    cut = len(ids) * 19 // 20
    texts = {"train": [tokenizer.decode(ids[:cut])], "val": [tokenizer.decode(ids[cut:])]}
    write_dataset(folder, tokenizer, texts, source=f"train.bin of {data_dir}")


def run(script, *argv):
    """Run a script of this repository. Returns its standard output. Raises `UserError` if it
    fails."""
    done = subprocess.run([sys.executable, ROOT / script, *argv], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{script} {' '.join(argv)}: {last}")
    return done.stdout


def trial(data_dir, argv, split="val"):
    """Train with `argv` and evaluate on all of `split`. Returns a dict: the loss (infinity if not
    finite) and the median time of a step in ms."""
    with TemporaryDirectory() as out:
        places = [f"--data_dir={data_dir}", f"--out_dir={out}", "--always_save_checkpoint=True"]
        run("train.py", *argv, *places, "--eval_interval=1000000", "--eval_iters=1")
        records = [json.loads(line) for line in Path(out, "metrics.jsonl").open(encoding="utf-8")]
        command = [f"--out_dir={out}", f"--data_dir={data_dir}", f"--split={split}", "--json"]
        loss = json.loads(run("evaluate.py", *command))["loss"]
    step_ms = median(record["step_ms"] for record in records if "step_ms" in record)
    return {"loss": loss if np.isfinite(loss) else float("inf"), "step_ms": step_ms}


def summary(trials):
    """The mean and standard deviation of the losses, and the median time of a step."""
    losses = [figures["loss"] for figures in trials]
    spread = stdev(losses) if len(losses) > 1 and np.isfinite(losses).all() else 0.0
    step_ms = median(figures["step_ms"] for figures in trials)
    return {"losses": losses, "mean": mean(losses), "spread": spread, "step_ms": step_ms}
