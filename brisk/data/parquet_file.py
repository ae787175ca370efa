"""Read parquet files."""

from contextlib import contextmanager

from brisk.data.raw_files import EmptyFile, ZipMember, blocks
from brisk.errors import UserError, format_bytes

STRINGS = ("string", "large_string", "string_view")
LARGEST_MEMBER = 2**30  # bytes of a parquet file in a zip archive, which is read into memory


class ParquetFile:
    """The rows of a parquet file, read a thousand at a time."""

    def __init__(self, path, encoding="auto"):
        self.path = path
        with self.opened() as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
        self.columns = schema.names
        kinds = {field.name: getattr(field.type, "value_type", field.type) for field in schema}
        nested = {field.name for field in schema if field.type.num_fields}
        self.kinds = {field.name: field.type for field in schema}
        self.text_columns = [n for n in kinds if str(kinds[n]) in STRINGS and n not in nested]
        if not count:
            raise EmptyFile(f"{path} has no rows")
        if len(kinds) < len(self.columns):
            raise UserError(f"{path} has two columns with the same name; rename one of them")

    def has_column(self, column):
        return column in self.columns

    def texts(self, column):
        """Yield the values of `column`; null rows are skipped."""
        if column not in self.text_columns:
            kind = self.kinds[column]
            raise UserError(f"{self.path}: the column {column} is {kind}, not text")
        with self.opened() as file:
            for batch in file.iter_batches(1000, columns=[column]):
                yield from (text for text in batch.column(0).to_pylist() if text is not None)

    @contextmanager
    def opened(self):
        """A context with the `pyarrow.parquet.ParquetFile`. Its errors become `UserError`."""
        try:
            import pyarrow
            from pyarrow.parquet import ParquetFile
        except ImportError as error:
            raise UserError("parquet files need pyarrow: pip install pyarrow") from error
        source = str(self.path)
        if isinstance(self.path, ZipMember):
            if self.path.info.file_size > LARGEST_MEMBER:
                most = format_bytes(LARGEST_MEMBER)
                raise UserError(f"{self.path} is larger than {most}; unpack the archive first")
            source = pyarrow.BufferReader(b"".join(blocks(self.path)))
        try:
            with ParquetFile(source) as file:
                yield file
        except (pyarrow.ArrowException, OSError, UnicodeError) as error:
            raise UserError(f"cannot read {self.path}: {error}") from error
