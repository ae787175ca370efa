"""Sums such as 12+34=46, each a document: a task with exact answers.

    $ python data/addition/prepare.py --digits=2

A tenth of the problems is for validation; each is in `val.bin` once. a+b and b+a are on the same
side of the split, so no validation answer is in the training data.
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
    digits: Annotated[int, (1, 9)] = 2  # maximum number of digits of a summand
    max_problems: PositiveInt = 100_000  # if there are more, draw a random sample of this size
    passes: PositiveInt = 10  # shuffled copies of the problems in train.bin
    seed: int = 1337  # seed of the sample, the split and the shuffles
    data_dir: str = ""  # output folder; if empty, the folder of this script


def sample_problems(digits, max_problems, rng):
    """All pairs of summands, or a random sample of `max_problems`."""
    size = 10**digits
    count = min(size**2, max_problems)
    return [divmod(number, size) for number in rng.sample(range(size**2), count)]


def split_problems(problems, rng):
    """Split by unordered pair of summands, with a tenth of the pairs for validation."""
    pairs = sorted({(min(pair), max(pair)) for pair in problems})
    held_out = set(rng.sample(pairs, max(1, len(pairs) // 10)))
    splits = {"train": [], "val": []}
    for a, b in problems:
        splits["val" if (min(a, b), max(a, b)) in held_out else "train"].append((a, b))
    return splits


def as_text(problems):
    return [f"{a}+{b}={a + b}" for a, b in problems]


def main(config):
    rng = random.Random(config.seed)
    problems = sample_problems(config.digits, config.max_problems, rng)
    splits = split_problems(problems, rng)
    train, val = splits["train"], splits["val"]
    print(f"{len(train):,} problems to train on, {len(val):,} held out")
    shuffled = [sum for _ in range(config.passes) for sum in as_text(rng.sample(train, len(train)))]
    write_dataset(
        config.data_dir or Path(__file__).parent,
        CharTokenizer(sorted("0123456789+="), eot=True),
        {"train": shuffled, "val": as_text(val)},
        f"sums of numbers with up to {config.digits} digits, seed {config.seed}",
        end_documents=True,
        extra={"task": "addition", "digits": config.digits},
    )


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
