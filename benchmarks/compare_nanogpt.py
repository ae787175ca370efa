"""Compare the speed of this repository and nanoGPT.

    $ python benchmarks/compare_nanogpt.py --peer=path/to/nanoGPT --json=result.json
    $ python benchmarks/compare_nanogpt.py --peer=path/to/nanoGPT --sections=step --sizes=gpt2
    $ python benchmarks/compare_nanogpt.py --peer=path/to/nanoGPT --sections=train \\
          --train_more=--max_iters=100 --rounds=1

Both sides do the same work in fresh processes, alternating for `rounds` rounds; each round swaps
which side is first. nanoGPT runs unmodified, in a temporary copy. The sections:

    train   train.py as a whole process: nanoGPT's small CPU run, or `train_args`. Also the median
            step time that it prints, and the last validation loss that both print. The losses may
            differ by 0.02, as each side samples its own windows for training and evaluation
            (--train_more=--eval_iters=200 evaluates on more).
    step    a training step, the mean of many: same weights, same batches of random ids, without
            evaluation or logging. Without dropout, the last losses must agree to 0.001 (0.02 below
            float32).
    sample  sample.py as a whole process; and `model.generate` alone, after loading the model and a
            warm-up. Random weights; ours generates all samples as one batch. If samples are longer
            than block_size, also with exact_window.
    data    data/shakespeare_char/prepare.py as a whole process; and without the start of Python and
            imports, which are done before the timing starts. Both must write the same files.
    start   from after `import torch` to the line of the first step in train.py, with batch size 1
            and one evaluation batch. On a GPU with a cold, then a warm compilation cache.
    memory  the peak of a process that trains two steps: resident memory, or GPU memory.

A ratio is nanoGPT's figure divided by ours, so above 1 ours is faster or smaller: the median of the
rounds, with the lowest and the highest. A side's spread is (highest - lowest) / median.
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
PADDED = 50304  # GPT-2's vocabulary as train.py pads it


@dataclass
class Size:
    """A model, and its numbers of steps on a CPU and of samples (0: not sampled)."""

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
    peer: str = ""  # checkout of nanoGPT
    sections: str = ""  # some of train,step,sample,data,start,memory; if empty, all that can run
    sizes: str = "small,shakespeare_char,gpt2"  # models for step, sample, start and memory
    rounds: PositiveInt = 3  # each side runs once in a round
    train_args: str = SMALL_RUN  # arguments of both train.py in section train
    train_more: str = ""  # further arguments, such as --max_iters=100
    input: str = ""  # text for train and data; if empty, tinyshakespeare.txt in $BRISK_DATA
    batch_size: NonNegativeInt = 0  # batch size of step and memory; 0: default of the model
    steps: NonNegativeInt = 0  # timed steps; 0: default of the model on a CPU, 50 on a GPU
    samples: NonNegativeInt = 0  # number of samples; 0: default of the model
    tokens: NonNegativeInt = 0  # tokens in each sample; 0: default of the model
    device: str = "auto"  # device for step, sample, start and memory
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # our precision in step and memory
    json: str = ""  # new file for the result


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
            raise UserError(f"{side.name}'s train.py did not print a step and a validation loss")
        val_losses = {int(number): float(loss) for number, loss in losses}
        return {"s": seconds, "step": median(map(float, steps)) / 1000, "val_losses": val_losses}

    runs = alternate(config, sides, measure)
    whole = row("train", "train.py, whole process", runs, "s")
    ours, theirs = (runs[name][-1]["val_losses"] for name in ("brisk", "nanogpt"))
    if (last := max(ours.keys() & theirs.keys(), default=0)) > 0:  # at step 0 both are untrained
        whole["check"] = check(f"validation loss at step {last}", ours[last], theirs[last], 0.02)
    return [whole, row("train", "a step, as printed", runs, "step")]


def train_steps(config, sides, size, device, warm_up, steps):
    """Return {side: figures of each round} of the job `step` in one_side.py."""
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
    label, tokens = f"{name}, {batch_size}x{size.block_size}", batch_size * size.block_size
    found = row("step", label, runs, "seconds", tokens=tokens)
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
        print("memory: this system does not report the peak of a process", file=sys.stderr)
        return []
    label = f"{name}, {config.batch_size or size.batch_size}x{size.block_size}"
    return [row("memory", label, runs, "bytes", "bytes")]


def compare_sample(config, sides, name, device):
    size = SIZES[name]
    samples, tokens = config.samples or size.samples, config.tokens or size.tokens
    if not samples:
        return []
    model_args = {**size.model_args(), "dropout": 0.0}
    if size.vocab_size == PADDED:
        model_args["vocab_size"] = 50257  # nanoGPT cannot decode the padding ids
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
            figures["exact"] = figures["alone"]  # nanoGPT is always exact
            if side.is_brisk and tokens >= size.block_size:
                figures["exact"] = work(side, {**job, "exact_window": True})["seconds"]
            return figures

        runs = alternate(config, sides, measure)
    for side in sides.values():
        shutil.rmtree(side.folder / "out")
    kinds = {"whole": "sample.py, whole process", "alone": "generate alone"}
    kinds |= {"exact": "alone, exact_window"} if tokens >= size.block_size else {}
    label = f"{name}, {samples}x{tokens}, "
    return [row("sample", label + kinds[key], runs, key, tokens=samples * tokens) for key in kinds]


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
    rows[0]["check"] = check("different files", differ, 0, 0)
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


def environment(config, device):
    """The command, hardware and versions of a measurement, as a dict."""
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
    """Split a comma-separated setting. Raises `UserError` for a name not in `known`."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            hint = did_you_mean(name, known) or f"; known: {','.join(known)}"
            raise UserError(f"--{key}: unknown name {name}{hint}")
    return names


TEXT_SECTIONS = {"train": compare_train, "data": compare_data}
SIZE_SECTIONS = {"step": compare_step, "sample": compare_sample, "start": compare_start}
SIZE_SECTIONS |= {"memory": compare_memory}


def open_result(path):
    """Open a new file for the result (os.devnull if `path` is empty), before the long work."""
    try:
        return open(path or os.devnull, "x" if path else "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write --json={path}: {error.strerror}") from error


def compare(config, sides, sections, sizes, device):
    """Measure the sections, yielding their rows."""
    for section in sections:
        if section in TEXT_SECTIONS:
            yield from TEXT_SECTIONS[section](config, sides)
            continue
        for name in sizes:
            yield from SIZE_SECTIONS[section](config, sides, name, device)


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
            if TEXT_SECTIONS.keys() & set(sections):
                raise
            sections = sections or list(SIZE_SECTIONS)
            print(f"skipped {' and '.join(TEXT_SECTIONS)}: {error}", file=sys.stderr)
        with open_result(config.json) as file:
            about = environment(config, device)
            print(f"{device}; PyTorch {torch.__version__}; nanoGPT {about['nanogpt']}\n{HEAD}")
            for found in compare(config, sides, sections or SECTIONS, sizes, device):
                rows.append({**found, "summary": summary(found)})
                print(as_lines(rows[-1]), flush=True)
            file.write(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(CompareConfig, sys.argv[1:]))
