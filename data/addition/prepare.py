"""Sums such as 12+34=46, each a document: a task on which a model is right or wrong.

    $ python data/addition/prepare.py --digits=2

A tenth of the problems is kept out of training: `val.bin` has each of them once. a+b and b+a are
on the same side, so that an answer from validation cannot be had by swapping the summands.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.dataset import write_dataset
from brisk.data.tokenizer import CharTokenizer
from brisk.errors import one_line_errors
from configurator import PositiveInt, configure


@dataclass(frozen=True)
class PrepareConfig:
    digits: Annotated[int, (1, 9)] = 2  # of the longest summands; they start at 0
    max_problems: PositiveInt = 100_000  # where there are more, this many are drawn from them
    passes: PositiveInt = 10  # how often training goes through its problems, shuffled anew
    seed: int = 1337  # of the drawing, the split and the shuffles
    data_dir: str = ""  # where to write; beside this script if empty


def draw_problems(digits, max_problems, rng):
    """Pairs of summands: all there are, or `max_problems` different ones."""
    size = 10**digits
    count = min(size**2, max_problems)
    return [divmod(number, size) for number in rng.sample(range(size**2), count)]


def split_problems(problems, rng):
    """A tenth of the unordered pairs for validation, with all problems made of them."""
    pairs = sorted({(min(pair), max(pair)) for pair in problems})
    held_out = set(rng.sample(pairs, max(1, len(pairs) // 10)))
    splits = {"train": [], "val": []}
    for a, b in problems:
        splits["val" if (min(a, b), max(a, b)) in held_out else "train"].append((a, b))
    return splits


def written(problems):
    return [f"{a}+{b}={a + b}" for a, b in problems]


def main(config):
    rng = random.Random(config.seed)
    problems = draw_problems(config.digits, config.max_problems, rng)
    splits = split_problems(problems, rng)
    train, val = splits["train"], splits["val"]
    print(f"{len(train):,} problems to train on, {len(val):,} held out")
    shuffled = [sum for _ in range(config.passes) for sum in written(rng.sample(train, len(train)))]
    write_dataset(
        config.data_dir or Path(__file__).parent,
        CharTokenizer(sorted("0123456789+="), eot=True),
        {"train": shuffled, "val": written(val)},
        f"sums of numbers of up to {config.digits} digits, seed {config.seed}",
        end_documents=True,
        extra={"task": "addition", "digits": config.digits},
    )


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
