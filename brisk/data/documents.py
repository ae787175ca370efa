"""Read documents from text files, tables, archives, or a data set on the Hugging Face hub.

A corpus is a re-iterable collection of documents. A document is a string, or a `TextFile` if it may
be larger than memory. At most a thousand rows or a million characters are in memory.
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

SHOWN = 5  # skipped files to name
KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
DATA_SET_FILES = {"meta.json", "meta.pkl", "train.bin", "val.bin"}
FEW, LONG = 100, 10_000  # documents, and characters in all of them; see `split_documents`
COUNTED = 100_000  # a split of fewer documents has the exact fraction; of more, the expected one


# ----------------------------------------------------------------------------- collections


class Corpus:
    """Documents of one or more files: a text file is one document, a table has one in each row.

    Args:
        sources: files, folders and glob patterns such as docs/*.md, separated by commas; or the
            name of a data set on the Hugging Face hub. A zip archive is read like a folder.
        column: column of a table with the text; if empty, `text`, or the only text column.
        encoding: encoding of text and csv files; "auto" detects it.
        lines: make each line of a text file a document.

    If there are several files, empty and binary ones are skipped with a note. Raises `UserError` if
    no documents are left.
    """

    def __init__(self, sources, column="", encoding="auto", lines=False):
        if not sources.strip(", "):
            raise UserError("name a file, a folder or a data set on the hub: --input=PATH")
        files, skipped = expand_archives(find_files(sources))
        self.parts = []
        is_only = len(files) + len(skipped) == 1
        for file in files:
            Table = None
            try:
                head = first_bytes(file)
                Table = table_of(file, head)
                if not head:
                    raise EmptyFile(f"{file} is empty")
                self.parts.append(part_of(file, Table, column, encoding, lines, is_only))
            except UserError as error:
                if is_only or (Table and not isinstance(error, EmptyFile)):
                    raise
                skipped.append((file, error))
        if not files and not skipped:
            dataset = load(sources, num_proc=cores())
            self.parts.append(
                Rows(dataset, choose_column(HubTable(dataset, sources), column), sources)
            )
        elif not self.parts:
            raise skipped[0][1]
        note_skipped(skipped)

    def __iter__(self):
        for part in self.parts:
            yield from part


def part_of(file, Table, column, encoding, lines, is_only):
    """The documents of one file, a `Table` or text. `is_only`: the corpus has no other file."""
    if Table:
        try:
            return Column(Table(file, encoding), column)
        except EmptyFile:
            raise
        except UserError:  # in a folder, json that is not a table (settings, say) counts as text
            if is_only or suffix_of(file) != ".json":
                raise
    text = TextFile(file, encoding)
    if is_only and not any(text):
        raise EmptyFile(f"{file} is empty")
    return Lines(text) if lines else [text]


def expand_archives(files):
    """Replace zip archives among `files` by their members.

    Returns the files, and pairs (archive, error) of unreadable archives. Raises the error if the
    archive is the only file.
    """
    found, skipped = [], []
    for file in files:
        try:
            found += members_of(file) if is_zip(file) else [file]
        except UserError as error:
            if len(files) == 1:
                raise
            skipped.append((file, error))
    return found, skipped


def note_skipped(skipped):
    """Print which files were skipped: binary and empty ones in one line each, others with their
    error."""
    groups = {NotText: "not text", EmptyFile: "empty"}
    for kind, reason in groups.items():
        names = [file.name for file, error in skipped if type(error) is kind]
        if names:
            shown = ", ".join(names[:SHOWN]) + (", …" if len(names) > SHOWN else "")
            files = "1 file that is" if len(names) == 1 else f"{len(names)} files that are"
            note(f"skipped {files} {reason}: {shown}")
    others = [error for _, error in skipped if type(error) not in groups]
    for error in others[:SHOWN]:
        note(f"skipped: {error}")
    if len(others) > SHOWN:
        note(f"skipped {len(others) - SHOWN} more files with errors")


class HubTable:
    """The columns of a `datasets` data set."""

    def __init__(self, dataset, name):
        self.path, self.columns = name, dataset.column_names
        self.has_column = self.columns.__contains__
        kinds = {name: getattr(kind, "dtype", "") for name, kind in dataset.features.items()}
        self.text_columns = [name for name in kinds if kinds[name] in ("string", "large_string")]


class Filtered:
    """The documents of a corpus for whose `key_of` the predicate `is_wanted` holds."""

    def __init__(self, corpus, is_wanted):
        self.corpus, self.is_wanted = corpus, is_wanted

    def __iter__(self):
        return (document for document in self.corpus if self.is_wanted(key_of(document)))


class Truncated:
    """The documents of a corpus; those whose `key_of` is `key` are cut after `n` characters."""

    def __init__(self, corpus, key, n):
        self.corpus, self.key, self.n = corpus, key, n

    def __iter__(self):
        for document in self.corpus:
            yield Span(document, 0, self.n) if key_of(document) == self.key else document


class Span:
    """The characters [first, last) of a document, in pieces."""

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
    """Yield the text of all documents in order, in strings of bounded length."""
    for document in documents:
        yield from [document] if isinstance(document, str) else document


# ----------------------------------------------------------------------------- splitting


def split_documents(corpus, share):
    """Split a corpus for training and validation; `share` is the fraction for validation.

    Documents are assigned by a hash of their text: equal documents are on the same side, and their
    order does not matter. A single document is split at its end. So is the largest of fewer than
    `FEW` documents if it has more than half of the text; the others are then for training.

    Returns {"train": …, "val": …}. Raises `UserError` if there are no documents, or if all are
    equal.
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
                "train": Truncated(corpus, largest, n),
                "val": [Span(whole, n, sizes[largest])],
            }
    if len(keys) == COUNTED:
        bound = int(share * 2**64)
    elif len(different) == 1:
        raise UserError(f"all {len(keys)} documents are equal; add others, for validation")
    else:
        count = min(max(1, math.ceil(share * len(different))), len(different) - 1)
        bound = different[count]
    return {
        "train": Filtered(corpus, lambda key: key >= bound),
        "val": Filtered(corpus, lambda key: key < bound),
    }


def key_of(document):
    """A 64-bit hash of the first million characters of a document."""
    text = document if isinstance(document, str) else next(iter(document), "")
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def sample_evenly(documents, megabytes):
    """Yield pieces of the documents' text, spread evenly, with a total of about `megabytes` MB."""
    size = sum(len(piece.encode("utf-8", "surrogatepass")) for piece in pieces(documents))
    share, taken, seen = min(1.0, megabytes * 1e6 / max(1, size)), 0, 0
    for piece in pieces(documents):
        seen += len(piece)
        wanted = int(seen * share) - taken  # characters to take from this piece
        if wanted > 0:
            yield piece[:wanted]
            taken += min(wanted, len(piece))


# ----------------------------------------------------------------------------- finding files


def find_files(sources):
    """Return the files that `sources` names: paths, folders and patterns, separated by commas.

    Hidden files in folders are skipped. Returns [] if `sources` looks like a data set on the hub.
    Raises `UserError` for a path that does not exist.
    """
    found = []
    listed = [part.strip() for part in sources.split(",") if part.strip()]
    if sources == "-":
        raise UserError("standard input can be read only once; save it to a file: --input=PATH")
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
                raise UserError(f"{source} is a broken link")
            if "://" in source:
                raise UserError(f"{source} is a URL; download it first, then --input=PATH")
            is_a_file = suffix_of(path) in {*TABLES, ".txt", ".md", ".py"}
            name_of_a_set = source == sources and source.count("/") <= 1 and not is_a_file
            if name_of_a_set and not path.exists() and not glob.has_magic(source):
                return []
            raise UserError(f"there are no files at {source}")
        found += files
    return list({os.path.realpath(file): file for file in reversed(found)}.values())[::-1]


def files_in(folder):
    """All files in a folder, sorted, except hidden files and those of prepared data sets."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    made = {file.parent for file in files if file.name == "meta.json"}
    made &= {file.parent for file in files if file.name == "train.bin"}
    return [
        file
        for file in files
        if not (file.parent in made and file.name in DATA_SET_FILES)
        and not is_clutter(file.relative_to(folder))
    ]


def load_documents(source):
    """Load a `datasets.Dataset` from the hub, a file, or a folder of files of one kind. A document
    is a line of .jsonl, a row of .parquet (its column `text`) or a whole .txt file.

    Raises `UserError` if it cannot be loaded.
    """
    if not (files := find_files(source)):
        return load(source, num_proc=cores())
    kinds = {KINDS.get(suffix_of(file), "text") for file in files}
    if len(kinds) != 1:
        raise UserError(f"{source} has files of several kinds: {', '.join(kinds)}; name one kind")
    kind = kinds.pop()
    options = {"sample_by": "document"} if kind == "text" else {}
    return load(kind, data_files=list(map(str, files)), **options)
