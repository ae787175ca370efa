"""Your own text: files, folders, zip archives or a data set on the hub, with any tokenizer.

    $ python data/custom/prepare.py --input=my.txt --data_dir=data/mine
    $ python data/custom/prepare.py --input=notes/,papers/*.md --tokenizer=bpe --vocab_size=4096
    $ python data/custom/prepare.py --input=posts.jsonl.gz --column=body --tokenizer=gpt2
    $ python data/custom/prepare.py --input=roneneldan/TinyStories --tokenizer=bpe

A document is a file of text, Markdown or source code, or a row of csv, json, jsonl or parquet. A
single document is split at its end. Several are split by a hash of their text, and each is followed
by an end-of-text token.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.prepare import prepare
from brisk.errors import one_line_errors
from configurator import NonNegativeInt, PositiveInt, configure


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # files, folders and patterns, separated by commas, or a data set on the hub
    tokenizer: Literal["auto", "char", "byte", "word", "bpe", "gpt2"] = "auto"  # unit of a token
    vocab_size: NonNegativeInt = 0  # size of a bpe, or maximum words; 0: depends on the text size
    bpe_sample: PositiveInt = 8  # MB of text to train a bpe on; memory use grows with it
    min_count: PositiveInt = 2  # rarer words are unknown
    column: str = ""  # text column of a table; if empty, text, or the only text column
    documents: Literal["files", "lines"] = "files"  # whether a text file or each line is a document
    encoding: str = "auto"  # encoding of text and csv files: utf-8, gb18030, big5, …
    val_share: Annotated[float, (0.0001, 0.5)] = 0.1  # fraction of the documents for validation
    data_dir: str = ""  # output folder; if empty, the folder of this script
    num_proc: NonNegativeInt = 0  # processes that tokenize; 0: one for each core


def main(config):
    choices = asdict(config)
    inputs, folder = choices.pop("input"), choices.pop("data_dir") or Path(__file__).parent
    prepare(inputs, folder, **choices, reuse=False)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
