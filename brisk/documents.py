"""Documents in files of any kind, compressed or not, or in a data set of the Hugging Face hub.

Whatever it is read from, a corpus is a collection that can be gone through again and again, and
a document is a string, or a `TextFile` where it may be larger than memory: so nothing here holds
more of a corpus than a thousand rows, or a million characters.
"""

import csv
import glob
import hashlib
import logging
import math
import sys
from itertools import islice
from pathlib import Path

from brisk.errors import UserError
from brisk.rawtext import TextFile
from brisk.tokenizing import cores

TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}
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
        if not sources:
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


class Rows:
    """The texts in one column of a `datasets` data set; rows without one are left out."""

    def __init__(self, dataset, column, name):
        self.dataset, self.column, self.name = dataset, column, name
        columns = dataset.column_names or list(next(iter(dataset), {}))
        if column not in columns:
            raise UserError(f"{name} has no column {column}, it has {', '.join(columns) or 'none'}")

    def __len__(self):
        return len(self.dataset)  # a TypeError where it is read as it comes

    def __iter__(self):
        try:
            for rows in self.dataset.iter(batch_size=1000):
                for text in rows[self.column]:
                    if isinstance(text, str):
                        yield text
                    elif text is not None:
                        raise UserError(f"{self.name}: the column {self.column} holds no text")
        except UserError:
            raise
        except Exception as error:  # datasets and its file readers raise of every kind
            raise UserError(f"cannot read {self.name}: {error.__cause__ or error}") from error


class CsvFile:
    """The rows of a csv or tsv file with a header, as dicts.

    Quotes, commas and line breaks inside fields are read right (RFC 4180). Rows that have another
    number of fields than the header, or a quote that does not end, are left out, and told.
    """

    def __init__(self, path, encoding="auto"):
        self.text, self.told = TextFile(path, encoding), False
        self.delimiter = "\t" if suffix_of(Path(path)) == ".tsv" else ","
        self.columns = next(self.read(), None)
        if not self.columns:
            raise UserError(f"{path} is empty")

    def read(self):
        """Lists of the fields of each row, the header too; None for a row that is malformed."""
        csv.field_size_limit(2**24)  # characters; so far reaches a quote that does not end
        reader = csv.reader(Lines(self.text, "\n"), delimiter=self.delimiter, strict=True)
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error:
                row = None
            self.line = reader.line_num
            yield row

    def __iter__(self):
        malformed, first = 0, None
        for fields in islice(self.read(), 1, None):
            if fields is not None and len(fields) == len(self.columns):
                yield dict(zip(self.columns, fields, strict=True))
            elif fields != []:  # an empty line is no row
                malformed, first = malformed + 1, first or self.line
        if malformed and not self.told:
            self.told = True
            what = f"{malformed} malformed rows, the first at line {first}"
            print(f"{self.text.path}: left out {what}", file=sys.stderr)

    def need(self, column):
        if column not in self.columns:
            columns = ", ".join(self.columns)
            raise UserError(f"{self.text.path} has no column {column}, it has {columns}")


class Column:
    """The texts in one column of a `CsvFile`."""

    def __init__(self, table, column):
        self.table, self.column = table, column
        table.need(column)

    def __iter__(self):
        return (row[self.column] for row in self.table)


class Lines:
    """The lines of a text that are not empty; with `end`, all of them, each followed by it."""

    def __init__(self, text, end=""):
        self.text, self.end = text, end

    def __iter__(self):
        rest = ""
        for piece in self.text:
            *lines, rest = (rest + piece).split("\n")
            yield from (line + self.end for line in lines if line or self.end)
        if rest:
            yield rest + self.end


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
    keys = sorted(map(key_of, islice(corpus, COUNTED)))
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
        count = min(max(1, math.ceil(share * len(keys))), len(keys) - 1)
        bound = keys[count]
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
    """Pieces of the documents' text, spread evenly over it, of at most so many million
    characters."""
    most = int(megabytes * 1e6)
    total = sum(map(len, pieces(documents)))
    share, taken, seen = min(1.0, most / max(1, total)), 0, 0
    for piece in pieces(documents):
        seen += len(piece)
        wanted = int(seen * share) - taken  # what is due at this place
        if wanted > 0:
            yield piece[: min(wanted, most - taken)]
            taken += min(wanted, len(piece), most - taken)


# ----------------------------------------------------------------------------- finding files


def find_files(sources):
    """The files that paths, folders and patterns, separated by commas, stand for, in order;
    none where `sources` looks like the name of a data set on the hub. Hidden ones are left out."""
    found = []
    for source in [sources] if Path(sources).exists() else sources.split(","):
        path = Path(source)
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            files = [file for file in files if not is_hidden(file.relative_to(path))]
        elif path.exists():
            files = [path]
        else:
            files = sorted(map(Path, glob.glob(source, recursive=True)))
            files = [file for file in files if file.is_file()]
        if not files:
            name_of_a_set = source == sources and source.count("/") <= 1 and not path.suffix
            if name_of_a_set and not path.exists() and not glob.has_magic(source):
                return []
            raise UserError(f"there are no files at {source}")
        found += files
    return list(dict.fromkeys(found))


def is_hidden(path):
    return any(part.startswith(".") for part in path.parts)


def suffix_of(path):
    """The suffix that says what is in a file, not how it is compressed: .jsonl of a.jsonl.gz"""
    ends = [end.lower() for end in path.suffixes]
    while len(ends) > 1 and ends[-1] in COMPRESSED:
        ends.pop()
    return ends[-1] if ends else ""


# ----------------------------------------------------------------------------- through datasets


def load_rows(kind, *files):
    """A `datasets.IterableDataset` of the rows of .jsonl or .parquet files, read as they come."""
    return load(kind, data_files=[str(file) for file in files], streaming=True)


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


def load(name, **options):
    """`datasets.load_dataset(name, …)` with its failures in one line."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # told below, in one line
    where = (options.get("data_files") or [name])[0]
    try:
        from datasets import load_dataset

        dataset = load_dataset(name, split="train", **options)
        columns = dataset.column_names or next(iter(dataset), {})
    except Exception as error:  # datasets and its file readers raise of every kind
        needs = "this needs the package datasets, and the network or files of yours"
        raise UserError(f"no {where}: {error.__cause__ or error} ({needs})") from error
    if not columns:
        raise UserError(f"{where} is empty")
    return dataset


def files_on_hub(repository, folder):
    """The names of the files in a folder of a data set on the Hugging Face hub."""
    return ask_hub(
        f"no list of the files of {repository}",
        lambda hub: [
            name
            for name in sorted(hub.HfApi().list_repo_files(repository, repo_type="dataset"))
            if name.startswith(folder)
        ],
    )


def download_from_hub(repository, name, folder):
    """The path of a file of a data set on the hub, downloaded to `folder`; a download that was
    stopped goes on."""
    return ask_hub(
        f"no {name} of {repository}",
        lambda hub: Path(
            hub.hf_hub_download(repository, name, repo_type="dataset", local_dir=folder)
        ),
    )


def ask_hub(failure, question):
    try:
        import huggingface_hub

        return question(huggingface_hub)
    except Exception as error:  # no network, no room, no such file, no such package
        reason = f"{type(error).__name__}: {error}"
        mend = "run this again when there is a network, or give files of your own"
        raise UserError(f"{failure} ({reason}); {mend}") from error
