"""Measure the range of learning rates at which a recipe trains well.

    $ python data/shakespeare_char/prepare.py
    $ python benchmarks/stability.py
    $ python benchmarks/stability.py --only="classic,query/key norms" --seeds=1 --rates=5
    $ python benchmarks/stability.py --table --results=benchmarks/stability.json  # our results

Each recipe is trained at the rates of a grid with factors of 2, once for each seed, on the first
95 % of the training text, and evaluated on the rest. val.bin is not used. The range of a recipe is
the ratio of the largest to the smallest rate that reaches its best loss within `tolerance`.
Instabilities of large models at usual rates appear in small models at large rates (Wortsman et al.
2023, Small-scale proxies for large-scale Transformer training instabilities), so a wide range means
a safe distance from them.

All losses are saved in `results` and not computed again: the same command continues an interrupted
study, and more recipes, rates or seeds extend it.
"""

import io
import json
import math
import os
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import geometric_mean, mean
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import evaluate
import train
from brisk.data.dataset import read_meta
from brisk.data.loader import find_data_dir
from brisk.errors import RunError, UserError, did_you_mean, one_line_errors
from configurator import NonNegativeFloat, NonNegativeInt, PositiveInt, configure
from trials import ROOT, write_tuning_set

# A small model, trained until it is better than a bigram model (2.48 nats): only then does its
# loss depend on attention.
SIZE = "--n_layer=2 --n_head=2 --n_embd=64 --block_size=32 --batch_size=8 "
SIZE += "--gradient_accumulation_steps=1 --device=cpu --dtype=float32 --compile=False"
MODERN = "config/model/modern.py"
RECIPES = {  # keys and config files, applied to the defaults (nanoGPT's GPT-2)
    "classic": "",
    "query/key norms": "--qk_norm=True",
    "modern with Muon": f"{MODERN} --optimizer=muon",
    "modern with AdamW": MODERN,
    "beta2 0.99": "--beta2=0.99",
    "no clipping": "--grad_clip=0",
    "no warm-up": "--warmup_iters=0",
    "warm-up five times as long": "--warmup_iters=200",
}
MUON_RATIO = 0.02 / 3e-3  # Muon's rate / AdamW's rate, as in config/train_gpt2_modern.py


@dataclass(frozen=True)
class StabilityConfig:
    only: str = ""  # recipes, separated by commas; if empty, all
    dataset: str = "shakespeare_char"  # data set in data/
    data_dir: str = ""  # folder of the data set, instead of data/<dataset>
    smallest: NonNegativeFloat = 2.0**-10  # smallest learning rate
    rates: PositiveInt = 8  # number of learning rates, each twice the previous one
    seeds: PositiveInt = 3  # runs at each rate
    steps: PositiveInt = 800  # steps of a run
    warmup: NonNegativeInt = 40  # warm-up steps, unless the recipe sets them
    tolerance: NonNegativeFloat = 0.05  # a loss is good up to (1 + tolerance) * the best loss
    more: str = ""  # further keys of train.py for every run
    results: str = "stability.json"  # file of the losses; the table is written next to it, as .md
    table: bool = False  # only print the table of existing results


def selected(only):
    """{name: keys} of the recipes named in `only`, or all."""
    names = only.split(",") if only else list(RECIPES)
    for name in names:
        if name not in RECIPES:
            raise UserError(f"--only={name}: no such recipe{did_you_mean(name, RECIPES)}")
    return {name: RECIPES[name] for name in names}


def keys_of(config, recipe):
    """The arguments of a recipe's runs except rate and seed; also their name in the results."""
    length = f"--max_iters={config.steps - 1} --lr_decay_iters={config.steps}"
    return " ".join(
        f"{SIZE} {length} --warmup_iters={config.warmup} {recipe} {config.more}".split()
    )


def loss_of_run(folder, keys, rate, seed):
    """Train, and return the loss on all of the held-out text; infinity if it is not finite.

    Runs in this process, as starting another takes longer than training such a small model.
    """
    argv = [f"--learning_rate={rate}", f"--min_lr={rate / 10}", f"--seed={seed}"]
    argv += [f"--muon_learning_rate={rate * MUON_RATIO}", "--on_spike=stop", "--log_interval=50"]
    argv += ["--eval_interval=1000000", "--eval_iters=1", "--always_save_checkpoint=True"]
    argv += [str(ROOT / key) if key.endswith(".py") else key for key in shlex.split(keys)]
    with TemporaryDirectory() as out, redirect_stderr(io.StringIO()):
        places = [f"--data_dir={folder}", f"--out_dir={out}"]
        with redirect_stdout(io.StringIO()):
            try:
                train.main(configure(train.TrainConfig, [*argv, *places]))
            except RunError:  # a non-finite loss
                return math.inf
        with redirect_stdout(io.StringIO()) as printed:
            argv = [*places, "--json", "--batch_size=64", "--device=cpu", "--dtype=float32"]
            evaluate.main(configure(evaluate.EvaluateConfig, argv))
    loss = json.loads(printed.getvalue())["loss"]
    return loss if math.isfinite(loss) else math.inf


