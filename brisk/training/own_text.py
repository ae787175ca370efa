"""Defaults for training on your own text: data set, network and recipe, chosen by rules."""

import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from brisk.data.dataset import read_meta
from brisk.data.prepare import first_name, prepare
from brisk.errors import UserError

# The network by the size of the training text, on a CPU and on an accelerator. Rows are
# (maximum number of tokens, n_layer, n_head, n_embd, block_size, dropout).
CPU_SIZES = (
    (100_000, 2, 2, 64, 64, 0.2),
    (1_000_000, 3, 3, 96, 128, 0.1),
    (10_000_000, 4, 4, 128, 128, 0.0),
    (float("inf"), 6, 6, 192, 256, 0.0),
)
GPU_SIZES = (
    (100_000, 4, 4, 128, 128, 0.2),
    (1_000_000, 6, 6, 384, 256, 0.2),
    (10_000_000, 6, 8, 512, 256, 0.1),
    (100_000_000, 8, 8, 512, 512, 0.0),
    (float("inf"), 12, 12, 768, 1024, 0.0),
)
# A small Qwen3, trained with Muon; config/train_python_source.py states the measured gain.
RECIPE = {
    "position": "rotary",
    "norm": "rms",
    "qk_norm": True,
    "mlp": "swiglu",
    "tied": False,
    "zero_init": True,
    "optimizer": "muon",
    "muon_learning_rate": 0.01,
    "muon_momentum": 0.9,
    "learning_rate": 3e-3,
    "beta2": 0.99,
    "weight_decay": 0.1,
    "schedule": "wsd",
    "decay_frac": 0.4,
    "min_lr": 0.0,
}
FINETUNING = {"learning_rate": 3e-5, "min_lr": 3e-6, "beta2": 0.99, "dropout": 0.1}
LENGTH = ("minutes", "max_iters", "max_epochs")  # alternative keys for the length of a run
MINUTES, PATIENCE = 5.0, 5
SAMPLE_TOKENS = 300


def with_out_dir(given):
    """`given` with a default `out_dir` for a run on `given.input`."""
    if "input" in given.given and not given.input:
        raise UserError("--input= is empty; name a file or a folder")
    if not given.input or "out_dir" in given.given:
        return given
    return replace(given, out_dir=f"out-{first_name(given.input)}")


def settings(given, start, run):
    """Settings, {key: value}, for the keys of a run on `given.input` that were not given: the data
    set, which rank 0 prepares if necessary, and, unless a run is resumed, network and recipe.

    Raises `UserError` if the text cannot be used.
    """
    from_gpt2 = start.checkpoint and not start.saved
    choices = {"tokenizer": "gpt2"} if from_gpt2 else {}
    values = run.ranks.run_on_main(
        lambda: {"data_dir": str(prepare(given.input, given.data_dir, **choices))}
    )
    if not start.saved:
        meta = read_meta(Path(values["data_dir"]))
        tokens = meta["splits"]["train"]["tokens"]
        shortest = min(split["tokens"] for split in meta["splits"].values())
        values |= choose_settings(tokens, shortest, run.device.type, from_gpt2)
        if {*LENGTH} & {*given.given}:
            del values["minutes"]
    return {key: value for key, value in values.items() if key not in given.given}


def choose_settings(tokens, shortest, device_type, pretrained=False):
    """Choose network and recipe by the size of a text.

    Args:
        tokens: size of the training text in tokens.
        shortest: tokens in the shorter split, which must hold a window.
        pretrained: finetune an existing network.
    """
    sizes = CPU_SIZES if device_type == "cpu" else GPU_SIZES
    row = next(row for row in sizes if tokens <= row[0])
    _, n_layer, n_head, n_embd, block_size, dropout = row
    while block_size >= shortest and block_size > 1:
        block_size //= 2
    values = {"block_size": block_size, "batch_size": 16, "gradient_accumulation_steps": 1}
    if pretrained:
        values |= {**FINETUNING, "batch_size": 4}
    else:
        values |= {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "dropout": dropout}
        values |= RECIPE
    return values | {"minutes": MINUTES, "patience": PATIENCE, "always_save_checkpoint": False}


def command(config):
    """A line with the command that sets every key of a run on `config.input` explicitly."""
    if not config.input:
        return []
    others = ("input", "minutes", "dry_run", "out_dir")
    keys = ["out_dir", *(key for key in config.given if key not in others)]
    arguments = [f"--{key}={getattr(config, key)}" for key in keys]
    return [f"with every setting explicit: {shlex.join(['python', 'train.py', *arguments])}"]


def show_sample(config, run, script):
    """After a run with `--input`, sample a text from its best model. `script` is the path of
    sample.py."""
    if not (config.input and run.ranks.is_main):
        return
    arguments = [f"--out_dir={config.out_dir}", "--num_samples=1", f"--device={config.device}"]
    subprocess.run([sys.executable, script, *arguments, f"--max_new_tokens={SAMPLE_TOKENS}"])
