"""Text of your own: files, folders or a data set on the hub, in the tokens of your choice.

    $ python data/custom/prepare.py --input=my.txt --tokenizer=char --data_dir=data/mine
    $ python data/custom/prepare.py --input=notes/,papers/*.md --tokenizer=bpe --vocab_size=4096
    $ python data/custom/prepare.py --input=posts.jsonl.gz --column=body --tokenizer=gpt2
    $ python data/custom/prepare.py --input=roneneldan/TinyStories --tokenizer=bpe

Text, Markdown and source code: each file is a document; csv, jsonl and parquet: each row. One
document alone is split in itself, its end for validation; many are split by a hash of their text,
and each ends with an end-of-text token.
"""

import os
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.bpe import gpt2, train_bpe
from brisk.data.dataset import write_dataset
from brisk.data.documents import Corpus, pieces, sample_evenly, split_documents
from brisk.data.tokenize_files import parts
from brisk.data.tokenizer import ByteTokenizer, CharTokenizer, learn_words
from brisk.errors import one_line_errors
from configurator import NonNegativeInt, PositiveInt, configure


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # files, folders, patterns, separated by commas, or a data set on the hub
    tokenizer: Literal["char", "byte", "word", "bpe", "gpt2"] = "bpe"  # what a token is
    vocab_size: PositiveInt = 8192  # of a bpe, or the most words
    bpe_sample: PositiveInt = 8  # MB of training text a bpe is learned from; memory grows with it
    min_count: PositiveInt = 2  # words that are rarer are unknown
    column: str = "text"  # where a csv, jsonl or parquet file has its text
    documents: Literal["files", "lines"] = "files"  # what a document is in a text file
    encoding: str = "auto"  # of text and csv files: utf-8, gb18030, big5, …
    val_share: Annotated[float, (0.0001, 0.5)] = 0.1  # share of the documents for validation
    data_dir: str = ""  # where to write; beside this script if empty
    num_proc: NonNegativeInt = 0  # processes that tokenize; one for each core if 0


def make_tokenizer(config, corpus, train, is_one):
    """The tokenizer asked for, learned from the training text (characters: from all of it)."""
    if config.tokenizer == "char":
        characters = set()
        for piece in pieces(corpus):
            characters.update(piece)
        return CharTokenizer(sorted(characters), eot=not is_one)
    if config.tokenizer == "word":
        whole_words = (text for document in train for text, _ in parts(document))
        return learn_words(whole_words, config.min_count, config.vocab_size, eot=not is_one)
    if config.tokenizer == "bpe":
        return train_bpe(sample_evenly(train, config.bpe_sample), config.vocab_size)
    return ByteTokenizer() if config.tokenizer == "byte" else gpt2()


def main(config):
    lines = config.documents == "lines"
    corpus = Corpus(config.input, config.column, config.encoding, lines)
    is_one = len(list(islice(corpus, 2))) == 1
    splits = split_documents(corpus, config.val_share)
    tokenizer = make_tokenizer(config, corpus, splits["train"], is_one)
    print(f"{config.tokenizer} tokens, {tokenizer.vocab_size:,} of them")
    directory = config.data_dir or Path(__file__).parent
    source = Path(config.input).name if os.path.exists(config.input) else config.input
    write_dataset(directory, tokenizer, splits, source, not is_one, config.num_proc)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
