"""The source code of Python's standard library: a corpus that needs no download.

    $ python data/python_source/prepare.py
    $ python data/python_source/prepare.py --tokenizer=byte

Each file is a document. About a tenth of the files are for validation, selected by a hash of their
path, so the split is the same for all versions of Python.
"""

import hashlib
import platform
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.bpe import train_bpe
from brisk.data.dataset import write_dataset
from brisk.data.tokenizer import ByteTokenizer
from brisk.errors import UserError, one_line_errors
from configurator import PositiveInt, configure

# Tests are a third of the library. They, encodings and pydoc_data are mostly tables.
SKIPPED = {"test", "tests", "idle_test", "encodings", "pydoc_data", "turtledemo"}
SKIPPED |= {"site-packages", "dist-packages"}  # third-party code


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # folder of .py files; if empty, the standard library of the running Python
    tokenizer: Literal["bpe", "byte"] = "bpe"  # a BPE trained on the text, or bytes
    vocab_size: PositiveInt = 1024  # vocabulary of the BPE
    data_dir: str = ""  # output folder; if empty, the folder of this script


def read_sources(folder):
    """{path: text} of the Python files in `folder`, sorted by path."""
    texts = {}
    for file in sorted(folder.rglob("*.py"), key=lambda file: file.relative_to(folder).as_posix()):
        path = file.relative_to(folder)
        generated = file.name.startswith("_sysconfigdata")
        if not generated and SKIPPED.isdisjoint(path.parts) and file.is_file():
            try:
                texts[path.as_posix()] = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
    return texts


def main(config):
    folder = Path(config.input or sysconfig.get_path("stdlib"))
    texts = read_sources(folder)
    if not texts:
        raise UserError(f"there are no Python files in {folder}; name a folder: --input=PATH")
    megabytes = sum(map(len, texts.values())) / 1e6
    print(f"found {len(texts):,} files, {megabytes:.1f} million characters, in {folder}")
    splits = {"train": [], "val": []}
    for path, text in texts.items():
        picked = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 10 == 0
        splits["val" if picked else "train"].append(text)
    library = f"standard library of Python {platform.python_version()}"
    source = folder.resolve().name if config.input else library
    directory = config.data_dir or Path(__file__).parent
    if config.tokenizer == "bpe":
        tokenizer = train_bpe(splits["train"], config.vocab_size)
    else:
        tokenizer = ByteTokenizer()
    write_dataset(directory, tokenizer, splits, source, end_documents=True)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
