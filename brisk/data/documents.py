"""Documents in files of any kind, compressed or not, or in a data set of the Hugging Face hub.

Whatever it is read from, a corpus is a collection that can be gone through again and again, and
a document is a string, or a `TextFile` where it may be larger than memory: so nothing here holds
more of a corpus than a thousand rows, or a million characters.
"""

import glob
import hashlib
import math
import os
from itertools import islice
from pathlib import Path

from brisk.data.hub import Rows, load
from brisk.data.raw_files import (
    EmptyFile,
    NotText,
    first_bytes,
    is_clutter,
    is_zip,
    members_of,
    refuse_special,
    suffix_of,
)
from brisk.data.tables import TABLES, Column, choose_column, table_of
from brisk.data.text_files import Lines, TextFile
from brisk.data.tokenize_files import cores
from brisk.errors import UserError, note

SHOWN = 5  # files left out that are named
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
PARTS_OF_A_SET = {"meta.json", "meta.pkl", "train.bin", "val.bin"}
FEW, LONG = 100, 10_000  # documents, and characters of all of them, see `split_documents`
COUNTED = 100_000  # documents up to which a split is exact; beyond, chance is exact enough


# ----------------------------------------------------------------------------- collections


class Corpus:
    """The documents of files one after another: a text is one, a table has one in each row.

    Args:
        sources: paths of files and folders and patterns such as docs/*.md, or one name of a
            data set on the Hugging Face hub, all separated by commas. A zip archive is read as a
            folder is.
        column: where a table has its text; if empty, its column `text`, or its only one of text.
        encoding: of text and csv files; told by their bytes where it is "auto".
        lines: whether each line of a text is a document of its own.

    Files among others that are empty or no text are left out with a line. Raises `UserError` where
    there are no documents to be had.
    """

    def __init__(self, sources, column="", encoding="auto", lines=False):
        if not sources.strip(", "):
            raise UserError("name a file, a folder or a data set on the hub: --input=PATH")
        files, left_out = with_members(find_files(sources))
        self.parts = []
        alone = len(files) + len(left_out) == 1
        for file in files:
            Table = None
            try:
                head = first_bytes(file)
                Table = table_of(file, head)
                if not head:
                    raise EmptyFile(f"{file} is empty")
                self.parts.append(part_of(file, Table, column, encoding, lines, alone))
            except UserError as error:
                if alone or (Table and not isinstance(error, EmptyFile)):
                    raise
                left_out.append((file, error))
        if not files and not left_out:
            dataset = load(sources, num_proc=cores())
            self.parts.append(
                Rows(dataset, choose_column(HubTable(dataset, sources), column), sources)
            )
        elif not self.parts:
            raise left_out[0][1]
        tell_left_out(left_out)

    def __iter__(self):
        for part in self.parts:
            yield from part


def part_of(file, Table, column, encoding, lines, alone):
    """The documents of one file, a `Table` or a text; `alone` is whether there are no others."""
    if Table:
        try:
            return Column(Table(file, encoding), column)
        except EmptyFile:
            raise
        except UserError:  # among others, json of another kind (settings, say) is a text
            if alone or suffix_of(file) != ".json":
                raise
    text = TextFile(file, encoding)
    if alone and not any(text):
        raise EmptyFile(f"{file} is empty")
    return Lines(text) if lines else [text]


def with_members(files):
    """The files, with those in zip archives in place of the archives; and pairs (archive, error) of
    those that cannot be read. Raises the error where there is one archive alone."""
    found, left_out = [], []
    for file in files:
        try:
            found += members_of(file) if is_zip(file) else [file]
        except UserError as error:
            if len(files) == 1:
                raise
            left_out.append((file, error))
    return found, left_out


def tell_left_out(left_out):
    """Say which files were left out, each with a line of its own where it could be repaired."""
    groups = {NotText: "no text", EmptyFile: "empty"}
    for kind, what in groups.items():
        names = [file.name for file, error in left_out if type(error) is kind]
        if names:
            shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            files = "1 file that is" if len(names) == 1 else f"{len(names)} files that are"
            note(f"left out {files} {what}: {shown}")
    others = [error for _, error in left_out if type(error) not in groups]
    for error in others[:SHOWN]:
        note(f"left out: {error}")
    if len(others) > SHOWN:
        note(f"left out {len(others) - SHOWN} more files like these")


