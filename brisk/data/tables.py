"""Tables with a column of texts: csv files, and whatever the `datasets` library reads, in files
and on the Hugging Face hub. Each can be gone through again and again, a thousand rows at a time.
"""

import csv
import logging
import sys
from collections import deque
from itertools import islice
from pathlib import Path

from brisk.data.text_files import Lines, TextFile
from brisk.errors import UserError

TABLES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}


def suffix_of(path):
    """The suffix that says what is in a file, not how it is compressed: .jsonl of a.jsonl.gz"""
    ends = [end.lower() for end in path.suffixes]
    while len(ends) > 1 and ends[-1] in COMPRESSED:
        ends.pop()
    return ends[-1] if ends else ""


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
        lines, again, self.line, start = iter(Lines(self.text, "\n")), deque(), 0, 1
        while True:
            taken = []  # the lines of this row
            source = remembered(taken, again, lines)
            try:
                row = next(csv.reader(source, delimiter=self.delimiter, strict=True))
            except StopIteration:
                return
            except csv.Error as error:
                row = None
                if "expected after" not in str(error):  # a quote without end costs its line only
                    again.extendleft(reversed(taken[1:]))
                    del taken[1:]
            self.line, start = start, start + len(taken)
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


def remembered(taken, ahead, lines):
    """The lines of the deque `ahead`, which is emptied, then `lines`; each is noted in `taken`."""
    while ahead:
        taken.append(ahead.popleft())
        yield taken[-1]
    for line in lines:
        taken.append(line)
        yield line


class Column:
    """The texts in one column of a `CsvFile`."""

    def __init__(self, table, column):
        self.table, self.column = table, column
        table.need(column)

    def __iter__(self):
        return (row[self.column] for row in self.table)


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


def load_rows(kind, *files):
    """A `datasets.IterableDataset` of the rows of .jsonl or .parquet files, read as they come."""
    return load(kind, data_files=[str(file) for file in files], streaming=True)


def load(name, **options):
    """`datasets.load_dataset(name, …)` with its failures in one line."""
    where = (options.get("data_files") or [name])[0]
    try:
        from datasets import load_dataset

        for library in ("datasets", "huggingface_hub"):
            logging.getLogger(library).setLevel(logging.CRITICAL)  # told below, in one line
        dataset = load_dataset(name, split="train", **options)
        columns = dataset.column_names or next(iter(dataset), {})
    except Exception as error:  # datasets and its file readers raise of every kind
        if "data_files" in options:
            raise UserError(f"cannot read {where}: {error.__cause__ or error}") from error
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
