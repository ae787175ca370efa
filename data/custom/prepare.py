"""Text of your own: files, folders, zip archives or a data set on the hub, in any tokens.

    $ python data/custom/prepare.py --input=my.txt --data_dir=data/mine
    $ python data/custom/prepare.py --input=notes/,papers/*.md --tokenizer=bpe --vocab_size=4096
    $ python data/custom/prepare.py --input=posts.jsonl.gz --column=body --tokenizer=gpt2
    $ python data/custom/prepare.py --input=roneneldan/TinyStories --tokenizer=bpe

Text, Markdown and source code: each file is a document; csv, json, jsonl and parquet: each row. One
document alone is split in itself, its end for validation; many are split by a hash of their text,
and each ends with an end-of-text token.
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
    input: str = ""  # files, folders, patterns, separated by commas, or a data set on the hub
    tokenizer: Literal["auto", "char", "byte", "word", "bpe", "gpt2"] = "auto"  # what a token is
    vocab_size: NonNegativeInt = 0  # of a bpe, or the most words; 0: by the size of the text
    bpe_sample: PositiveInt = 8  # MB of training text a bpe is learned from; memory grows with it
    min_count: PositiveInt = 2  # words that are rarer are unknown
    column: str = ""  # where a table has its text; if empty, text, or its only one of text
    documents: Literal["files", "lines"] = "files"  # what a document is in a text file
    encoding: str = "auto"  # of text and csv files: utf-8, gb18030, big5, …
    val_share: Annotated[float, (0.0001, 0.5)] = 0.1  # share of the documents for validation
    data_dir: str = ""  # where to write; beside this script if empty
    num_proc: NonNegativeInt = 0  # processes that tokenize; one for each core if 0


def main(config):
    choices = asdict(config)
    inputs, folder = choices.pop("input"), choices.pop("data_dir") or Path(__file__).parent
    prepare(inputs, folder, **choices, reuse=False)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
