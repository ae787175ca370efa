"""The document index matches a scan, and is rebuilt when it does not match its token file."""

import os
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from brisk.data import document_index as module
from brisk.data.dataset import write_dataset
from brisk.data.document_index import describe, document_index, find_documents, save
from brisk.data.loader import TokenFile
from brisk.data.tokenizer import CharTokenizer

EOT = 9
TOKENS = np.array([1, EOT, 2, 3, EOT, EOT, 4, 5, 6, EOT, EOT, 7, 8, EOT, 1, 2] * 3)


def by_definition(tokens, eot=EOT):
    """The documents, found token by token."""
    found, first = [], 0
    for at, token in enumerate(tokens):
        if token == eot:
            found += [[first, at + 1]] if at > first else []
            first = at + 1
    return found


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", 8)


@pytest.fixture
def path(tmp_path):
    TOKENS.astype("<u2").tofile(tmp_path / "train.bin")
    return tmp_path / "train.bin"


@pytest.fixture
def index(path):
    """Build the index of `path`. Returns its path."""
    assert open_documents(path) == by_definition(TOKENS)
    return path.with_name("train.documents.idx")


def open_documents(path, eot=EOT):
    return document_index(path, np.memmap(path, "<u2", "r"), eot).tolist()


def files(path):
    return sorted(os.listdir(path.parent))


# ----------------------------------------------------------------------------- contents


@given(tokens=st.lists(st.integers(7, EOT), min_size=1, max_size=60), piece=st.integers(1, 70))
def test_documents_are_independent_of_pieces(tokens, piece):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", piece)
        found = np.concatenate(list(find_documents(np.array(tokens), EOT)))
    assert found.tolist() == by_definition(tokens) and found.shape == (len(found), 2)


def test_batches_match_a_scan(path, monkeypatch):
    files = [TokenFile(path, 3, 10, rows="documents", eot=EOT) for _ in range(2)]  # built, opened
    monkeypatch.setattr(module, "PIECE", 1000)
    files.append(TokenFile(path, 3, 10, rows="documents", eot=EOT))  # without an index
    batches = [file.batch(5, 20) for file in files]
    for x, y in batches:
        assert torch.equal(x, batches[2][0]) and torch.equal(y, batches[2][1])
    assert len({file.targets(5, 20) for file in files}) == 1


def test_index_is_opened_without_a_scan(index, path, monkeypatch):
    monkeypatch.setattr(module, "find_documents", None)
    assert open_documents(path) == by_definition(TOKENS)


