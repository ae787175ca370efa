"""One token for each word, without stop words: small models of the topics of a text.

    $ python data/words/prepare.py
    $ python data/words/prepare.py --input=my.txt --stop_words=none --data_dir=data/mine

Punctuation, white space and stop words are dropped.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.dataset import split_text, write_dataset
from brisk.data.text_files import find_text, read_text
from brisk.data.tokenizer import learn_words
from brisk.errors import UserError, one_line_errors
from configurator import PositiveInt, configure

HERE = Path(__file__).parent
URL = "https://raw.githubusercontent.com/diixo/numoGPT/main/data/train-nn.txt"
SHA256 = "4d1036d6294a7fdef77e0b01648cbdd0ba29073c2852355fba5863b8bd90a53c"


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # text file; if empty, 50 kB of abstracts on text clustering
    stop_words: str = "english"  # words to drop: a file of words, english, or none
    lower: bool = True  # convert the text to lower case
    min_count: PositiveInt = 1  # rarer words are unknown
    vocab_size: PositiveInt = 50_000  # maximum number of words
    val_share: Annotated[float, (0.001, 0.5)] = 0.1  # fraction for validation, taken from the end
    encoding: str = "auto"  # encoding of the file: utf-8, gb18030, big5, …
    data_dir: str = ""  # output folder; if empty, the folder of this script


def read_stop_words(name):
    """Read the words in the file `name`; "english" is english.txt in this folder."""
    if name in ("none", ""):
        return []
    if name != "english" and not Path(name).exists():
        raise UserError(f"--stop_words={name}: no such file; use a file, english or none")
    return read_text(HERE / "english.txt" if name == "english" else name).lower().split()


def main(config):
    text, source = find_text(config.input, HERE, "words.txt", URL, SHA256, config.encoding)
    stop_words = read_stop_words(config.stop_words)
    splits = split_text(text, config.val_share)
    settings = {"stop_words": stop_words, "lower": config.lower}
    tokenizer = learn_words(splits["train"], config.min_count, config.vocab_size, **settings)
    unknown = tokenizer.encode(splits["val"][0]) == tokenizer.unk
    if not len(unknown):
        share = 100 * config.val_share
        raise UserError(
            f"the last {share:g} % of the text, for validation, has only stop words; use a longer "
            "text or a larger --val_share"
        )
    print(f"{tokenizer.vocab_size:,} words, {len(stop_words)} stop words dropped")
    print(f"{100 * unknown.mean():.1f} % of the words in validation are unknown")
    write_dataset(config.data_dir or HERE, tokenizer, splits, source)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
