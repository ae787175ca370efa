"""Writing and reading data sets, and detection of interrupted writes."""

import hashlib
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from brisk.data.bpe import BPETokenizer
from brisk.data.dataset import load_tokenizer, read_meta, split_text, write_dataset
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer
from brisk.errors import UserError

DOCUMENTS = [
    f"Document {i}.\nIt has {i * i} lines,\n\nsome of them in Grün or 你好.\n" for i in range(40)
]


def small_bpe():
    tiktoken = pytest.importorskip("tiktoken")
    merges = [b"oc", b"Doc", b"aa", b" a", b"\n\n", b"'s"]
    ranks = {bytes([i]): i for i in range(256)} | {m: 256 + i for i, m in enumerate(merges)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    return BPETokenizer(
        tiktoken.Encoding(
            "small", pat_str=pattern, mergeable_ranks=ranks, special_tokens={EOT: 262}
        )
    )


def write(directory, tokenizer, train=DOCUMENTS, val=("a",), **options):
    return write_dataset(directory, tokenizer, {"train": train, "val": val}, "here", **options)


# ----------------------------------------------------------------------------- writing and reading


def test_files_match_meta_json(tmp_path):
    tokenizer = small_bpe()
    written = write(tmp_path, tokenizer, end_documents=True, extra={"task": "reading"})
    meta = read_meta(tmp_path)
    assert meta == written == json.loads((tmp_path / "meta.json").read_text())
    assert (meta["dtype"], meta["vocab_size"], meta["task"]) == ("uint16", 263, "reading")

    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert load_tokenizer(tmp_path).decode(ids) == "".join(text + EOT for text in DOCUMENTS)
    text = "".join(DOCUMENTS)
    assert meta["splits"]["train"] == {
        "tokens": len(ids),
        "bytes": len(text.encode()),
        "characters": len(text),
        "documents": len(DOCUMENTS),
        "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
    }
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]


def test_large_vocabulary_is_uint32(tmp_path):
    characters = [chr(i) for i in range(0x11000) if not 0xD800 <= i < 0xE000]
    write(tmp_path, CharTokenizer(characters), ["".join(characters)])
    assert read_meta(tmp_path)["dtype"] == "uint32"
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u4")
    assert np.array_equal(ids, np.arange(len(characters)))


@pytest.mark.parametrize("eot", [False, True])
def test_meta_pkl_matches_nanogpt(tmp_path, eot):
    tokenizer = CharTokenizer(sorted(set("".join(DOCUMENTS))), eot)
    write(tmp_path, tokenizer, end_documents=eot)
    meta = pickle.loads((tmp_path / "meta.pkl").read_bytes())
    assert set(meta) == {"vocab_size", "itos", "stoi"}
    assert all(type(i) is int for i in [*meta["itos"], *meta["stoi"].values()])
    assert meta["vocab_size"] == len(meta["itos"]) == tokenizer.vocab_size
    ids = np.fromfile(tmp_path / "train.bin", dtype="<u2").tolist()
    text = "".join(meta["itos"][i] for i in ids)  # as nanoGPT's sample.py decodes
    assert text == "".join(document + EOT * eot for document in DOCUMENTS)

    (tmp_path / "meta.json").unlink()  # as prepared by nanoGPT
    assert read_meta(tmp_path) is None
    again = load_tokenizer(tmp_path)
    assert (again.decode(ids), again.eot) == (text, tokenizer.eot)
    (tmp_path / "meta.pkl").unlink()
    assert load_tokenizer(tmp_path) is None


def test_old_meta_pkl_is_removed(tmp_path):
    write(tmp_path, CharTokenizer(sorted(set("".join(DOCUMENTS)))))
    write(tmp_path, ByteTokenizer())
    assert not (tmp_path / "meta.pkl").exists()


def test_empty_split_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="val"):
        write_dataset(tmp_path, ByteTokenizer(), {"train": ["a"], "val": [""]}, "here")
    assert os.listdir(tmp_path) == []


def test_failure_keeps_the_old_files(tmp_path):
    write(tmp_path, ByteTokenizer())
    before = {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)}
    with pytest.raises(UserError):
        write(tmp_path, CharTokenizer("abc"), ["abc", "abd"])
    assert {file: (tmp_path / file).read_bytes() for file in os.listdir(tmp_path)} == before


def test_partial_files_are_removed(tmp_path):
    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "val.bin").write_bytes(b"half of it")
    write(tmp_path, ByteTokenizer())
    assert sorted(os.listdir(tmp_path)) == ["meta.json", "train.bin", "val.bin"]


def test_interrupted_move_is_detected(tmp_path):
    write(tmp_path, ByteTokenizer())
    old = (tmp_path / "train.bin").read_bytes()
    write(tmp_path, ByteTokenizer(), DOCUMENTS[1:])
    (tmp_path / "train.bin").write_bytes(old)  # meta.json is the new one
    with pytest.raises(UserError, match="interrupted; prepare it again"):
        read_meta(tmp_path)
    (tmp_path / "prepare.py").touch()
    with pytest.raises(UserError, match=r"interrupted; run again: python .*prepare\.py"):
        read_meta(tmp_path)
    (tmp_path / "train.bin").unlink()  # the loader reports a missing file
    assert read_meta(tmp_path)


def test_bins_are_moved_after_meta_json(tmp_path, monkeypatch):
    """Stop after each single move: no .bin file ever seems to belong to another meta.json."""
    write(tmp_path, ByteTokenizer(), ["old"], ["old"])
    replace = type(tmp_path).replace
    for moves in range(3):
        left = moves

        def stopping(path, target):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return replace(path, target)

        monkeypatch.setattr(type(tmp_path), "replace", stopping)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, ByteTokenizer(), ["new"], ["new"])
        monkeypatch.undo()
        meta = read_meta(tmp_path)
        for split, counts in meta["splits"].items():
            file = tmp_path / f"{split}.bin"
            if file.exists():
                assert hashlib.sha256(file.read_bytes()).hexdigest() == counts["sha256"]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"dtype": "float32"},
        {"vocab_size": "65"},
        {"splits": {"train": {"tokens": "3"}}},
        {"splits": 3},
        {"tokenizer": None},
    ],
)
def test_invalid_meta_is_refused(tmp_path, change):
    meta = write(tmp_path, ByteTokenizer())
    (tmp_path / "meta.json").write_text(json.dumps({**meta, **change}))
    with pytest.raises(UserError, match="; prepare it again"):
        read_meta(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "3", "[]", "{}", "\xff"])
def test_damaged_meta_is_refused(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="damaged"):
        read_meta(tmp_path)


@given(st.text())
def test_split_matches_nanogpt(text):
    n = len(text)
    assert split_text(text) == {"train": [text[: int(n * 0.9)]], "val": [text[int(n * 0.9) :]]}
