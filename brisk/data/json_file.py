"""Read jsonl and json files: an object or a string on each line, or one array of them."""

import json
from itertools import islice

from brisk.data.raw_files import EmptyFile, suffix_of
from brisk.data.text_files import Lines, TextFile
from brisk.errors import UserError

LARGEST = 2**27  # characters of a json array, which is read into memory
PEEKED = 100  # first rows, from which the columns are inferred


class JsonFile:
    """The rows of a jsonl file, or of a json file that is one array. A .json file with an object on
    each line is read as jsonl.

    Raises `UserError` with the line number for invalid JSON.
    """

    def __init__(self, path, encoding="auto"):
        self.path, self.text = path, TextFile(path, encoding)
        self.is_lines = self.is_jsonl()
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

    def is_jsonl(self):
        """Whether each line is a row: not an array; and in a .json file, the first line is valid
        JSON and not the only one."""
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
        """Yield (place, row): a line number or an array index, in words, and a dict or string."""
        for number, row in self.lines() if self.is_lines else self.array():
            if not isinstance(row, dict | str):
                kind = {list: "an array", type(None): "null"}.get(type(row), "a number")
                raise UserError(f"{self.path}, {number} is {kind}, not an object or string")
            yield number, row

    def lines(self):
        lines = enumerate(Lines(self.text, "\n"), start=1)
        for number, line in lines:
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "it has zero bytes" if "\0" in line else f"it is not JSON ({error})"
                if not any(later.strip() for _, later in lines):
                    reason += "; it is the last line: the file may be incomplete"
                raise UserError(f"{self.path}, line {number}: {reason}") from error

    def array(self):
        text = ""
        for piece in self.text:
            text += piece
            if len(text) > LARGEST:
                raise UserError(
                    f"{self.path} is one array of more than {LARGEST // 10**6} MB; convert it to "
                    f"jsonl: jq -c '.[]' {self.path} > new.jsonl"
                )
        if not text.strip():
            return
        try:
            rows = json.loads(text)
        except (ValueError, RecursionError) as error:
            line = getattr(error, "lineno", 1)
            raise UserError(f"{self.path}, line {line}: it is not JSON ({error})") from error
        rows = rows if isinstance(rows, list) else [rows]
        yield from ((f"item {number}", row) for number, row in enumerate(rows, start=1))

    def has_column(self, column):
        """Whether any row has `column`. Reads all rows if the first ones do not."""
        return column in self.columns or any(column in row for _, row in self.rows())

    def texts(self, column):
        """Yield the values of `column`, or the rows themselves if they are strings (column "").
        Rows without a value are skipped."""
        for number, row in self.rows():
            if isinstance(row, str) != (column == ""):
                raise UserError(f"{self.path}, {number}: some rows are objects, others strings")
            text = row if column == "" else row.get(column)
            if isinstance(text, str):
                yield text
            elif text is not None:
                raise UserError(f"{self.path}, {number}: the column {column} is not text")
