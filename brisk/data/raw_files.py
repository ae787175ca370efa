"""Read the bytes of files, of compressed files, and of members of zip archives."""

import hashlib
import os
import stat
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath

from brisk.data.file_kinds import HEAD, kind_of_file, kind_of_zip, refusal
from brisk.errors import UserError, format_bytes

PIECE = 2**20  # bytes read at a time
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip"}
# First bytes of compressed files, for files without a telling suffix.
SIGNATURES = [
    (b"\x1f\x8b\x08", "gzip"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
]
ZIP = (b"PK\x03\x04", b"PK\x05\x06")
# Text compresses to about a twentieth. A much higher ratio indicates a decompression bomb.
LARGEST_RATIO, HARMLESS = 300, 2**28


class EmptyFile(UserError):
    """A file without documents: an error if it is the only one, else skipped."""


class NotText(UserError):
    """A binary file from which no text can be extracted."""


@dataclass(frozen=True)
class ZipMember:
    """A file in a zip archive, read without unpacking it. Printed as archive.zip/name."""

    archive: Path
    info: zipfile.ZipInfo

    def __str__(self):
        return f"{self.archive}/{self.info.filename}"

    def __hash__(self):
        return hash((self.archive, self.info.header_offset))

    @property
    def path(self):
        return PurePosixPath(self.info.filename)

    name = property(lambda self: self.path.name)
    suffix = property(lambda self: self.path.suffix)
    suffixes = property(lambda self: self.path.suffixes)


def suffix_of(path):
    """The suffix of a path before that of its compression: .jsonl of a.jsonl.gz."""
    ends = [end.lower() for end in path.suffixes]
    while len(ends) > 1 and ends[-1] in COMPRESSED:
        ends.pop()
    return ends[-1] if ends else ""


# ----------------------------------------------------------------------------- reading


def blocks(path):
    """Yield the decompressed bytes of a file in blocks, and an empty block at the end.

    Raises `UserError` if the file cannot be read to its end.
    """
    try:
        with open_raw(path) as packed, decompressed(packed, path) as file:
            size, length = packed_size(path), 0
            while block := file.read(PIECE):
                length += len(block)
                if length > max(HARMLESS, size * LARGEST_RATIO):
                    raise UserError(
                        f"{path} ({format_bytes(size)}) expands to more than {LARGEST_RATIO} times "
                        "its size; decompress it first if that is intended"
                    )
                yield block
            yield b""
    except UserError:
        raise
    except (OSError, EOFError, ValueError) as error:  # from the file or a decompressor
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path}: {reason}") from error
    except Exception as error:  # zlib, lzma, zipfile and zstd raise different exceptions
        raise UserError(f"cannot read {path}: it is damaged ({error})") from error


def open_raw(path):
    """Open a file, or a member of an archive, in binary mode."""
    if isinstance(path, ZipMember):
        return opened_zip(path.archive).open(path.info)
    if os.path.exists(path) and not os.path.isdir(path):
        refuse_special(path)
    return open(path, "rb")


def refuse_special(path):
    """Raise `UserError` for a FIFO, a socket or a device: reading might block, or never end."""
    if not os.path.isfile(path):
        raise UserError(f"{path} is not a regular file; save its text to a file first")


def packed_size(path):
    return path.info.compress_size if isinstance(path, ZipMember) else os.path.getsize(path)


def decompressed(file, path):
    """Wrap `file` in a decompressor if its name or its first bytes indicate compression."""
    from fsspec.compression import compr  # a dependency of torch
    from fsspec.utils import infer_compression

    head = file.read(8)
    file.seek(0)
    if head.startswith(ZIP) or str(path).lower().endswith(".zip"):
        if isinstance(path, ZipMember):
            raise UserError(f"{path} is an archive inside an archive; unpack it first")
        return blocks_of_only_member(path)
    method = infer_compression(str(path).lower())
    method = method or next((name for start, name in SIGNATURES if head.startswith(start)), None)
    if method is None:
        return file
    if method not in compr:
        raise UserError(f"cannot read {path}: {method} needs a package: pip install zstandard")
    return compr[method](file, mode="rb")


def first_bytes(path):
    """The first `HEAD` bytes of a file, decompressed."""
    head = b""
    for block in blocks(path):
        head += block
        if len(head) >= HEAD:
            break
    return head[:HEAD]


def refuse_binary(path):
    """Raise `UserError` if the first bytes of a file are those of a binary format."""
    if kind := kind_of_file(first_bytes(path)):
        raise (UserError if kind[1] else NotText)(refusal(path, *kind))


def bytes_of(path):
    """Yield the bytes of a file in blocks, without decompression."""
    with open(path, "rb") as file:
        while block := file.read(PIECE):
            yield block


def checksum(path):
    """The SHA-256 of a file, in hex."""
    digest = hashlib.sha256()
    for block in bytes_of(path):
        digest.update(block)
    return digest.hexdigest()


# ----------------------------------------------------------------------------- zip archives


def is_zip(path):
    try:
        with open_raw(path) as file:
            return file.read(4) in ZIP
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


@lru_cache(maxsize=16)
def open_zip(path, _stamp):
    return zipfile.ZipFile(path)


def opened_zip(path):
    """The `ZipFile` of an archive. It stays open, as its members are read one by one."""
    status = os.stat(path)
    return open_zip(str(path), (status.st_size, status.st_mtime_ns))


def members_of(path):
    """Return the files in a zip archive as `ZipMember`s, sorted by name.

    Skips hidden files and those that macOS adds. Raises `UserError` for an archive that is damaged,
    empty or encrypted, and for documents in zip-based formats.
    """
    try:
        infos = [info for info in opened_zip(path).infolist() if is_regular(info)]
    except Exception as error:  # a damaged archive can raise any exception
        raise UserError(f"cannot read {path}: {error}") from error
    if kind := kind_of_zip({info.filename for info in infos}):
        raise UserError(refusal(path, *kind))
    infos = [info for info in infos if not is_clutter(PurePosixPath(info.filename))]
    if not infos:
        raise UserError(f"{path} is an empty archive")
    if any(info.flag_bits & 1 for info in infos):
        raise UserError(f"{path} is encrypted; unpack it first")
    return [ZipMember(Path(path), info) for info in sorted(infos, key=lambda i: i.filename)]


def is_regular(info):
    """Whether a member is a file, not a folder or a symbolic link."""
    return info.filename[-1:] not in ("", "/") and not stat.S_ISLNK(info.external_attr >> 16)


def is_clutter(path):
    return any(part == "__MACOSX" or (part.startswith(".") and part != "..") for part in path.parts)


def blocks_of_only_member(path):
    """Open the only member of a zip archive. Raises `UserError` if there are several."""
    members = members_of(path)
    if len(members) > 1:
        raise UserError(f"{path} has {len(members)} files; unpack it and name one of them")
    return decompressed(open_raw(members[0]), members[0])