class HubTable:
    """The columns of a `datasets` data set."""

    def __init__(self, dataset, name):
        self.path, self.columns = name, dataset.column_names
        self.has_column = self.columns.__contains__
        kinds = {name: getattr(kind, "dtype", "") for name, kind in dataset.features.items()}
        self.text_columns = [name for name in kinds if kinds[name] in ("string", "large_string")]


class Picked:
    """The documents of a corpus whose key `is_wanted`."""

    def __init__(self, corpus, is_wanted):
        self.corpus, self.is_wanted = corpus, is_wanted

    def __iter__(self):
        return (document for document in self.corpus if self.is_wanted(key_of(document)))


class Shortened:
    """The documents of a corpus, those whose key is `key` up to their character `n`."""

    def __init__(self, corpus, key, n):
        self.corpus, self.key, self.n = corpus, key, n

    def __iter__(self):
        for document in self.corpus:
            yield Span(document, 0, self.n) if key_of(document) == self.key else document


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
    split in itself, the last `share` of it for validation; so is one of a few that has more than
    half of the text, and the others are for training.

    Returns {"train": …, "val": …}. Raises `UserError` where there are no documents.
    """
    keys = list(map(key_of, islice(corpus, COUNTED)))
    if not keys:
        raise UserError("there are no documents in the input")
    if len(keys) == 1:
        document = next(iter(corpus))
        length = sum(map(len, pieces([document])))
        n = int(length * (1 - share))
        return {"train": [Span(document, 0, n)], "val": [Span(document, n, length)]}
    different = sorted(set(keys))
    if 1 < len(different) <= len(keys) < FEW:
        sizes = {key_of(document): sum(map(len, pieces([document]))) for document in corpus}
        total, largest = sum(sizes.values()), max(sizes, key=sizes.get)
        if sizes[largest] > total / 2 and total > LONG:
            n = sizes[largest] - int(total * share)
            whole = next(document for document in corpus if key_of(document) == largest)
            return {
                "train": Shortened(corpus, largest, n),
                "val": [Span(whole, n, sizes[largest])],
            }
    if len(keys) == COUNTED:
        bound = int(share * 2**64)
    elif len(different) == 1:
        raise UserError(f"all {len(keys)} documents are equal: none is left for validation")
    else:
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
    if sources == "-":
        raise UserError("standard input cannot be read again; save it in a file: --input=PATH")
    for source in [sources] if os.path.exists(sources) else listed:
        path = Path(source)
        if not os.path.exists(path) and source.startswith("~"):  # not expanded after --input=
            path = path.expanduser()
        if path.is_dir():
            files = files_in(path)
        elif path.exists():
            refuse_special(path)
            files = [path]
        else:
            files = sorted(map(Path, glob.glob(source, recursive=True)))
            files = [file for file in files if file.is_file()]
        if not files:
            if path.is_dir():
                raise UserError(f"there are no files in {source}")
            if path.is_symlink():
                raise UserError(f"{source} is a link that leads nowhere")
            if "://" in source:
                raise UserError(f"{source} is an address; download it first, then --input=PATH")
            is_a_file = suffix_of(path) in {*TABLES, ".txt", ".md", ".py"}
            name_of_a_set = source == sources and source.count("/") <= 1 and not is_a_file
            if name_of_a_set and not path.exists() and not glob.has_magic(source):
                return []
            raise UserError(f"there are no files at {source}")
        found += files
    return list({os.path.realpath(file): file for file in reversed(found)}.values())[::-1]


def files_in(folder):
    """The files below a folder, in order, without hidden ones and data sets that were made here."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    made = {file.parent for file in files if file.name == "meta.json"}
    made &= {file.parent for file in files if file.name == "train.bin"}
    return [
        file
        for file in files
        if not (file.parent in made and file.name in PARTS_OF_A_SET)
        and not is_clutter(file.relative_to(folder))
    ]


def load_documents(source):
    """The `datasets.Dataset` of `source`: a set on the hub, a file, or a folder of files of one
    kind. A document is a line of .jsonl, a row of .parquet (its column `text`) or a whole .txt.

    Raises `UserError` where there are no documents to be had.
    """
    if not (files := find_files(source)):
        return load(source, num_proc=cores())
    kinds = {KINDS.get(suffix_of(file), "text") for file in files}
    if len(kinds) != 1:
        raise UserError(f"{source} should have files of one kind only, it has {', '.join(kinds)}")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    return load(kind, data_files=list(map(str, files)), **options)
