"""Tiny Shakespeare (1.1 MB) with GPT-2's tokenizer, to finetune GPT-2.

    $ python data/shakespeare/prepare.py

For another text: --input=PATH --data_dir=data/mine
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.bpe import gpt2
from brisk.data.dataset import split_text, write_dataset
from brisk.data.text_files import find_text
from brisk.errors import one_line_errors
from configurator import configure

HERE = Path(__file__).parent
FILE = "tinyshakespeare.txt"
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # text file; if empty, tiny Shakespeare, downloaded if necessary
    data_dir: str = ""  # output folder; if empty, the folder of this script


def main(config):
    text, source = find_text(config.input, HERE, FILE, URL, SHA256)
    write_dataset(config.data_dir or HERE, gpt2(), split_text(text), source)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
