"""Index of the documents in a token file, cached on disk.

The index of `train.bin` is `train.documents.idx`: for each document two little-endian int64, its
first token and one past its end-of-text token; then a SHA-256 of these pairs and of the identity of
the token file. An index that is missing or does not match its token file is built again.
"""

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

import numpy as np

from brisk.data.dataset import read_meta

FORMAT = 1
PIECE = 1 << 24  # tokens scanned at a time; a file of this size or less has no index on disk
DIGEST = hashlib.sha256().digest_size
SPOT_CHECKS = 64  # end-of-text tokens looked up when an index is opened


def document_index(path, tokens, eot):
    """Return (first, end) of each document in `tokens`, the contents of `path`: int64, (n, 2).

    `end` is one past the end-of-text token `eot`. Empty documents are left out, and so are tokens
    after the last end-of-text. For a large file the array is memory-mapped from its index, which is
    built if necessary; if the index cannot be saved, the array is in memory.
    """
    if len(tokens) <= PIECE:
        return np.concatenate(list(find_documents(tokens, eot)))
    index = Path(path).with_suffix(".documents.idx")
    identity = describe(path, tokens, eot)
    documents = load(index, identity, tokens, eot)
    if documents is None:
        with suppress(OSError):  # a read-only folder or a full disk
            save(index, identity, find_documents(tokens, eot))
            documents = load(index, identity, tokens, eot)
    if documents is None:
        documents = np.concatenate(list(find_documents(tokens, eot)))
    return documents


def find_documents(tokens, eot):
    """For each piece of `tokens`, yield the documents that end in it: int64, (n, 2)."""
    first = 0
    for at in range(0, len(tokens), PIECE):
        ends = at + 1 + np.flatnonzero(tokens[at : at + PIECE] == eot)
        firsts = np.concatenate([[first], ends])[:-1]
        yield np.stack([firsts, ends], axis=1)[ends - firsts > 1]
        first = ends[-1] if len(ends) else first


def describe(path, tokens, eot):
    """The identity of an index, as bytes: its format, the token file and `eot`.

    The token file is identified by its checksum in `meta.json`, else by its modification time.
    """
    meta, stat = read_meta(Path(path).parent), os.stat(path)
    checksum = meta and meta["splits"].get(Path(path).stem, {}).get("sha256")
    contents = checksum or stat.st_mtime_ns
    return repr((FORMAT, stat.st_size, tokens.dtype.str, contents, eot)).encode()


def save(index, identity, pieces):
    """Write the arrays `pieces` and the checksum to the file `index`, atomically."""
    temporary = index.with_name(f"{index.name}.{secrets.token_hex(8)}")  # processes may race
    digest = hashlib.sha256(identity)
    try:
        with open(temporary, "xb") as file:
            for documents in pieces:
                piece = documents.astype("<i8").tobytes()
                digest.update(piece)
                file.write(piece)
            file.write(digest.digest())
        os.replace(temporary, index)
    finally:
        temporary.unlink(missing_ok=True)


def load(index, identity, tokens, eot):
    """Memory-map the documents in the file `index`. Returns None if they are not of `identity`."""
    try:
        raw = np.asarray(np.memmap(index, dtype=np.uint8, mode="r"))
    except (OSError, ValueError):  # missing or empty
        return None
    if len(raw) <= DIGEST or (len(raw) - DIGEST) % 16:
        return None
    digest = hashlib.sha256(identity)
    digest.update(raw[:-DIGEST])
    documents = raw[:-DIGEST].view("<i8").reshape(-1, 2)
    first, end = documents.T
    # the checksum detects damage only; a forged file can have a valid one, so check bounds too
    in_order = (first < end).all() and (end[:-1] <= first[1:]).all()
    in_bounds = first[0] >= 0 and end[-1] <= len(tokens)
    if digest.digest() != raw[-DIGEST:].tobytes() or not in_order or not in_bounds:
        return None
    # the checksum of the token file is not verified at every start: look up some end-of-text ids
    some = end[:: max(1, len(end) // SPOT_CHECKS)]
    return documents if (tokens[some - 1] == eot).all() else None
