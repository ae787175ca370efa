"""Race a recipe against nanoGPT's small CPU run: loss and time of both.

    $ python data/shakespeare_char/prepare.py
    $ python benchmarks/race.py --peer=path/to/nanoGPT

In each round nanoGPT's train.py makes the CPU run of its README, and ours the recipe, as whole
processes in alternating order. Both checkpoints are then evaluated on all of val.bin. Also prints
the time from the start of our process until its estimate of the loss first reached nanoGPT's final
loss. Our seed changes with the round; nanoGPT's is fixed.
"""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.data.loader import find_data_dir
from brisk.errors import UserError, one_line_errors
from compare_nanogpt import CompareConfig
from configurator import PositiveInt, configure
from sides import DATASET, ROOT, alternate, open_sides, run


@dataclass(frozen=True)
class RaceConfig:
    peer: str = ""  # checkout of nanoGPT
    recipe: str = "config/train_shakespeare_char_fast.py"  # arguments of our train.py
    data_dir: str = ""  # folder of the data set, instead of data/shakespeare_char
    rounds: PositiveInt = 3  # each side runs once in a round
    json: str = ""  # new file for the figures


def measure(config, side, data_dir, seeds):
    """Train one side. Returns a dict: seconds, loss of its checkpoint, and for ours the (seconds,
    loss) of each evaluation."""
    out = side.folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    if side.is_brisk:
        given = [*shlex.split(config.recipe), f"--seed={next(seeds)}", f"--data_dir={data_dir}"]
    else:
        given = shlex.split(CompareConfig.train_args)
    seconds, _ = run([side.root / "train.py", *given, f"--out_dir={out}"], side)
    command = [ROOT / "evaluate.py", f"--out_dir={out}", f"--data_dir={data_dir}", "--json"]
    _, printed = run(command, side)  # in its folder, where nanoGPT's data set has its meta.pkl
    figures = {"seconds": seconds, "loss": json.loads(printed)["loss"]}
    if side.is_brisk:
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        around = seconds - records[-1]["seconds"]  # time outside of the log
        evaluations = [r for r in records if "val_loss" in r]
        figures["curve"] = [(around + r["seconds"], r["val_loss"]) for r in evaluations]
    return figures


def main(config):
    if config.json and Path(config.json).exists():
        raise UserError(f"--json={config.json} exists; name a new file")
    with TemporaryDirectory() as temporary:
        sides = open_sides(config, Path(temporary))
        data_dir = find_data_dir(config.data_dir, DATASET).resolve()
        theirs = sides["nanogpt"].folder / "data" / DATASET
        for name in ("train.bin", "val.bin", "meta.pkl"):
            shutil.copy(data_dir / name, theirs)
        seeds = iter(range(1, config.rounds + 1))
        runs = alternate(config, sides, lambda side: measure(config, side, data_dir, seeds))
    target = mean(figures["loss"] for figures in runs["nanogpt"])
    for figures in runs["brisk"]:
        reached = [
            seconds for seconds, loss in figures["curve"] if loss is not None and loss <= target
        ]
        figures["reached"] = reached[0] if reached else float("inf")
    for name, rounds in runs.items():
        losses = [figures["loss"] for figures in rounds]
        spread = f" (spread {stdev(losses):.4f})" if len(losses) > 1 else ""
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"{name:<9}loss on all of val.bin {mean(losses):.4f}{spread}: {each}")
    pairs = list(zip(runs["brisk"], runs["nanogpt"], strict=True))
    for label, key in (("whole process", "seconds"), (f"time to {target:.3f}", "reached")):
        shares = [ours[key] / theirs["seconds"] for ours, theirs in pairs]
        spread = f"{min(shares):.3f} to {max(shares):.3f}"
        print(f"{label:<20}{median(shares):.3f} ({spread}) of nanoGPT's time")
    if config.json:
        Path(config.json).write_text(json.dumps(runs, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(RaceConfig, sys.argv[1:]))
