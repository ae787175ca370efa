"""Tables in csv and tsv files, as people and spreadsheets write them."""

import csv
import sys
from collections import deque
from itertools import islice

from brisk.data.raw_files import EmptyFile, suffix_of
from brisk.data.text_files import Lines, TextFile
from brisk.errors import UserError

SEPARATORS = [",", ";", "\t", "|"]
PEEKED = 100  # rows by which the separator and the columns of text are found


class CsvFile:
    """The rows of a csv or tsv file with a header, as dicts.

    Fields are separated by commas (tabs in a .tsv), or by whichever of ; tab | its first rows
    agree on. Quotes, separators and line breaks inside fields are read right (RFC 4180). Rows that
    have another number of fields than the header, or a quote that does not end, are left out, and
    told.
    """

    def __init__(self, path, encoding="auto"):
        self.text, self.told = TextFile(path, encoding), False
        self.path = self.text.path
        default = "\t" if suffix_of(self.path) == ".tsv" else ","
        self.skipped, self.delimiter = 0, default
        first = next(iter(Lines(self.text)), "")
        if first.startswith("sep=") and len(first) == 5:  # a line of Excel's
            self.skipped, self.delimiter = 1, first[4]
        else:
            self.delimiter = max(
                sorted(SEPARATORS, key=lambda separator: separator != default), key=self.agreement
            )
        if self.delimiter != default:
            print(f"{path}: fields are separated by {self.delimiter!r}", file=sys.stderr)
        self.columns = next(self.read(), None)
        if not self.columns:
            raise EmptyFile(f"{path} is empty")
        names = [name for name in self.columns if name]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UserError(f"{path} has two columns named {twice[0]}; rename one of them")

    def agreement(self, separator):
        """The share of the first rows that have as many fields as the header, by this separator;
        0 where the header has one field."""
        rows = [row for row in islice(self.read(separator), PEEKED) if row != []]
        if not rows or not rows[0] or len(rows[0]) == 1:
            return 0
        return sum(row is not None and len(row) == len(rows[0]) for row in rows) / len(rows)

    @property
    def text_columns(self):
        """The columns with texts that are no numbers in the first rows."""
        rows = list(islice(self, PEEKED))
        if not rows:
            raise EmptyFile(f"{self.path} has a header and no rows")
        named = [column for column in self.columns if column]
        found = [c for c in named if any(not is_number(row[c]) for row in rows)]
        return found or (named if len(named) == 1 else [])

    def texts(self, column):
        return (row[column] for row in self)

    def read(self, delimiter=None):
        """Lists of the fields of each row, the header too; None for a row that is malformed."""
        delimiter = delimiter or self.delimiter
        csv.field_size_limit(2**24)  # characters; so far reaches a quote that does not end
        lines, again, self.line, start = (
            islice(Lines(self.text, "\n"), self.skipped, None),
            deque(),
            0,
            1,
        )
        while True:
            taken = []  # the lines of this row
            source = remembered(taken, again, lines)
            try:
                row = next(csv.reader(source, delimiter=delimiter, strict=True))
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


def is_number(field):
    try:
        return not field.strip() or float(field.replace(",", ".")) is not None
    except ValueError:
        return False


def remembered(taken, ahead, lines):
    """The lines of the deque `ahead`, which is emptied, then `lines`; each is noted in `taken`."""
    while ahead:
        taken.append(ahead.popleft())
        yield taken[-1]
    for line in lines:
        taken.append(line)
        yield line
