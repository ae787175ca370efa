"""Documents in files of any kind, compressed or not, or in a data set of the Hugging Face hub.

Whatever it is read from, a corpus is a collection that can be gone through again and again, and
a document is a string, or a `TextFile` where it may be larger than memory: so nothing here holds
more of a corpus than a thousand rows, or a million characters.
"""

import glob
import hashlib
import math
import os
import sys
from itertools import islice
from pathlib import Path

from brisk.data.tables import TABLES, Column, CsvFile, Rows, load, load_rows, suffix_of
from brisk.data.text_files import Lines, TextFile
from brisk.data.tokenize_files import cores
from brisk.errors import UserError

COUNTED = 100_000  # documents up to which a split is exact; beyond, chance is exact enough


# ----------------------------------------------------------------------------- collections


class Corpus:
    """The documents of files one after another: a text is one, a table has one in each row.

    Args:
        sources: paths of files and folders and patterns such as docs/*.md, or one name of a
            data set on the Hugging Face hub, all separated by commas.
        column: where a table has its text.
        encoding: of text and csv files; told by their bytes where it is "auto".
        lines: whether each line of a text is a document of its own.

    Raises `UserError` where there are no documents to be had.
    """

    def __init__(self, sources, column="text", encoding="auto", lines=False):
        self.parts, no_text = [], []
        if not sources.strip(", "):
            raise UserError("name a file, a folder or a data set on the hub: --input=PATH")
        files = find_files(sources)
        if not files:
            self.parts.append(Rows(load_documents(sources), column, sources))
        for file in files:
            alone = len(files) == 1
            kind = TABLES.get(suffix_of(file))
            try:
                self.parts.append(self.part(file, kind, column, encoding, lines))
            except UserError:
                if file.suffix == ".json" and not alone:  # settings, say: text like any other
                    self.parts.append(self.part(file, None, column, encoding, lines))
                elif kind or alone:
                    raise
                else:
                    no_text.append(file.name)
        if no_text:
            names = ", ".join(no_text[:5]) + (", …" if len(no_text) > 5 else "")
            print(f"left out {len(no_text)} files that are no text: {names}", file=sys.stderr)

    def part(self, file, kind, column, encoding, lines):
        """The documents of one file."""
        if kind == "csv":
            return Column(CsvFile(file, encoding), column)
        if kind:
            return Rows(load_rows(kind, file), column, file)
        text = TextFile(file, encoding)
        return Lines(text) if lines else [text]

    def __iter__(self):
        for part in self.parts:
            yield from part


class Picked:
    """The documents of a corpus whose key `is_wanted`."""

    def __init__(self, corpus, is_wanted):
        self.corpus, self.is_wanted = corpus, is_wanted

    def __iter__(self):
        return (document for document in self.corpus if self.is_wanted(key_of(document)))


class Span:
    """The characters from `first` to before `last` of a document, in pieces."""

    def __init__(self, document, first, last):
        self.document, self.first, self.last = document, first, last

    def __iter__(self):
        end = 0
        for piece in pieces([self.document]):
            start, end = end, end + len(piece)
            if start >= self.last:
                return
            if end > self.first:
                yield piece[max(0, self.first - start) : self.last - start]


def pieces(documents):
    """The text of all documents in order, in strings of bounded length."""
    for document in documents:
        yield from [document] if isinstance(document, str) else document


# ----------------------------------------------------------------------------- splitting


def split_documents(corpus, share):
    """Split a corpus for training and validation: by document, picked by a hash of their text, so
    that equal ones are on the same side and nothing depends on their order. A document alone is
    split in itself, the last `share` of it for validation.

    Returns {"train": …, "val": …}. Raises `UserError` where there are no documents.
    """
    keys = list(map(key_of, islice(corpus, COUNTED)))
    if not keys:
        raise UserError("there are no documents in it")
    if len(keys) == 1:
        document = next(iter(corpus))
        length = sum(map(len, pieces([document])))
        n = int(length * (1 - share))
        return {"train": [Span(document, 0, n)], "val": [Span(document, n, length)]}
    if len(keys) == COUNTED:
        bound = int(share * 2**64)
    else:
        different = sorted(set(keys))
        count = min(max(1, math.ceil(share * len(different))), len(different) - 1)
        bound = different[count]
    return {
        "train": Picked(corpus, lambda key: key >= bound),
        "val": Picked(corpus, lambda key: key < bound),
    }


def key_of(document):
    """A number of 64 bits that depends on a document's text (the first million characters)."""
    text = document if isinstance(document, str) else next(iter(document), "")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def sample_evenly(documents, megabytes):
    """Pieces of the documents' text, spread evenly over it, of about so many million bytes."""
    size = sum(len(piece.encode("utf-8", "surrogatepass")) for piece in pieces(documents))
    share, taken, seen = min(1.0, megabytes * 1e6 / max(1, size)), 0, 0
    for piece in pieces(documents):
        seen += len(piece)
        wanted = int(seen * share) - taken  # what is due at this place
        if wanted > 0:
            yield piece[:wanted]
            taken += min(wanted, len(piece))


# ----------------------------------------------------------------------------- finding files


def find_files(sources):
    """The files that paths, folders and patterns, separated by commas, stand for, in order;
    none where `sources` looks like the name of a data set on the hub. Hidden ones are left out."""
    found = []
    listed = [part.strip() for part in sources.split(",") if part.strip()]
    for source in [sources] if os.path.exists(sources) else listed:
        path = Path(source)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            files = [file for file in files if not is_hidden(file.relative_to(path))]
        elif path.exists():
            if not path.is_file():  # to read a FIFO blocks, and a device may never end
                raise UserError(f"{path} is not a regular file; save its text in one first")
            files = [path]
        else:
            files = sorted(map(Path, glob.glob(source, recursive=True)))
            files = [file for file in files if file.is_file()]
        if not files:
            is_a_file = suffix_of(path) in {*TABLES, ".txt", ".md", ".py"}
            name_of_a_set = source == sources and source.count("/") <= 1 and not is_a_file
            if name_of_a_set and not path.exists() and not glob.has_magic(source):
                return []
            raise UserError(f"there are no files at {source}")
        found += files
    return list(dict.fromkeys(found))


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def load_documents(source):
    """The `datasets.Dataset` of `source`: a set on the hub, a file, or a folder of files of one
    kind. A document is a line of .jsonl, a row of .parquet (its column `text`) or a whole .txt.

    Raises `UserError` where there are no documents to be had.
    """
    if not (files := find_files(source)):
        return load(source, num_proc=cores())
    kinds = {TABLES.get(suffix_of(file), "text") for file in files}
    if len(kinds) != 1:
        raise UserError(f"{source} should have files of one kind only, it has {', '.join(kinds)}")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    return load(kind, data_files=list(map(str, files)), **options)