def test_scan_takes_bounded_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 2**16)
    np.tile(TOKENS, 2**22 // len(TOKENS)).astype("<u2").tofile(tmp_path / "train.bin")
    tracemalloc.start()
    try:
        TokenFile(tmp_path / "train.bin", 8, 10, rows="documents", eot=EOT)
        assert tracemalloc.get_traced_memory()[1] < 2**22  # bytes; there are 2^22 tokens
    finally:
        tracemalloc.stop()


def test_small_file_has_no_index(path, monkeypatch):
    monkeypatch.setattr(module, "PIECE", len(TOKENS))
    assert open_documents(path) == by_definition(TOKENS)
    assert files(path) == ["train.bin"]


# ----------------------------------------------------------------------------- rebuilding


def test_changed_tokens(index, path):
    changed = TOKENS.astype("<u2")
    changed[7] = EOT  # a new end of a document; the old ones are unchanged
    changed.tofile(path)
    os.utime(path, ns=(0, 0))
    assert open_documents(path) == by_definition(changed)


def test_index_follows_the_checksum(tmp_path):
    """With a meta.json, a copy of the data reuses the index, and other data does not."""
    tokenizer = CharTokenizer(list("abcdefgh"), eot=True)
    path = tmp_path / "train.bin"

    def prepare(*documents):
        splits = {"train": documents, "val": ["abc"]}
        write_dataset(tmp_path, tokenizer, splits, "letters", end_documents=True)
        os.utime(path, ns=(0, 0))
        return open_documents(path, tokenizer.eot)

    first = prepare("abcdefgh", "abc")
    index = path.with_name("train.documents.idx")
    before = index.stat().st_ino
    os.utime(path, ns=(1, 1))
    assert open_documents(path, tokenizer.eot) == first == [[0, 9], [9, 13]]
    assert index.stat().st_ino == before
    assert prepare("abc", "abcdefgh") == [[0, 4], [4, 13]]


def test_tokens_not_matching_the_checksum(tmp_path):
    """For example, a .bin file replaced by hand."""
    tokenizer = CharTokenizer(list("abcdefgh"), eot=True)
    splits = {"train": ["abcdefgh", "abc"], "val": ["abc"]}
    write_dataset(tmp_path, tokenizer, splits, "letters", end_documents=True)
    path = tmp_path / "train.bin"
    open_documents(path, tokenizer.eot)
    tokens = np.roll(np.fromfile(path, "<u2"), 2)
    tokens.tofile(path)
    assert open_documents(path, tokenizer.eot) == by_definition(tokens, tokenizer.eot)


def test_another_end_of_text(index, path):
    assert open_documents(path, eot=7) == by_definition(TOKENS, eot=7)


def test_another_dtype(index, path):
    tokens = np.memmap(path, "<u4", "r")
    assert document_index(path, tokens, EOT).tolist() == by_definition(tokens)


def test_identities_are_distinct(path):
    narrow, wide = np.memmap(path, "<u2", "r"), np.memmap(path, "<u4", "r")
    before = [describe(path, narrow, EOT), describe(path, narrow, 7), describe(path, wide, EOT)]
    os.utime(path, ns=(0, 0))
    assert len({*before, describe(path, narrow, EOT)}) == 4


def test_damaged_index(index, path):
    whole = index.read_bytes()
    damaged = [whole[:n] for n in range(len(whole))] + [whole + bytes(n) for n in (1, 16)]
    for at in range(len(whole)):
        damaged.append(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    for content in damaged:
        index.write_bytes(content)
        assert open_documents(path) == by_definition(TOKENS)
        assert index.read_bytes() == whole and files(path) == ["train.bin", index.name]


HUGE = 2**63 - 1
HOSTILE = [
    [[0, HUGE]],
    [[-HUGE, 5]],
    [[0, 5], [2, 10]],  # overlap
    [[6, 10], [2, 5]],  # order
    [[5, 5]],
    [[10, 6]],
    [[HUGE, -HUGE]],
    [[0, 2], [2, len(TOKENS) + 1]],
    [[0, 3]],  # ends elsewhere
]


@pytest.mark.parametrize("documents", HOSTILE)
def test_hostile_index(index, path, documents):
    """With a valid checksum."""
    save(index, describe(path, np.memmap(path, "<u2", "r"), EOT), [np.array(documents)])
    assert open_documents(path) == by_definition(TOKENS)


def test_file_without_documents_has_no_index(tmp_path):
    path = tmp_path / "train.bin"
    np.ones(100, dtype="<u2").tofile(path)
    assert open_documents(path) == open_documents(path) == []


# ----------------------------------------------------------------------------- writing


def test_read_only_folder(path, monkeypatch):
    def refuse(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", refuse)
    assert open_documents(path) == by_definition(TOKENS)
    assert files(path) == ["train.bin"]


def test_index_path_is_a_folder(path):
    path.with_name("train.documents.idx").mkdir()
    assert open_documents(path) == by_definition(TOKENS)
    assert files(path) == ["train.bin", "train.documents.idx"]


def test_nested_saves(index):
    """As if in two processes: each writes a separate file, and the last to finish remains."""

    def pieces():
        save(index, b"inner", [np.array([[0, 2]])])
        yield np.array([[0, 5]])

    save(index, b"outer", pieces())
    assert index.read_bytes()[:16] == np.array([0, 5], "<i8").tobytes()
    assert files(index) == ["train.bin", index.name]


def test_concurrent_builds(tmp_path):
    path = tmp_path / "train.bin"
    tokens = np.tile(TOKENS, 20)
    tokens.astype("<u2").tofile(path)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(open_documents, [path] * 16))
    assert all(documents == by_definition(tokens) for documents in found)
    assert files(path) == ["train.bin", "train.documents.idx"]
