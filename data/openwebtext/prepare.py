"""OpenWebText (or documents of your own) in GPT-2's byte-pair encoding, to train GPT-2 on.

    $ python data/openwebtext/prepare.py

Documents of your own do as well: --source=documents.jsonl --data_dir=data/mine
"""

import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.corpus import cores, split_text, write_dataset
from brisk.errors import UserError, one_line_errors
from brisk.tokenizer import gpt2
from configurator import NonNegativeInt, UnitFloat, configure

LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


@dataclass
class PrepareConfig:
    source: str = "Skylion007/openwebtext"  # a set on the hub, a file or a folder of files
    test_size: UnitFloat = 0.0005  # share of the documents for validation, as in nanoGPT
    data_dir: str = ""  # where to write; beside this script if empty
    num_proc: NonNegativeInt = 0  # processes that tokenize; one for each core if 0


class Texts:
    """The texts of a `datasets.Dataset`, in order, a thousand of them in memory."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __iter__(self):
        for rows in self.dataset.iter(batch_size=1000):
            yield from rows["text"]


def location(path):
    """What to ask `load_dataset` for: a set on the hub, or files, compressed or not. A document is
    a line of .jsonl, a row of .parquet or a whole .txt."""
    if not Path(path).exists():
        return {"path": path, "num_proc": cores()}
    files = sorted(Path(path).rglob("*")) or [Path(path)]
    kinds = {str(file): LOADERS[end] for file in files for end in file.suffixes if end in LOADERS}
    if len(set(kinds.values())) != 1:
        raise UserError(f"{path} should have files of one kind of these: {', '.join(LOADERS)}")
    kind = next(iter(kinds.values()))
    options = {"sample_by": "document"} if kind == "text" else {}
    return {"path": kind, "data_files": list(kinds), **options}


def main(config):
    where = location(config.source)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # told below, in one line
    try:
        from datasets import load_dataset

        dataset = load_dataset(**where, split="train")
    except Exception as error:  # datasets and its file readers raise of every kind
        needs = "this needs the package datasets, and the network or files of yours, --source=PATH"
        raise UserError(f"no {config.source}: {error.__cause__ or error} ({needs})") from error
    if "text" not in dataset.column_names or len(dataset) == 0:
        raise UserError(f"{config.source} needs documents in a column named text")
    if len(dataset) == 1:
        splits = split_text(dataset[0]["text"])
    else:
        count = max(1, math.ceil(config.test_size * len(dataset)))  # of documents, at least one
        size = min(count, len(dataset) - 1)
        halves = dataset.train_test_split(test_size=size, seed=2357, shuffle=True)
        splits = {"train": Texts(halves["train"]), "val": Texts(halves["test"])}
    directory = config.data_dir or Path(__file__).parent
    source = Path(config.source).name if Path(config.source).exists() else config.source
    meta = write_dataset(directory, gpt2(), splits, source, True, config.num_proc)
    if meta["splits"]["val"]["tokens"] <= 1024:
        print("that is less than GPT-2's context of 1024: a larger --test_size holds out more")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
