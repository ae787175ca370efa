"""Read csv and tsv files in the dialects of common spreadsheets."""

import csv
from collections import deque
from itertools import islice

from brisk.data.raw_files import EmptyFile, suffix_of
from brisk.data.text_files import Lines, TextFile
from brisk.errors import UserError, note

SEPARATORS = [",", ";", "\t", "|"]
PEEKED = 100  # first rows, from which the separator and the text columns are inferred


class CsvFile:
    """Iterable of the rows of a csv or tsv file with a header, as dicts.

    Fields are separated by commas (tabs in a .tsv), or by the one of ; tab | that splits the first
    rows most evenly. Fields may contain quotes, separators and line breaks (RFC 4180). Rows with
    an unclosed quote, or with more or fewer fields than the header, are skipped with a note.

    Raises `UserError` for an empty file, a malformed header and duplicate column names.
    """

    def __init__(self, path, encoding="auto"):
        self.text, self.noted = TextFile(path, encoding), False
        self.path = self.text.path
        default = "\t" if suffix_of(self.path) == ".tsv" else ","
        self.delimiter, self.skipped, first = default, 0, ""
        for line in Lines(self.text, "\n"):
            if first := line.strip("\n"):
                break
            self.skipped += 1  # empty lines before the header
        if first.startswith("sep=") and len(first) == 5:  # Excel writes such a line
            self.skipped, self.delimiter = self.skipped + 1, first[4]
        else:
            usual_first = sorted(SEPARATORS, key=lambda separator: separator != default)
            self.delimiter = max(usual_first, key=self.agreement)
        if self.delimiter != default:
            note(f"{path}: the field separator is {self.delimiter!r}")
        _, self.columns = next(self.read(self.delimiter), (1, []))
        if self.columns == []:
            raise EmptyFile(f"{path} is empty")
        if self.columns is None:
            raise UserError(f"{path}: the first row, the header, is malformed")
        names = [name for name in self.columns if name]
        if duplicates := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path} has two columns named {duplicates[0]}; rename one of them")

    def agreement(self, separator):
        """The fraction of the first rows with as many fields as the header if fields are separated
        by `separator`; 0 if the header has one field."""
        rows = [row for _, row in islice(self.read(separator), PEEKED) if row != []]
        if not rows or not rows[0] or len(rows[0]) == 1:
            return 0
        return sum(row is not None and len(row) == len(rows[0]) for row in rows) / len(rows)

    @property
    def text_columns(self):
        """The columns that are not numeric in the first rows."""
        rows = list(islice(self, PEEKED))
        if not rows:
            raise EmptyFile(f"{self.path} has a header but no rows")
        named = [column for column in self.columns if column]
        found = [c for c in named if any(not is_number(row[c]) for row in rows)]
        return found or (named if len(named) == 1 else [])

    def has_column(self, column):
        return column in self.columns

    def texts(self, column):
        return (row[column] for row in self)

    def read(self, delimiter):
        """Yield (line number, fields) of each row and the header; fields are None if malformed."""
        csv.field_size_limit(2**24)  # characters; bounds an unclosed quote
        lines = islice(Lines(self.text, "\n"), self.skipped, None)
        taken, ahead, start, reader = [], deque(), self.skipped + 1, None

        def source():
            while line := ahead.popleft() if ahead else next(lines, ""):
                taken.append(line)
                yield line

        while True:
            reader = reader or csv.reader(source(), delimiter=delimiter, strict=True)
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                row = reader = None
                if "expected after" not in str(error):  # unclosed quote: skip only its first line
                    ahead.extendleft(reversed(taken[1:]))
                    del taken[1:]
            yield start, row
            start += len(taken)
            taken.clear()

    def __iter__(self):
        malformed = []
        for line, fields in islice(self.read(self.delimiter), 1, None):
            if fields is not None and len(fields) == len(self.columns):
                yield dict(zip(self.columns, fields, strict=True))
            elif fields != []:  # an empty line is not a row
                malformed.append(line)
        if malformed and not self.noted:
            self.noted = True
            rows = f"{len(malformed)} malformed rows, the first at line {malformed[0]}"
            note(f"{self.path}: skipped {rows}")

    def require_column(self, column):
        if not self.has_column(column):
            columns = ", ".join(self.columns)
            raise UserError(f"{self.path} has no column {column}; its columns are {columns}")


def is_number(field):
    try:
        return not field.strip() or float(field.replace(",", ".")) is not None
    except ValueError:
        return False
