"""This repository and nanoGPT side by side: every claim of speed, in one table.

    $ python benchmarks/compare_nanogpt.py --peer=path/to/nanoGPT --json=result.json
    $ python benchmarks/compare_nanogpt.py --peer=path/to/nanoGPT --sections=step --sizes=gpt2
    $ python benchmarks/compare_nanogpt.py --peer=path/to/nanoGPT --sections=train \\
          --train_more=--max_iters=100 --rounds=1

Each side does the same work in a fresh process, in alternation, `rounds` times; who begins changes
with every round. nanoGPT runs as it is, in a temporary copy of the checkout. The sections:

    train   train.py as a whole process: nanoGPT's small run on a CPU, or `train_args`. Also the
            median time of a step that it prints, and the validation loss that it prints at the last
            step where both evaluate, which may differ by 0.02: each side draws its own windows, to
            train and to evaluate on (--train_more=--eval_iters=200 takes more of the latter).
    step    a training step: the mean of many, from the same weights on the same batches of random
            ids, without evaluations and without writing the numbers down. The loss of the last step
            must be the same to 0.001 (0.02 below float32) where there is no dropout.
    sample  sample.py as a whole process; and `model.generate` alone, in a process that has loaded
            the model and drawn a few tokens before the clock starts. Random weights; ours draws all
            samples side by side. Where a sample is longer than block_size, also with exact_window.
    data    data/shakespeare_char/prepare.py as a whole process; and without the start of Python and
            without imports: every module that the script loads on its way is imported before the
            clock starts, then the script runs from its first line to its last: reading, encoding,
            writing, and printing its counts. Both must write the same files.
    start   from after `import torch` to the line that train.py prints for its first step, with a
            batch of one sequence and one evaluation of one batch before it. On a GPU first with an
            empty cache of compiled code, then with the one that this left behind.
    memory  the peak of a process that trains two steps: its resident set, or the GPU's memory.

A ratio is nanoGPT's figure by ours, so above 1 ours is the smaller: the median of the rounds, with
the lowest and the highest. The spread of a side is its highest figure less its lowest, as a share
of its median.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.device import open_device
from brisk.errors import UserError, did_you_mean, one_line_errors
from configurator import NonNegativeInt, PositiveInt, configure
from ratios import HEAD, as_lines, check, row, summary
from sides import (
    DATASET,
    alternate,
    describe_as_bytes,
    fresh,
    lay_out_text,
    open_sides,
    prepare_command,
    prepared_files,
    run,
    save_random_model,
    window_starts,
    work,
    write_random_ids,
)

SMALL_RUN = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 "
    "--log_interval=1 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 "
    "--max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)  # from nanoGPT's README
SECTIONS = ("train", "step", "sample", "data", "start", "memory")
PADDED = 50304  # rows of GPT-2's vocabulary where train.py makes the model


@dataclass
class Size:
    """A model, and how long it is timed: steps on a CPU, and samples (0: it is not sampled)."""

    batch_size: int
    block_size: int
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    dropout: float
    log_interval: int
    warm_up: int
    steps: int
    samples: int
    tokens: int = 500  # of each sample

    def model_args(self):
        keys = ("block_size", "n_layer", "n_head", "n_embd", "vocab_size", "dropout")
        return {**{key: getattr(self, key) for key in keys}, "bias": False}


SIZES = {
    "small": Size(12, 64, 4, 4, 128, 65, 0.0, 1, 20, 200, 10),
    "shakespeare_char": Size(64, 256, 6, 6, 384, 65, 0.2, 10, 1, 4, 0),
    "gpt2": Size(4, 1024, 12, 12, 768, PADDED, 0.0, 1, 1, 2, 1, 200),
}


@dataclass(frozen=True)
class CompareConfig:
    peer: str = ""  # a checkout of nanoGPT
    sections: str = ""  # some of train,step,sample,data,start,memory; empty: all that can run
    sizes: str = "small,shakespeare_char,gpt2"  # of the models in step, sample, start and memory
    rounds: PositiveInt = 3  # each side runs once in each
    train_args: str = SMALL_RUN  # the command line of both train.py in train
    train_more: str = ""  # further arguments after those, such as --max_iters=100
    input: str = ""  # text for train and data; empty: tinyshakespeare.txt under BRISK_DATA
    batch_size: NonNegativeInt = 0  # sequences in a step of step and memory; 0: the size's own
    steps: NonNegativeInt = 0  # timed steps of step; 0: the size's own on a CPU, 50 on a GPU
    samples: NonNegativeInt = 0  # samples to draw; 0: the size's own
    tokens: NonNegativeInt = 0  # tokens of each; 0: the size's own
    device: str = "auto"  # of step, sample, start and memory
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # ours in step and memory
    json: str = ""  # write the result to this new file too


def compare_train(config, sides):
    argv = shlex.split(config.train_args) + shlex.split(config.train_more)
    for side in sides.values():
        run(prepare_command(side), side)

    def measure(side):
        with fresh(side) as copy:
            seconds, console = run([copy.root / "train.py", *argv], copy)
        steps = re.findall(r"^iter \d+: .*time ([\d.]+)ms", console, re.MULTILINE)
        losses = re.findall(r"^step (\d+): .*val loss ([\d.]+|nan)", console, re.MULTILINE)
        if not steps or not losses:
            raise UserError(f"{side.name}'s train.py printed no step or no validation loss")
        val_losses = {int(number): float(loss) for number, loss in losses}
        return {"s": seconds, "step": median(map(float, steps)) / 1000, "val_losses": val_losses}

    runs = alternate(config, sides, measure)
    whole = row("train", "train.py, whole process", runs, "s")
    ours, theirs = (runs[name][-1]["val_losses"] for name in ("brisk", "nanogpt"))
    if (last := max(ours.keys() & theirs.keys(), default=0)) > 0:  # before, both are untrained
        whole["check"] = check(f"validation loss at step {last}", ours[last], theirs[last], 0.02)
    return [whole, row("train", "a step, as it prints it", runs, "step")]


def train_steps(config, sides, size, device, warm_up, steps):
    """Name → the figures of each round of `step` in one_side.py, for a model of this `Size`."""
    batch_size = config.batch_size or size.batch_size
    job = {"job": "step", "model_args": size.model_args(), "batch_size": batch_size}
    job |= {"warm_up": warm_up, "steps": steps, "log_interval": size.log_interval}
    job |= {"device": str(device.device), "dtype": config.dtype}
    with TemporaryDirectory() as folder:
        job |= {"weights": f"{folder}/weights.pt", "tokens": f"{folder}/train.bin"}
        save_random_model(size.model_args(), job["weights"])
        write_random_ids(folder, size.vocab_size)
        if size.vocab_size == PADDED:
            describe_as_bytes(folder)
        job["starts"] = window_starts(folder, size.block_size, batch_size, warm_up + steps + 1)
        return alternate(config, sides, lambda side: work(side, job))


def compare_step(config, sides, name, device):
    size = SIZES[name]
    warm_up, steps = (10, 50) if device.type == "cuda" else (size.warm_up, size.steps)
    runs = train_steps(config, sides, size, device, warm_up, config.steps or steps)
    batch_size = config.batch_size or size.batch_size
    what, tokens = f"{name}, {batch_size}x{size.block_size}", batch_size * size.block_size
    found = row("step", what, runs, "seconds", tokens=tokens)
    ours, theirs = (runs[side][-1] for side in ("brisk", "nanogpt"))
    found["precision"] = {"brisk": ours["precision"], "nanogpt": theirs["precision"]}
    if not size.dropout:
        limit = 1e-3 if set(found["precision"].values()) == {"float32"} else 0.02
        found["check"] = check("loss of the last step", ours["loss"], theirs["loss"], limit)
    return [found]


def compare_memory(config, sides, name, device):
    size = SIZES[name]
    runs = train_steps(config, sides, size, device, warm_up=0, steps=2)
    if not all(figures["bytes"] for side in runs.values() for figures in side):
        print("memory: this system does not tell the peak of a process", file=sys.stderr)
        return []
    what = f"{name}, {config.batch_size or size.batch_size}x{size.block_size}"
    return [row("memory", what, runs, "bytes", "bytes")]


def compare_sample(config, sides, name, device):
    size = SIZES[name]
    samples, tokens = config.samples or size.samples, config.tokens or size.tokens
    if not samples:
        return []
    model_args = {**size.model_args(), "dropout": 0.0}
    if size.vocab_size == PADDED:
        model_args["vocab_size"] = 50257  # OpenAI's: nanoGPT cannot decode the ids beyond
    for side in sides.values():
        (side.folder / "out").mkdir(exist_ok=True)
        save_random_model(model_args, side.folder / "out" / "ckpt.pt")
        write_random_ids(side.folder / "data" / "random", size.vocab_size)
    argv = [f"--num_samples={samples}", f"--max_new_tokens={tokens}", "--start=A", "--out_dir=out"]
    argv += [f"--device={device.device}"]
    with TemporaryDirectory() as folder:
        job = {"job": "generate", "model_args": model_args, "device": str(device.device)}
        job |= {"samples": samples, "tokens": tokens, "weights": f"{folder}/weights.pt"}
        save_random_model(model_args, job["weights"])

        def measure(side):
            figures = {"whole": run([side.root / "sample.py", *argv], side)[0]}
            figures["alone"] = work(side, {**job, "exact_window": False})["seconds"]
            figures["exact"] = figures["alone"]  # nanoGPT's is exact in any case
            if side.is_brisk and tokens >= size.block_size:
                figures["exact"] = work(side, {**job, "exact_window": True})["seconds"]
            return figures

        runs = alternate(config, sides, measure)
    for side in sides.values():
        shutil.rmtree(side.folder / "out")
    kinds = {"whole": "sample.py, whole process", "alone": "generate alone"}
    kinds |= {"exact": "alone, exact_window"} if tokens >= size.block_size else {}
    what = f"{name}, {samples}x{tokens}, "
    return [row("sample", what + kinds[key], runs, key, tokens=samples * tokens) for key in kinds]


def compare_data(config, sides):
    modules, files = {}, {}

    def measure(side):
        with fresh(side) as copy:
            command = prepare_command(copy)
            whole, _ = run(command, copy)
            files[side.name] = prepared_files(copy.folder / "data" / DATASET)
            script, *argv = map(str, command)
            job = {"job": "prepare", "script": script, "argv": argv}
            if side.name not in modules:
                modules[side.name] = work(copy, {**job, "modules": []})["modules"]
            for name in ("train.bin", "val.bin", "meta.pkl", "meta.json"):
                (copy.folder / "data" / DATASET / name).unlink(missing_ok=True)
            alone = work(copy, {**job, "modules": modules[side.name]})["seconds"]
            return {"whole": whole, "alone": alone}

    runs = alternate(config, sides, measure)
    tokens = sum(len(files["brisk"][name]) for name in ("train.bin", "val.bin")) // 2
    rows = [row("data", "prepare.py, whole process", runs, "whole", tokens=tokens)]
    rows.append(row("data", "without start and imports", runs, "alone", tokens=tokens))
    differ = sum(files["brisk"][name] != files["nanogpt"][name] for name in files["brisk"])
    rows[0]["check"] = check("files that differ", differ, 0, 0)
    return rows


def compare_start(config, sides, name, device):
    size, on_gpu = SIZES[name], device.type == "cuda"
    shape = {key: value for key, value in size.model_args().items() if key != "vocab_size"}
    keys = {**shape, "dataset": "random", "batch_size": 1, "gradient_accumulation_steps": 1}
    keys |= {"eval_iters": 1, "max_iters": 1, "device": str(device.device), "compile": on_gpu}
    job = {"job": "start", "argv": [f"--{key}={value}" for key, value in keys.items()]}
    for side in sides.values():
        write_random_ids(side.folder / "data" / "random", size.vocab_size)

    def measure(side):
        with fresh(side) as copy:
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(copy.folder / "compiled")}
            times = [
                work(copy, {**job, "script": str(copy.root / "train.py")}, cache)["seconds"]
                for _ in range(2 if on_gpu else 1)
            ]
        return {"first": times[0], "again": times[-1]}

    runs = alternate(config, sides, measure)
    if not on_gpu:
        return [row("start", f"{name}, to the first step", runs, "first")]
    caches = {"first": "cold", "again": "warm"}
    return [row("start", f"{name}, {caches[key]} cache", runs, key) for key in caches]


def circumstances(config, device):
    """Where and how the figures were taken."""
    git = ["git", "-C", config.peer, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True) if shutil.which("git") else None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "command": shlex.join(["python", "benchmarks/compare_nanogpt.py", *sys.argv[1:]]),
        "device": str(device),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "versions": {**versions, "numpy": np.__version__},
        "nanogpt": commit.stdout.strip() if commit else "",
        "rounds": config.rounds,
    }


def chosen(text, known, key):
    """The words of a comma-separated setting, each one of `known`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"; it takes some of {','.join(known)}"
            raise UserError(f"--{key}: there is no {name}{hint}")
    return names


