"""Documents from files and tables, and their split for training and validation."""

import csv
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from brisk.data import raw_files, text_files
from brisk.data.csv_file import CsvFile
from brisk.data.documents import (
    Corpus,
    Span,
    find_files,
    key_of,
    pieces,
    sample_evenly,
    split_documents,
)
from brisk.errors import UserError


def table(folder, content, name="a.csv", encoding="utf-8"):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return CsvFile(folder / name)


def rows(folder, content, **options):
    return [tuple(row.values()) for row in table(folder, content, **options)]


# ----------------------------------------------------------------------------- csv

FIELDS = st.text(st.sampled_from('a,"\n 的é;\t'), max_size=8)


@given(st.lists(st.tuples(FIELDS, FIELDS), max_size=8))
def test_csv_round_trip(tmp_path_factory, written):
    file = io.StringIO(newline="")
    csv.writer(file, lineterminator="\r\n").writerows([("text", "label"), *written])
    for encoding in ("utf-8", "utf-8-sig", "gb18030", "utf-16"):
        path = tmp_path_factory.mktemp("csv") / "a.csv"
        path.write_bytes(file.getvalue().encode(encoding))
        read = CsvFile(path, "auto" if encoding != "gb18030" else encoding)
        assert [(row["text"], row["label"]) for row in read] == written


def test_quotes_and_line_breaks_in_fields(tmp_path, monkeypatch):
    content = 'text,label\r\n"one ""two"", three\r\nfour",1\r\n\r\nfive,""\r\n"",0'
    expected = [('one "two", three\nfour', "1"), ("five", ""), ("", "0")]
    assert rows(tmp_path, content) == expected
    monkeypatch.setattr(raw_files, "PIECE", 3)
    assert rows(tmp_path, content) == expected


def test_tsv_fields_are_separated_by_tabs(tmp_path):
    assert rows(tmp_path, "a\tb\n1, 2\t3\n", name="a.tsv") == [("1, 2", "3")]


@pytest.mark.parametrize(
    "wrong",
    ["few", "so,many,of them", '"stray" text,1', '"stray\nin the second line" text,1'],
)
def test_malformed_row_is_skipped_with_one_note(tmp_path, capsys, wrong):
    content = f"text,label\na,1\n{wrong}\nb,2\n{wrong}\nc,3\n"
    read = table(tmp_path, content)
    for _ in range(2):
        assert [row["text"] for row in read] == ["a", "b", "c"]
    told = capsys.readouterr().err
    assert told == f"{tmp_path / 'a.csv'}: skipped 2 malformed rows, the first at line 3\n"


def test_unclosed_quote_loses_one_line(tmp_path, capsys):
    lines = [f"row {i},{i}" for i in range(2000)]
    lines[500] = '"row 500,500'
    read = rows(tmp_path, "\n".join(["text,label", *lines]))
    assert read == [(f"row {i}", str(i)) for i in range(2000) if i != 500]
    assert "skipped 1 malformed rows, the first at line 502" in capsys.readouterr().err


def test_empty_table_is_refused(tmp_path):
    assert rows(tmp_path, "text,label\n") == []
    with pytest.raises(UserError, match="is empty"):
        table(tmp_path, "")
    with pytest.raises(UserError, match=r"a\.csv has a header but no rows"):
        Corpus(str(table(tmp_path, "text,label\n").path))
    with pytest.raises(UserError, match=r"a\.csv has no column text; its columns are body, title"):
        Corpus(str(table(tmp_path, "body,title\na,b\n").path))


