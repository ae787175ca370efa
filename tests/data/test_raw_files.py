"""Zip archives, compressed files, and recognition of binary files."""

import gzip
import io
import os
import pickle
import random
import socket
import sqlite3
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest

from brisk.data.documents import Corpus, pieces
from brisk.data.raw_files import members_of
from brisk.data.text_files import read_text
from brisk.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def zipped(name, members, mode="w"):
    with zipfile.ZipFile(name, mode, zipfile.ZIP_DEFLATED) as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return name


def texts(sources, **options):
    return ["".join(pieces([document])) for document in Corpus(sources, **options)]


# ----------------------------------------------------------------------------- zip archives


def test_zip_is_read_like_a_folder(capsys):
    members = {
        "b.txt": "text b",
        "a.md": "text a".encode("utf-16"),
        "deep/c.csv": "id;text\n1;row c\n",
        "d.jsonl": '{"text": "row d"}\n',
        "e.txt.gz": gzip.compress(b"text e"),
        "deep/": "",
        "__MACOSX/b.txt": "clutter",
        ".hidden": "clutter",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
    }
    expected = ["text a", "text b", "row c", "row d", "text e"]
    assert sorted(texts(zipped("all.zip", members))) == sorted(expected)
    assert "skipped 1 file that is not text: picture.png" in capsys.readouterr().err
    Path("in").mkdir()
    Path("all.zip").rename("in/all.zip")
    Path("in/f.txt").write_text("text f")
    assert sorted(texts("in")) == sorted([*expected, "text f"])
    Path("in/all.zip").rename("in/all")  # recognized by its bytes
    assert sorted(texts("in")) == sorted([*expected, "text f"])
    assert os.listdir() == ["in"]


def test_zip_of_one_file_is_that_file():
    assert texts(zipped("one.zip", {"a.txt": "alone"})) == ["alone"]
    assert read_text("one.zip") == "alone"
    zipped("two.zip", {"a.txt": "alone", "b.txt": "not alone"})
    with pytest.raises(UserError, match=r"two\.zip has 2 files"):
        read_text("two.zip")


def test_parquet_in_a_zip():
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    raw = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), raw)
    assert texts(zipped("a.zip", {"t.parquet": raw.getvalue(), "b.txt": "b"})) == [
        "b",
        "one",
        "two",
    ]


def test_member_paths_are_only_names(tmp_path):
    zipped("evil.zip", {"../../out.txt": "one", "/etc/out.txt": "two", "C:\\out.txt": "three"})
    assert sorted(texts("evil.zip")) == ["one", "three", "two"]
    assert os.listdir() == ["evil.zip"] and not Path("../out.txt").exists()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: zipped("a.zip", {}), "is an empty archive"),
        (lambda: zipped("a.zip", {"folder/": "", "__MACOSX/x": "x"}), "is an empty archive"),
        (
            lambda: zipped("a.zip", {"in.zip": Path(zipped("in", {"a": "b"})).read_bytes()}),
            "inside an",
        ),
        (lambda: Path("a.zip").write_bytes(b"PK\x03\x04 and no more"), "cannot read a.zip"),
        (lambda: Path("a.zip").write_bytes(b"text"), "cannot read a.zip: File is not a zip file"),
        (lambda: Path("a.zip").write_bytes(b""), "cannot read a.zip|is empty"),
    ],
)
def test_unusable_zip_is_one_line(make, message):
    make()
    with pytest.raises(UserError, match=message):
        texts("a.zip")


def test_encrypted_zip_is_one_line():
    zipped("a.zip", {"a.txt": "secret", "b.txt": "secret"})
    raw = bytearray(Path("a.zip").read_bytes())
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # the flag of the first member, in the directory
    Path("a.zip").write_bytes(raw)
    with pytest.raises(UserError, match=r"a\.zip is encrypted; unpack it first"):
        texts("a.zip")


def test_damaged_member_is_named(capsys):
    zipped("a.zip", {"a.txt": "text " * 1000, "b.txt": "b"})
    raw = bytearray(Path("a.zip").read_bytes())
    raw[45:50] = b"?????"
    Path("a.zip").write_bytes(raw)
    assert texts("a.zip") == ["b"]
    assert "skipped: cannot read a.zip/a.txt: it is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("end", ["zip", "gz"])
