"""Documents in jsonl and json files: an object or a string on each line, or an array of them."""

import json
from itertools import islice

from brisk.data.raw_files import EmptyFile, suffix_of
from brisk.data.text_files import Lines, TextFile
from brisk.errors import UserError

LARGEST = 2**27  # characters of a json file that is one array: all of it is in memory
PEEKED = 100  # rows by which the columns are found


class JsonFile:
    """The rows of a jsonl file, or of a json file that is one array; a json file with an object on
    each line is read as jsonl.

    Raises `UserError`, with the line, for what is no JSON.
    """

    def __init__(self, path, encoding="auto"):
        self.path, self.text = path, TextFile(path, encoding)
        self.is_lines = self.begins_with_a_row()
        rows = [row for _, row in islice(self.rows(), PEEKED)]
        if not rows:
            raise EmptyFile(f"{path} is empty")
        objects = [row for row in rows if isinstance(row, dict)]
        self.columns = list(dict.fromkeys(key for row in objects for key in row))
        self.text_columns = (
            [""]
            if len(objects) < len(rows)
            else [
                key for key in self.columns if any(isinstance(row.get(key), str) for row in objects)
            ]
        )

    def begins_with_a_row(self):
        """Whether the file is jsonl: not an array, and in a .json the first line is a row in itself
        and others follow."""
        line, _, rest = next(iter(self.text), "").lstrip().partition("\n")
        if suffix_of(self.path) != ".json":
            return not line.startswith("[{") and not line.strip() == "["
        if not rest.strip():
            return False
        try:
            return isinstance(json.loads(line), dict | str)
        except (ValueError, RecursionError):
            return False

    def rows(self):
        """Pairs (line, or number in the array; object or string)."""
        for number, row in self.lines() if self.is_lines else self.array():
            if not isinstance(row, dict | str):
                kind = {list: "an array", type(None): "null"}.get(type(row), "a number")
                raise UserError(f"{self.path}, {number} is {kind}, not an object or a string")
            yield number, row

    def lines(self):
        lines = enumerate(Lines(self.text, "\n"), start=1)
        for number, line in lines:
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "it has bytes of zero" if "\0" in line else f"it is no JSON ({error})"
                if not any(later.strip() for _, later in lines):
                    reason += "; it is the last line, is the file whole?"
                raise UserError(f"{self.path}, line {number}: {reason}") from error

    def array(self):
        text = ""
        for piece in self.text:
            text += piece
            if len(text) > LARGEST:
                raise UserError(
                    f"{self.path} is one array of more than {LARGEST // 10**6} MB; make it jsonl: "
                    f"jq -c '.[]' {self.path} > new.jsonl"
                )
        if not text.strip():
            return
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            raise UserError(f"{self.path}, line {line}: it is no JSON ({error})") from error
        rows = rows if isinstance(rows, list) else [rows]
        yield from ((f"item {number}", row) for number, row in enumerate(rows, start=1))

    def has_column(self, column):
        """Whether any row has it: the first ones need not."""
        return column in self.columns or any(column in row for _, row in self.rows())

    def texts(self, column):
        """The strings themselves, or the values of `column`; rows without one are left out."""
        for number, row in self.rows():
            if isinstance(row, str) != (column == ""):
                raise UserError(f"{self.path}, {number}: some rows are objects, others strings")
            text = row if column == "" else row.get(column)
            if isinstance(text, str):
                yield text
            elif text is not None:
                raise UserError(f"{self.path}, {number}: the column {column} holds no text")