OF_A_TEXT = {"train": compare_train, "data": compare_data}
OF_A_SIZE = {"step": compare_step, "sample": compare_sample, "start": compare_start}
OF_A_SIZE |= {"memory": compare_memory}


def open_result(path):
    """A new file for the result, opened before hours are spent on it; the void where `path` is
    empty."""
    try:
        return open(path or os.devnull, "x" if path else "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --json={path}: {error.strerror}") from error


def compare(config, sides, sections, sizes, device):
    """The rows of the sections, as they are measured."""
    for section in sections:
        if section in OF_A_TEXT:
            yield from OF_A_TEXT[section](config, sides)
            continue
        for name in sizes:
            yield from OF_A_SIZE[section](config, sides, name, device)


def main(config):
    sections = chosen(config.sections, SECTIONS, "sections")
    sizes = chosen(config.sizes, SIZES, "sizes")
    device = open_device(config.device)
    rows = []
    with TemporaryDirectory() as temporary:
        sides = open_sides(config, Path(temporary))
        try:
            lay_out_text(config, sides)
        except UserError as error:
            if OF_A_TEXT.keys() & set(sections):
                raise
            sections = sections or list(OF_A_SIZE)
            print(f"{' and '.join(OF_A_TEXT)} are left out: {error}", file=sys.stderr)
        with open_result(config.json) as file:
            about = circumstances(config, device)
            print(f"{device}; PyTorch {torch.__version__}; nanoGPT {about['nanogpt']}\n{HEAD}")
            for found in compare(config, sides, sections or SECTIONS, sizes, device):
                rows.append({**found, "summary": summary(found)})
                print(as_lines(rows[-1]), flush=True)
            file.write(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(CompareConfig, sys.argv[1:]))
