"""Tables with a column of texts: csv, tsv, jsonl, json and parquet files.

Each can be iterated again and again, and little of its file is in memory (a json file that is one
array: all of it). A table has a `path`, its `columns`, the `text_columns` among them, and
`texts(column)`.
"""

from brisk.data.csv_file import CsvFile
from brisk.data.json_file import JsonFile
from brisk.data.parquet_file import ParquetFile
from brisk.data.raw_files import suffix_of
from brisk.errors import UserError, note

TABLES = {".csv": CsvFile, ".tsv": CsvFile, ".jsonl": JsonFile, ".ndjson": JsonFile}
TABLES |= {".json": JsonFile, ".parquet": ParquetFile}


def table_of(path, head):
    """The class that reads a file that begins with the bytes `head`; None for a file of text."""
    if head.startswith(b"PAR1"):
        return ParquetFile
    return TABLES.get(suffix_of(path))


class Column:
    """The texts in one column of a table: the one named, else `text`, else the only one of text."""

    def __init__(self, table, column=""):
        self.table, self.column = table, choose_column(table, column)

    def __iter__(self):
        return iter(self.table.texts(self.column))


def choose_column(table, column=""):
    """The name of the column to read. Raises `UserError` where there is none, or a choice."""
    columns = ", ".join(table.columns) or "none"
    found = table.text_columns
    if column or "text" in table.columns:
        if column and not table.has_column(column):
            raise UserError(f"{table.path} has no column {column}, it has {columns}")
        return column or "text"
    if len(found) != 1:
        remedy = f"; choose one: --column={found[0]}" if found else ""
        raise UserError(f"{table.path} has no column text, it has {columns}{remedy}")
    if found[0]:  # texts without a name: an array of strings
        note(f"{table.path}: the texts are in its column {found[0]}")
    return found[0]
