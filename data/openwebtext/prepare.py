"""OpenWebText (or documents of your own) in GPT-2's byte-pair encoding, to train GPT-2 on.

    $ python data/openwebtext/prepare.py

Documents of your own do as well: --source=documents.jsonl --data_dir=data/mine
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.bpe import gpt2
from brisk.data.dataset import split_text, write_dataset
from brisk.data.documents import load_documents
from brisk.data.hub import Rows
from brisk.errors import one_line_errors
from configurator import NonNegativeInt, UnitFloat, configure


@dataclass(frozen=True)
class PrepareConfig:
    source: str = "Skylion007/openwebtext"  # a set on the hub, a file or a folder of files
    test_size: UnitFloat = 0.0005  # share of the documents for validation, as in nanoGPT
    data_dir: str = ""  # where to write; beside this script if empty
    num_proc: NonNegativeInt = 0  # processes that tokenize; one for each core if 0


def split(documents, test_size, source):
    """Documents for training and validation as nanoGPT splits them; one alone, in itself."""
    rows = Rows(documents, "text", source)
    if len(documents) == 1:
        return split_text(next(iter(rows)))
    count = max(1, math.ceil(test_size * len(documents)))
    count = min(count, len(documents) - 1)
    halves = documents.train_test_split(test_size=count, seed=2357, shuffle=True)
    return {
        split: Rows(halves[half], "text", source)
        for split, half in (("train", "train"), ("val", "test"))
    }


def main(config):
    splits = split(load_documents(config.source), config.test_size, config.source)
    directory = config.data_dir or Path(__file__).parent
    source = Path(config.source).name if Path(config.source).exists() else config.source
    write_dataset(directory, gpt2(), splits, source, True, config.num_proc)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
