"""A novel in any language: one token for each character, one document for each chapter.

    $ python data/novel/prepare.py --input=novel.txt
    $ python data/novel/prepare.py --input=novel.txt --chapters="^CHAPTER [IVXLC]+" --encoding=big5

The encoding (UTF-8, GB18030, Big5, …) is detected. A document begins with the heading of its
chapter. The last tenth of the chapters is for validation; without chapters, the last tenth of the
text.
"""

import re
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from brisk.data.dataset import split_text, write_dataset
from brisk.data.text_files import find_text
from brisk.data.tokenizer import CharTokenizer
from brisk.errors import UserError, one_line_errors
from configurator import configure

HERE = Path(__file__).parent
# Matches headings such as 第一章 …, 第12回 …, 一　…, 楔子, Chapter 4, CHAPTER IV. …
NUMERAL = "零〇一二三四五六七八九十百千"
HEADING = (
    rf"^\s*(第\s*[\d{NUMERAL}]+\s*[章回節节卷]|[{NUMERAL}]+(?![^\s、])"
    r"|楔子|(?i:chapter)\s\w+).{0,40}$"
)


@dataclass(frozen=True)
class PrepareConfig:
    input: str = ""  # text file; if empty, novel.txt in the folder $BRISK_DATA
    chapters: str = HEADING  # regular expression for the headings of chapters
    encoding: str = "auto"  # encoding of the file: utf-8, gb18030, big5, …
    val_share: Annotated[float, (0.001, 0.5)] = 0.1  # fraction for validation, taken from the end
    data_dir: str = ""  # output folder; if empty, the folder of this script


def split_chapters(pattern, text):
    """Split `text` into chapters. Text before the first heading is a chapter too."""
    try:
        starts = [match.start() for match in re.finditer(pattern, text, re.MULTILINE)]
    except (re.error, OverflowError) as error:
        raise UserError(f"--chapters={pattern} is not a regular expression: {error}") from error
    bounds = sorted({0, *starts, len(text)})
    chapters = [text[a:b].strip() for a, b in pairwise(bounds)]
    return [chapter for chapter in chapters if chapter]


def main(config):
    text, source = find_text(config.input, HERE, "novel.txt", "", "", config.encoding)
    chapters = split_chapters(config.chapters, text) if config.chapters else [text]
    is_one = len(chapters) == 1
    held_out = max(1, round(config.val_share * len(chapters)))
    splits = {"train": chapters[:-held_out], "val": chapters[-held_out:]}
    if is_one:
        splits = split_text(text, config.val_share)
    tokenizer = CharTokenizer(sorted(set(text)), eot=not is_one)
    characters = f"{len(text):,} characters, {len(tokenizer.characters):,} of them different"
    print(f"{characters}, in {len(chapters)} chapter{'s' * (not is_one)}")
    write_dataset(config.data_dir or HERE, tokenizer, splits, source, not is_one)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(PrepareConfig, sys.argv[1:]))
