"""Short reviews with labels, review by review or as one stream of text.

    $ python data/reviews/prepare.py
    $ python data/reviews/prepare.py --rows=windows
    $ python data/reviews/prepare.py --balance=True --label_prompt=True

A csv of your own: --input=mine.csv --column=text --label=stars. Duplicates are left out and a
tenth of the reviews of each label is held out before anything else happens to them.
"""

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.corpus import write_dataset
from brisk.documents import CsvFile
from brisk.errors import one_line_errors
from brisk.rawtext import find_file
from brisk.tokenizer import CharTokenizer
from configurator import Seed, configure

HERE = Path(__file__).parent
URL = "https://raw.githubusercontent.com/great-luao/my_min_gpt/master/data/reviews.csv"
SHA256 = "8b21f52b90b3d5659d17d4028cc028dab3e6f56951bd3f904eae5c16b743d633"


@dataclass
class PrepareConfig:
    input: str = ""  # a csv file with a header; if empty, 5,000 Chinese film reviews
    column: str = "review"  # where it has the texts
    label: str = "sentiment"  # where it has their labels
    rows: Literal["windows", "documents"] = "documents"  # one text of lines, or each for itself
    balance: bool = False  # repeat training reviews of rare labels until all labels are as many
    label_prompt: bool = False  # put a word for its label before each review, to ask for one
    prompts: str = "1=好评：,0=差评："  # these words; for another label, itself and a colon
    val_share: Annotated[float, (0.001, 0.5)] = 0.1  # of the reviews of each label
    encoding: str = "auto"  # of the file: utf-8, gb18030, big5, …
    seed: Seed = 1337  # of the split and the order
    data_dir: str = ""  # where to write; beside this script if empty


def read_reviews(path, config):
    """Label → its reviews, each text once."""
    table = CsvFile(path, config.encoding)
    for column in (config.column, config.label):
        table.need(column)
    by_label, seen, duplicates = {}, set(), 0
    for row in table:
        text, label = row[config.column].strip(), row[config.label].strip()
        if text and text not in seen:
            by_label.setdefault(label, []).append(text)
        duplicates += text in seen
        seen.add(text)
    counts = ", ".join(f"{len(by_label[label]):,} labelled {label}" for label in sorted(by_label))
    print(f"reviews: {counts or 0}; {duplicates} duplicates left out")
    return by_label


def main(config):
    path = find_file(config.input, HERE, "reviews.csv", URL, SHA256, "reviews.csv")
    by_label = read_reviews(path, config)
    rng = random.Random(config.seed)
    words = dict(pair.split("=", 1) for pair in config.prompts.split(",") if "=" in pair)
    most = max((len(reviews) for reviews in by_label.values()), default=0)
    splits = {"train": [], "val": []}
    for label, reviews in sorted(by_label.items()):
        if config.label_prompt:
            reviews = [words.get(label, f"{label}: ") + review for review in reviews]
        rng.shuffle(reviews)
        held_out = round(len(reviews) * config.val_share)
        splits["val"] += reviews[:held_out]
        train = reviews[held_out:]
        if config.balance and train:
            most_train = most - round(most * config.val_share)
            repeats, rest = divmod(most_train, len(train))
            train = train * repeats + rng.sample(train, rest)
        splits["train"] += train
    for reviews in splits.values():
        rng.shuffle(reviews)
    is_stream = config.rows == "windows"
    if is_stream:
        lines = {split: [" ".join(r.splitlines()) for r in splits[split]] for split in splits}
        splits = {split: ["".join(line + "\n" for line in lines[split])] for split in splits}
    characters = sorted(set().union(*splits["train"], *splits["val"]))
    tokenizer = CharTokenizer(characters, eot=not is_stream)
    write_dataset(config.data_dir or HERE, tokenizer, splits, path.name, not is_stream)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
