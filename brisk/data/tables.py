"""Tables with a text column: csv, tsv, jsonl, json and parquet files.

A table has a `path`, its `columns`, its `text_columns`, and `texts(column)`, which can be called
repeatedly. Tables are read in pieces, except a json file that is one array.
"""

from brisk.data.csv_file import CsvFile
from brisk.data.json_file import JsonFile
from brisk.data.parquet_file import ParquetFile
from brisk.data.raw_files import suffix_of
from brisk.errors import UserError, note

TABLES = {".csv": CsvFile, ".tsv": CsvFile, ".jsonl": JsonFile, ".ndjson": JsonFile}
TABLES |= {".json": JsonFile, ".parquet": ParquetFile}


def table_of(path, head):
    """The class for a table that begins with the bytes `head`; None for other files."""
    if head.startswith(b"PAR1"):
        return ParquetFile
    return TABLES.get(suffix_of(path))


class Column:
    """The texts in one column of a table, see `choose_column`."""

    def __init__(self, table, column=""):
        self.table, self.column = table, choose_column(table, column)

    def __iter__(self):
        return iter(self.table.texts(self.column))


def choose_column(table, column=""):
    """Return `column` if given, else `text`, else the only text column.

    Raises `UserError` if it does not exist, or if several columns have text.
    """
    columns = ", ".join(table.columns) or "none"
    found = table.text_columns
    if column or "text" in table.columns:
        if column and not table.has_column(column):
            raise UserError(f"{table.path} has no column {column}; its columns are {columns}")
        return column or "text"
    if len(found) != 1:
        remedy = f"; choose one: --column={found[0]}" if found else ""
        raise UserError(f"{table.path} has no column text; its columns are {columns}{remedy}")
    if found[0]:  # "" for an array of strings
        note(f"{table.path}: reading the text in column {found[0]}")
    return found[0]
