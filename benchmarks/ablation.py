"""Ablation of a recipe: the loss with each of its parts removed.

    $ python data/shakespeare_char/prepare.py
    $ python benchmarks/ablation.py
    $ python benchmarks/ablation.py --only=rotary,muon --seeds=1 --more="--max_iters=300"

Each line is the recipe with one change, trained with several seeds for the same number of steps on
the first 95 % of the training text and evaluated on the rest. val.bin is not used. The last column
is the time of a step relative to the recipe's, as a part may cost more than it gains.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.data.loader import find_data_dir
from brisk.errors import UserError, did_you_mean, one_line_errors
from configurator import PositiveInt, configure
from trials import summary, trial, write_tuning_set

# {part: the keys that remove it}
WITHOUT = {
    "muon": "--optimizer=adamw --learning_rate=3e-3 --min_lr=3e-4",
    "rotary": "--position=learned",
    "qk_norm": "--qk_norm=False",
    "swiglu": "--mlp=gelu --mlp_width=0",
    "relu2": "--mlp=gelu",
    "rms": "--norm=layer",
    "zero_init": "--zero_init=False",
    "untied": "--tied=True",
    "ngrams": "--ngrams=1",
    "ngram_dropout": "--ngram_dropout=0",
    "wsd": "--schedule=cosine",
    "decay": "--weight_decay=0",
}


@dataclass(frozen=True)
class AblationConfig:
    config: str = "config/train_shakespeare_char_fast.py"  # config file of the recipe
    dataset: str = "shakespeare_char"  # data set in data/
    data_dir: str = ""  # folder of the data set, instead of data/<dataset>
    only: str = ""  # parts to remove, separated by commas; if empty, all parts of the recipe
    more: str = ""  # further keys of train.py for every run
    seeds: PositiveInt = 3  # runs for each line
    json: str = ""  # new file for the figures


def parts_of(config_file, only):
    """The parts to remove: those in `only`, else those that the config file of the recipe sets."""
    if only:
        for name in (names := only.split(",")):
            if name not in WITHOUT:
                raise UserError(f"--only={name}: no such part{did_you_mean(name, WITHOUT)}")
        return names
    text = Path(config_file).read_text(encoding="utf-8")
    marks = {name: change.split("=")[0].strip("-") for name, change in WITHOUT.items()}
    special = {"rotary": '"rotary"', "swiglu": '"swiglu"', "relu2": '"relu2"', "rms": '"rms"'}
    special |= {"muon": '"muon"', "wsd": '"wsd"'}
    return [name for name in WITHOUT if special.get(name, f"{marks[name]} =") in text]


def main(config):
    if config.json and Path(config.json).exists():
        raise UserError(f"--json={config.json} exists; name a new file")
    if not Path(config.config).exists():
        raise UserError(f"--config={config.config}: no such file")
    lines = {"the recipe": ""}
    lines |= {f"without {n}": WITHOUT[n] for n in parts_of(config.config, config.only)}
    results = {}
    with TemporaryDirectory() as folder:
        write_tuning_set(find_data_dir(config.data_dir, config.dataset), folder)
        print(f"{'':<20}{'loss':>8}{'spread':>9}{'increase':>10}{'step':>8}")
        for name, change in lines.items():
            argv = [config.config, *shlex.split(config.more), *shlex.split(change)]
            seeds = range(1, config.seeds + 1)
            results[name] = of = summary([trial(folder, [*argv, f"--seed={s}"]) for s in seeds])
            recipe = results["the recipe"]
            increase, slower = of["mean"] - recipe["mean"], of["step_ms"] / recipe["step_ms"]
            figures = f"{of['mean']:8.4f}{of['spread']:9.4f}{increase:+10.4f}{slower:7.2f}x"
            print(f"{name:<20}{figures}   {change}", flush=True)
    if config.json:
        Path(config.json).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(AblationConfig, sys.argv[1:]))
