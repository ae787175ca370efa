"""Short reviews with labels, as separate documents or as one text.

    $ python data/reviews/prepare.py
    $ python data/reviews/prepare.py --rows=windows
    $ python data/reviews/prepare.py --balance=True --label_prompt=True

For your own csv: --input=mine.csv --column=text --label=stars. Duplicates are removed, and a tenth
of the reviews of each label is for validation.
"""

import random
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.csv_file import CsvFile
from brisk.data.dataset import write_dataset
from brisk.data.text_files import find_file
from brisk.data.tokenizer import CharTokenizer
from brisk.errors import UserError, one_line_errors
from configurator import Seed, configure

HERE = Path(__file__).parent
URL = "https://raw.githubusercontent.com/great-luao/my_min_gpt/master/data/reviews.csv"
SHA256 = "8b21f52b90b3d5659d17d4028cc028dab3e6f56951bd3f904eae5c16b743d633"


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # csv file with a header; if empty, 5,000 Chinese film reviews
    column: str = "review"  # column with the texts
    label: str = "sentiment"  # column with the labels
    rows: Literal["windows", "documents"] = "documents"  # one text of lines, or separate documents
    balance: bool = False  # repeat training reviews of rare labels until all are equally frequent
    label_prompt: bool = False  # begin each review with the prompt of its label
    prompts: str = "1=好评：,0=差评："  # label=prompt, …; by default, the label and a colon
    val_share: Annotated[float, (0.001, 0.5)] = 0.1  # fraction of each label for validation
    encoding: str = "auto"  # encoding of the file: utf-8, gb18030, big5, …
    seed: Seed = 1337  # seed of the split and the order
    data_dir: str = ""  # output folder; if empty, the folder of this script


def read_reviews(path, config):
    """{review: label} of a csv file, without duplicates."""
    table, labels, count = CsvFile(path, config.encoding), {}, 0
    for column in (config.column, config.label):
        table.require_column(column)
    for row in table:
        if text := row[config.column].strip():
            labels.setdefault(text, row[config.label].strip())
            count += 1
    counts = [f"{n:,} labelled {label}" for label, n in sorted(Counter(labels.values()).items())]
    print(f"reviews: {', '.join(counts) or 0}; {count - len(labels)} duplicates removed")
    return labels


def main(config):
    path = find_file(config.input, HERE, "reviews.csv", URL, SHA256, "reviews.csv")
    labels, train, val, rng = read_reviews(path, config), {}, {}, random.Random(config.seed)
    for label in sorted(set(labels.values())):
        texts = [text for text in labels if labels[text] == label]
        rng.shuffle(texts)
        held_out = round(len(texts) * config.val_share)
        val[label], train[label] = texts[:held_out], texts[held_out:]
    if config.balance:
        most = max(map(len, train.values()), default=0)
        train = {label: list(islice(cycle(texts), most)) for label, texts in train.items()}
    pairs = [pair.split("=", 1) for pair in config.prompts.split(",") if pair]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"--prompts={config.prompts} is not of the form label=prompt,label=prompt")
    words = dict(pairs)
    splits = {"train": [], "val": []}
    for split, by_label in (("val", val), ("train", train)):  # val first: balance must not alter it
        for label, texts in by_label.items():
            prompt = words.get(label, f"{label}: ") if config.label_prompt else ""
            splits[split] += [prompt + text for text in texts]
        rng.shuffle(splits[split])
    is_stream = config.rows == "windows"
    if is_stream:
        lines = {split: [" ".join(text.splitlines()) for text in splits[split]] for split in splits}
        splits = {split: ["".join(line + "\n" for line in lines[split])] for split in splits}
    characters = sorted(set().union(*splits["train"], *splits["val"]))
    tokenizer = CharTokenizer(characters, eot=not is_stream)
    write_dataset(config.data_dir or HERE, tokenizer, splits, path.name, not is_stream)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