def test_decompression_bomb_is_stopped(monkeypatch, end):
    monkeypatch.setattr("brisk.data.raw_files.HARMLESS", 2**20)
    bomb = b"0" * 2**23
    if end == "zip":
        zipped("a.zip", {"a.txt": bomb})
    else:
        Path("a.gz").write_bytes(gzip.compress(bomb))
    with pytest.raises(UserError, match="expands to more than 300 times its size"):
        texts(f"a.{end}")


def test_archive_is_opened_once(monkeypatch):
    opened = []
    real = zipfile.ZipFile
    zipped("many.zip", {f"{i}.txt": f"text {i}" for i in range(500)})
    monkeypatch.setattr(zipfile, "ZipFile", lambda path: opened.append(path) or real(path))
    assert len(members_of("many.zip")) == len(texts("many.zip")) == 500
    assert len(opened) == 1


def test_compression_is_detected_by_bytes():
    Path("a.txt").write_bytes(gzip.compress("grün".encode()))
    assert texts("a.txt") == ["grün"]


# ----------------------------------------------------------------------------- binary files


def sqlite(path):
    connection = sqlite3.connect(path)
    connection.execute("create table a (b text)")
    connection.commit()
    connection.close()


def office(member):
    return lambda path: zipped(path, {"[Content_Types].xml": "<a/>", member: "<w/>"})


def raw(content):
    return lambda path: Path(path).write_bytes(content)