def unigram_loss(folder):
    """The loss of a unigram model on the validation split, in nats."""
    dtype = np.dtype(read_meta(folder)["dtype"])
    train_ids, val_ids = (np.fromfile(Path(folder, f"{s}.bin"), dtype) for s in ("train", "val"))
    size = max(train_ids.max(), val_ids.max()) + 1
    frequencies = np.bincount(train_ids, minlength=size) + 1
    return float(-np.log(frequencies / frequencies.sum())[val_ids].mean())


def load_results(path):
    """{(keys, rate, seed): loss} of the finished runs."""
    if not Path(path).exists():
        return {}
    records = json.loads(Path(path).read_text(encoding="utf-8"))
    return {(r["keys"], r["rate"], r["seed"]): r["loss"] for r in records}


def save_results(path, done):
    """Write the results atomically, as a study may be interrupted at any time."""
    records = [
        {"keys": keys, "rate": rate, "seed": seed, "loss": loss}
        for (keys, rate, seed), loss in done.items()
    ]
    lines = ",\n".join(json.dumps(record) for record in records)
    Path(f"{path}.new").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(f"{path}.new", path)


def good_range(losses, tolerance):
    """Return the smallest and the largest rate of the contiguous range around the best one with
    losses within `tolerance` of the best. `losses` is {rate: loss}."""
    rates = sorted(losses)
    best = low = high = min(range(len(rates)), key=lambda i: losses[rates[i]])
    limit = losses[rates[best]] * (1 + tolerance)
    while low > 0 and losses[rates[low - 1]] <= limit:
        low -= 1
    while high < len(rates) - 1 and losses[rates[high + 1]] <= limit:
        high += 1
    return rates[low], rates[high]


def row(by_seed, tolerance, worst):
    """Compute the figures of a recipe from {seed: {rate: loss}}.

    Best loss, its rate and the range are means over the seeds. A run is lost if its loss is at
    least `worst`. The sensitivity is the mean over all runs of min(loss, worst) - best loss
    (Wortsman et al., learning-rate sensitivity).
    """
    ranges = [good_range(losses, tolerance) for losses in by_seed.values()]
    excess = [
        min(loss, worst) - min(losses.values())
        for losses in by_seed.values()
        for loss in losses.values()
    ]
    every = [loss for losses in by_seed.values() for loss in losses.values()]
    return {
        "best": mean(min(losses.values()) for losses in by_seed.values()),
        "at": geometric_mean(min(losses, key=losses.get) for losses in by_seed.values()),
        "from": geometric_mean(low for low, _ in ranges),
        "to": geometric_mean(high for _, high in ranges),
        "ranges": [high / low for low, high in ranges],
        # the range may continue beyond the grid
        "open": any(
            low == min(losses) or high == max(losses)
            for (low, high), losses in zip(ranges, by_seed.values(), strict=True)
        ),
        "sensitivity": mean(excess),
        "lost": sum(not loss < worst for loss in every),
        "runs": len(every),
    }


def table(rows):
    """Format the rows as Markdown. A range with ≥ reaches an end of the grid."""
    lines = [
        "| | best loss | at | trains from | to | range | each seed | sensitivity | lost |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, of in rows.items():
        mark = "≥ " if of["open"] else ""
        each = ", ".join(f"{ratio:.0f}" for ratio in of["ranges"])
        rates = " | ".join(f"{of[key]:.2g}" for key in ("at", "from", "to"))
        lines.append(
            f"| {name} | {of['best']:.3f} | {rates} | {mark}{geometric_mean(of['ranges']):.3g} "
            f"| {each} | {of['sensitivity']:.3f} | {of['lost']} of {of['runs']} |"
        )
    return "\n".join(lines)


def main(config):
    recipes = {name: keys_of(config, keys) for name, keys in selected(config.only).items()}
    grid = [config.smallest * 2**k for k in range(config.rates)]
    done = load_results(config.results)
    with TemporaryDirectory() as folder:
        with redirect_stdout(io.StringIO()):
            write_tuning_set(find_data_dir(config.data_dir, config.dataset), folder)
        worst = unigram_loss(folder)
        # all recipes with one seed before the next seed
        runs = [
            (name, keys, rate, seed)
            for seed in range(1, config.seeds + 1)
            for name, keys in recipes.items()
            for rate in grid
            if (keys, rate, seed) not in done
        ]
        for name, keys, rate, seed in () if config.table else runs:
            done[keys, rate, seed] = loss = loss_of_run(folder, keys, rate, seed)
            print(f"{name}, seed {seed}, {rate:.3g}: {loss:.4f}", flush=True)
            save_results(config.results, done)
    rows = {}
    for name, keys in recipes.items():
        by_seed = {}
        for seed in range(1, config.seeds + 1):
            losses = {rate: done[keys, rate, seed] for rate in grid if (keys, rate, seed) in done}
            if len(losses) == len(grid):
                by_seed[seed] = losses
        if by_seed:
            rows[name] = row(by_seed, config.tolerance, worst)
    lines = table(rows)
    print(f"loss of a unigram model: {worst:.3f} nats\n{lines}")
    if not config.table:
        Path(config.results).with_suffix(".md").write_text(f"{lines}\n", encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(StabilityConfig, sys.argv[1:]))