# ----------------------------------------------------------------------------- files


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Files of many kinds, in the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, content in {
        "in/b.txt": "text b",
        "in/a.md": "text a",
        "in/deep/c.py": "text c",
        "in/deep/settings.json": '{"a": 1}',
        "in/table.csv": "id,text\n1,row one\n2,row two\n",
        "in/.hidden": "unwanted",
        "in/.git/config": "unwanted",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (tmp_path / "in" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "in" / "data.bin").write_bytes(bytes(range(256)))
    return tmp_path


def texts(corpus):
    return ["".join(pieces([document])) for document in corpus]


def test_folder_skips_hidden_and_binary_files(tree, capsys):
    corpus = Corpus("in")
    expected = ["text a", "text b", "text c", '{"a": 1}', "row one", "row two"]
    assert texts(corpus) == texts(corpus) == expected
    assert capsys.readouterr().err == "skipped 2 files that are not text: data.bin, picture.png\n"


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        ("in/a.md", ["a.md"]),
        ("in/*.txt,in/a.md", ["b.txt", "a.md"]),
        ("in/a.md,in/*.md", ["a.md"]),  # once
        ("in/**/*.py", ["c.py"]),
        ("in/deep,in/b.txt", ["c.py", "settings.json", "b.txt"]),
        ("no_such_name", []),  # may be a name on the hub
        ("someone/name", []),
    ],
)
def test_paths_folders_and_patterns(tree, sources, expected):
    assert [file.name for file in find_files(sources)] == expected


@pytest.mark.parametrize("sources", ["missing.txt", "in/*.rst", "in/a.md,nothing", "in/deep/x/y"])
def test_source_without_files_is_refused(tree, sources):
    with pytest.raises(UserError, match="there are no files at"):
        find_files(sources)


def test_long_list_of_files(tree):
    assert len(find_files(",".join(["in/a.md", "in/b.txt"] * 1000))) == 2


def test_single_binary_file_is_refused(tree):
    with pytest.raises(UserError, match=r"picture\.png is not text"):
        Corpus("in/picture.png")


def test_lines_as_documents(tree, monkeypatch):
    (tree / "lines.txt").write_text("one\n\ntwo\r\n three\nfour")
    for piece in (2, 2**20):
        monkeypatch.setattr(raw_files, "PIECE", piece)
        assert list(Corpus("lines.txt", lines=True)) == ["one", "two", " three", "four"]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_tables_of_the_datasets_library(shared_memory, tree, kind):  # of datasets with torch
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"body": ["one\n", None, "", "two 的"], "n": [1, 2, 3, 4]})
    if kind == "parquet":
        dataset.to_parquet(f"a.{kind}")
    else:
        dataset.to_json(f"a.{kind}", compression="gzip" if kind.endswith("gz") else None)
    corpus = Corpus(f"a.{kind}", column="body")
    assert list(corpus) == list(corpus) == ["one\n", "", "two 的"]
    assert list(Corpus(f"a.{kind}")) == list(corpus)  # its only column of text
    with pytest.raises(UserError, match=r"has no column text; its columns are body, n"):
        Corpus(f"a.{kind}", column="text")
    with pytest.raises(UserError, match="not text"):
        list(Corpus(f"a.{kind}", column="n"))


# ----------------------------------------------------------------------------- splitting


def split(documents, share):
    splits = split_documents(documents, share)
    return [texts(splits[name]) for name in ("train", "val")]


@given(st.lists(st.text(max_size=3), min_size=2), st.floats(0.0001, 0.5))
def test_split_is_a_partition(documents, share):
    if len(set(documents)) == 1:
        with pytest.raises(UserError, match="documents are equal"):
            split(documents, share)
        return
    train, val = split(documents, share)
    assert sorted(train + val) == sorted(documents)
    assert not set(train) & set(val)
    assert train and val
    assert train == [text for text in documents if text in train]  # in order


def test_split_is_independent_of_order():
    documents = [f"document {i}" for i in range(500)]
    train, val = split(documents, 0.1)
    assert len(val) == 50
    assert [sorted(part) for part in split(documents[::-1], 0.1)] == [sorted(train), sorted(val)]


@given(st.text(min_size=0, max_size=40), st.floats(0.0001, 0.5))
def test_single_document_is_split_at_its_end(text, share):
    train, val = split([text], share)
    assert "".join(train + val) == text
    assert len("".join(train)) == int(len(text) * (1 - share))


def test_no_documents_is_an_error():
    with pytest.raises(UserError, match="no documents"):
        split_documents([], 0.1)