NO_TEXT = {
    "a.pdf": (raw(b"%PDF-1.7\n%\xe2\xe3"), r"a PDF; convert it: pdftotext a\.pdf$"),
    "b.docx": (office("word/document.xml"), r"Word document; convert it: pandoc .* b\.docx$"),
    "c.odt": (
        lambda path: zipped(path, {"mimetype": "application/vnd.oasis", "content.xml": "<a/>"}),
        "OpenDocument file; convert it: pandoc",
    ),
    "d.epub": (
        lambda path: zipped(path, {"mimetype": "epub", "META-INF/container.xml": "<a/>"}),
        "EPUB book; convert it: pandoc",
    ),
    "e.xlsx": (office("xl/workbook.xml"), "an Excel document; save it as csv"),
    "f.doc": (raw(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1\0\0"), "old Office document; convert it"),
    "g.png": (raw(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"), "a PNG image$"),
    "h.jpg": (raw(b"\xff\xd8\xff\xe0\0\x10JFIF\0"), "a JPEG image$"),
    "i.wav": (raw(b"RIFF\x24\0\0\0WAVEfmt \0"), "audio$"),
    "j.mp3": (raw(b"ID3\4\0\0\0\0\0\0" + b"\xff\xfb\x90"), "audio$"),
    "k.sqlite": (sqlite, "an SQLite database"),
    "l.gguf": (raw(b"GGUF\3\0\0\0\0\0\0\0"), "a GGUF model$"),
    "m.pkl": (lambda path: Path(path).write_bytes(pickle.dumps({"a": [1]})), "a Python pickle$"),
    "n.npy": (lambda path: np.save(path, np.zeros(3)), "a numpy array$"),
    "o.npz": (lambda path: np.savez(path, a=np.zeros(3)), "numpy arrays$"),
    "p.mp4": (raw(b"\0\0\0\x18ftypmp42\0\0"), "a video$"),
    "q.tar": (
        raw(b"a" * 100 + b"\0" * 157 + b"ustar\x0000" + b"\0" * 300),
        "a tar archive; unpack",
    ),
    "r.tar.gz": (
        raw(gzip.compress(b"a" * 100 + b"\0" * 157 + b"ustar\x0000" + b"\0" * 300)),
        "a tar archive; unpack",
    ),
    "s.7z": (raw(b"7z\xbc\xaf\x27\x1c\0\4"), "a 7z archive; unpack it"),
    "t.rtf": (raw(b"{\\rtf1\\ansi hello}"), "rich text"),
    "u.safetensors": (raw(b"\x40\0\0\0\0\0\0\0" + b'{"a":{"dtype":"F32"}}'), "safetensors model$"),
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("renamed", [False, True])
def test_binary_files_are_named_by_kind(name, renamed):
    make, message = NO_TEXT[name]
    make(name)
    if renamed:  # only the bytes matter
        Path(name).rename("a.txt")
        name, message = "a.txt", message.split("; convert")[0].split(r"\.")[0].rstrip("$")
    for encoding in ("auto", "utf-8"):
        with pytest.raises(UserError, match=f"{name} is not text: it is .*{message}"):
            texts(name, encoding=encoding)
    with pytest.raises(UserError, match="is not text"):
        read_text(name)


def test_convertible_files_in_a_folder_are_noted(capsys):
    Path("in").mkdir()
    for name in ("a.pdf", "b.docx", "g.png", "k.sqlite"):
        NO_TEXT[name][0](f"in/{name}")
    Path("in/notes.txt").write_text("text")
    Path("in/empty.txt").write_text("")
    assert texts("in") == ["text"]
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "skipped 1 file that is not text: g.png"
    assert told[1] == "skipped 1 file that is empty: empty.txt"
    assert "skipped: in/a.pdf is not text: it is a PDF; convert it: pdftotext in/a.pdf" in told
    assert len(told) == 5


@pytest.mark.parametrize(
    "text",
    ["BM is the name of a shop", "GGUF is a format", "ID3 tags", "MZ", "%!", "PK is Pakistan"],
)
def test_text_that_begins_like_a_binary_file(text):
    Path("a.txt").write_text(text)
    assert texts("a.txt") == [text]


def test_only_regular_files_are_read():
    os.mkfifo("fifo.txt")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.txt")
        for name in ("fifo.txt", "socket.txt", "/dev/null"):
            for read in (texts, read_text):
                with pytest.raises(UserError, match=f"{name} is not a regular file"):
                    read(name)
    Path("in").mkdir()
    Path("fifo.txt").rename("in/fifo.txt")
    Path("in/a.txt").write_text("text")
    assert texts("in") == ["text"] and stat.S_ISFIFO(os.stat("in/fifo.txt").st_mode)


# ----------------------------------------------------------------------------- damage


def seeds():
    lines = "The quick brown fox. Grüße 你好\n" * 20
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in (("a.txt", lines), ("b.csv", "n;text\n1;a\n"), ("c.gz", "a")):
            file.writestr(name, content)
    return {
        "a.zip": archive.getvalue(),
        "a.txt.gz": gzip.compress(lines.encode()),
        "a.csv": ('id;text;x\n1;"a; ""b""\nc";2\n' + "2;d;3\n" * 9).encode(),
        "a.jsonl": b'{"text": "abc \\u00e9 [1,2]", "n": [1, {"a": null}]}\n' * 9,
        "a.json": b'[{"text": "a", "n": 1.5}, {"text": "b"}]',
        "a.txt": lines.encode("utf-16"),
    }


def damaged(raw, rng):
    """`raw` truncated, or with up to four bytes changed, removed or inserted."""
    raw = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(raw))
        change = rng.choice(["byte", "byte", "cut", "insert", "drop"])
        if change == "byte":
            raw[at] = rng.randrange(256)
        elif change == "cut":
            raw = raw[: at + 1]
        elif change == "insert":
            raw[at:at] = rng.choice([b"\0", b'"', b"\n", b"{", b"PK\x03\x04", b"\xff\xfe"])
        else:
            del raw[at : at + rng.randint(1, 20)]
            raw = raw or bytearray(b"a")
    return bytes(raw)


@pytest.mark.parametrize("name", seeds())
def test_damaged_file_is_read_or_refused(name, capsys):
    rng = random.Random(name)
    whole = seeds()[name]
    for _ in range(150):
        Path(name).write_bytes(damaged(whole, rng))
        try:
            texts(name)
        except UserError as error:
            assert name in str(error)


def test_member_without_a_name_is_skipped():
    zipped("a.zip", {"x": "nameless", "b.txt": "text"})
    raw = Path("a.zip").read_bytes()
    at = raw.index(b"PK\x01\x02")  # the first entry of the directory: its name becomes a comment
    entry = bytearray(raw[at:])
    entry[28:30], entry[32:34] = b"\0\0", b"\1\0"
    Path("a.zip").write_bytes(raw[:at] + entry)
    assert texts("a.zip") == ["text"]
