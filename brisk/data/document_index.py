"""Index of the documents in a token file, kept beside the file.

The index of `train.bin` is `train.documents.idx`: little-endian int64 pairs, the first token of a
document and one past its end-of-text, then a SHA-256 over these pairs and over what they were made
from. It is a cache: an index that does not match its token file is built again, and deleting it
costs one scan.
"""

import hashlib
import os
import secrets
from contextlib import suppress
from pathlib import Path

import numpy as np

from brisk.data.dataset import read_meta

FORMAT = 1
PIECE = 1 << 24  # tokens scanned at a time; a file of no more has no index on disk
SEAL = hashlib.sha256().digest_size
SPOT_CHECKS = 64  # end-of-text tokens looked up when an index is opened


def document_index(path, tokens, eot):
    """(first, end) of each document in `tokens`, the ids in the file `path`: int64, shape (n, 2).

    A document ends just past its end-of-text token `eot`. Documents without another token are left
    out, and so are tokens after the last end-of-text. The array of a large file is mapped from its
    index, which is built and saved first where it is missing or does not match. Where it cannot be
    saved, the array is in memory.
    """
    if len(tokens) <= PIECE:
        return np.concatenate(list(find_documents(tokens, eot)))
    index = Path(path).with_suffix(".documents.idx")
    identity = describe(path, tokens, eot)
    documents = load(index, identity, tokens, eot)
    if documents is None:
        with suppress(OSError):  # a folder that is read-only, or a full disk
            save(index, identity, find_documents(tokens, eot))
            documents = load(index, identity, tokens, eot)
    if documents is None:
        documents = np.concatenate(list(find_documents(tokens, eot)))
    return documents


def find_documents(tokens, eot):
    """Yield the documents of each piece of `tokens` that end in it, int64 of shape (n, 2)."""
    first = 0
    for at in range(0, len(tokens), PIECE):
        ends = at + 1 + np.flatnonzero(tokens[at : at + PIECE] == eot)
        firsts = np.concatenate([[first], ends])[:-1]
        yield np.stack([firsts, ends], axis=1)[ends - firsts > 1]
        first = ends[-1] if len(ends) else first


def describe(path, tokens, eot):
    """What an index is made from, in bytes: its format, the token file's contents and `eot`.

    The contents are known by the checksum in `meta.json`, else by the time of modification.
    """
    meta, stat = read_meta(Path(path).parent), os.stat(path)
    checksum = meta and meta["splits"].get(Path(path).stem, {}).get("sha256")
    contents = checksum or stat.st_mtime_ns
    return repr((FORMAT, stat.st_size, tokens.dtype.str, contents, eot)).encode()


def save(index, identity, pieces):
    """Write the arrays `pieces` and their seal to the file `index`, whole or not at all."""
    temporary = index.with_name(f"{index.name}.{secrets.token_hex(8)}")  # one for each process
    seal = hashlib.sha256(identity)
    try:
        with open(temporary, "xb") as file:
            for documents in pieces:
                piece = documents.astype("<i8").tobytes()
                seal.update(piece)
                file.write(piece)
            file.write(seal.digest())
        os.replace(temporary, index)
    finally:
        temporary.unlink(missing_ok=True)


def load(index, identity, tokens, eot):
    """The documents in the file `index`, mapped; None unless they are those of `identity`."""
    try:
        raw = np.asarray(np.memmap(index, dtype=np.uint8, mode="r"))
    except (OSError, ValueError):  # missing or empty
        return None
    if len(raw) <= SEAL or (len(raw) - SEAL) % 16:
        return None
    seal = hashlib.sha256(identity)
    seal.update(raw[:-SEAL])
    documents = raw[:-SEAL].view("<i8").reshape(-1, 2)
    first, end = documents.T
    # The seal finds damage. A file made to deceive can have a valid one: its ids are checked too.
    in_order = (first < end).all() and (end[:-1] <= first[1:]).all()
    in_bounds = first[0] >= 0 and end[-1] <= len(tokens)
    if seal.digest() != raw[-SEAL:].tobytes() or not in_order or not in_bounds:
        return None
    # The checksum in meta.json is not verified at every start: the token file may be another one.
    some = end[:: max(1, len(end) // SPOT_CHECKS)]
    return documents if (tokens[some - 1] == eot).all() else None