@given(st.lists(st.text(max_size=5)), st.integers(0, 30), st.integers(0, 30))
def test_span_is_a_slice(parts, first, last):
    class Document:
        def __iter__(self):
            return iter(parts)

    assert "".join(Span(Document(), first, last)) == "".join(parts)[first:last]


def test_equal_texts_have_equal_keys(tmp_path):
    (tmp_path / "a.txt").write_text("the same")
    assert (
        key_of("the same") == key_of(text_files.TextFile(tmp_path / "a.txt")) != key_of("another")
    )


def test_sample_has_its_size_and_is_spread_evenly():
    documents = [f"{i:04}的" * 10 for i in range(10_000)]  # 700,000 bytes
    whole = "".join(sample_evenly(documents, 1))
    assert whole == "".join(documents)
    sample = list(sample_evenly(documents, 0.07))
    assert 60_000 < len("".join(sample).encode()) < 80_000
    numbers = [int(piece[:4]) for piece in sample if len(piece) >= 4]
    assert (
        numbers[0] < 20 and numbers[-1] > 9980 and max(map(int.__sub__, numbers[1:], numbers)) < 30
    )


def test_unreadable_file_is_refused(tmp_path):
    if os.geteuid() == 0:
        pytest.skip("the root user may read everything")
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match="Permission denied"):
        Corpus(str(tmp_path / "a.txt"))


def test_deleted_file_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr("brisk.data.documents.find_files", lambda _: [tmp_path / "b.txt"])
    with pytest.raises(UserError, match=r"cannot read .*b\.txt: No such file"):
        Corpus("anything")


def test_column_of_a_hub_data_set(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"n": [1, 2, 3], "body": ["a", None, "b"]})
    monkeypatch.setattr("brisk.data.documents.load", lambda name, **options: rows)
    assert list(Corpus("someone/texts")) == list(Corpus("texts", column="body")) == ["a", "b"]
    with pytest.raises(
        UserError, match="someone/texts has no column text; its columns are n, body"
    ):
        Corpus("someone/texts", column="text")


# ----------------------------------------------------------------------------- few files


def test_dominant_document_is_split():
    book, note = "".join(f"sentence {i} of the book. " for i in range(2000)), "a short note"
    for documents in ([book, note], [note, book, "another", book]):
        train, val = split(documents, 0.1)
        assert note in train and len(val) == 1 and book.endswith(val[0])
        assert 0.09 < len(val[0]) / len(book) < 0.11
        assert all(val[0] not in document for document in train)  # nor is it in the copy
        assert sum(map(len, train)) > 0.8 * len(book)
    equal = [book, book.upper(), book[::-1]]
    train, val = split(equal, 0.1)
    assert sorted(train + val) == sorted(equal)  # by document


def test_prepared_data_sets_are_skipped(tree):
    for name in ("meta.json", "train.bin", "val.bin", "meta.pkl"):
        (tree / "in" / "deep" / name).write_text("tokens")
    assert "meta.json" not in [file.name for file in find_files("in")]
    assert [file.name for file in find_files("in/deep")] == ["c.py", "settings.json"]
    (tree / "in" / "deep" / "train.bin").unlink()
    assert "meta.json" in [file.name for file in find_files("in")]  # not of a data set


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("-", "standard input can be read only once"),
        ("loop", "is a broken link"),
        ("https://example.org/a.txt", "is a URL; download it first"),
        ("empty", "there are no files in empty"),
    ],
)
def test_invalid_source_is_refused(tree, source, message):
    (tree / "loop").symlink_to("loop")
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        Corpus(source)


def test_cyclic_links_are_followed_once(tree):
    (tree / "in" / "deep" / "up").symlink_to(tree / "in")
    assert [file.name for file in find_files("in/**/*.md")] == ["a.md"]
    assert sorted(find_files("in")) == sorted(set(find_files("in")))


def test_tilde_is_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    assert texts(Corpus("~/in/a.md")) == ["text a"]
