"""OpenWebText with GPT-2's tokenizer, to reproduce GPT-2.

    $ python data/openwebtext/prepare.py

For your own documents: --source=documents.jsonl --data_dir=data/mine
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
    source: str = "Skylion007/openwebtext"  # data set on the hub, file or folder
    test_size: UnitFloat = 0.0005  # fraction of the documents for validation, as in nanoGPT
    data_dir: str = ""  # output folder; if empty, the folder of this script
    num_proc: NonNegativeInt = 0  # processes that tokenize; 0: one for each core


def split(documents, test_size, source):
    """Split documents at random as nanoGPT does. A single document is split at its end."""
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
