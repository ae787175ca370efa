"""Tables in the wild: separators, json arrays, truncated jsonl, nested parquet."""

import json
from pathlib import Path

import pytest

from brisk.data.csv_file import CsvFile
from brisk.data.documents import Corpus, pieces
from brisk.data.json_file import JsonFile
from brisk.errors import UserError


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def texts(name, content=None, **options):
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["".join(pieces([document])) for document in Corpus(name, **options)]


def refused(name, content, **options):
    with pytest.raises(UserError) as error:
        texts(name, content, **options)
    return str(error.value)


# ----------------------------------------------------------------------------- csv


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_separator_is_detected_and_noted(capsys, name, separator):
    rows = ["id,text", '1,"one, two; three\t|"', "2,four. five", '3,"six\nseven"']
    content = "".join(row.replace(",", separator, 1) + "\n" for row in rows)
    assert texts(name, content) == ["one, two; three\t|", "four. five", "six\nseven"]
    usual = separator == ("\t" if name.endswith("tsv") else ",")
    assert (f"{name}: the field separator is {separator!r}" in capsys.readouterr().err) != usual


def test_separator_inside_text_is_ignored():
    assert texts("a.csv", "text\none; two\nthree; four\n") == ["one; two", "three; four"]
    assert texts("b.csv", "n,text\n1,a;b\n2,c;d\n") == ["a;b", "c;d"]
    assert texts("c.csv", "n;text\n1,5;a, b\n2,5;c\n") == ["a, b", "c"]
    assert texts("d.csv", "sep=;\nn;text\n1;a\n") == ["a"]  # as Excel writes it


def test_only_text_column_is_used(capsys):
    assert texts("a.csv", "id,body,score\n1,a,2.5\n2,b,\n") == ["a", "b"]
    assert "a.csv: reading the text in column body" in capsys.readouterr().err
    assert texts("b.csv", "id,body,text\n1,a,b\n") == ["b"]
    assert texts("c.csv", "year\n1999\n2000\n") == ["1999", "2000"]
    message = refused("d.csv", "id,body,title\n1,a,b\n")
    assert (
        message
        == "d.csv has no column text; its columns are id, body, title; choose one: --column=body"
    )
    assert "has no column txt" in refused("e.csv", "text\na\n", column="txt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,id,text\na,1,b\n", "has two columns named text"),
        ("", "a.csv is empty"),
        ("\n\n", "a.csv is empty"),
        ("text,id\n", "a.csv has a header but no rows"),
        ("id\n\n", "a.csv has a header but no rows"),
        ("id,score\n1,2\n", "a.csv has no column text; its columns are id, score"),
        (b"PK\x03\x04", "cannot read a.csv"),
        (b"text\na\0b\n", "a.csv is not text"),
    ],
)
def test_unusable_csv_is_one_line(content, message):
    assert message in refused("a.csv", content)


def test_empty_tables_are_skipped(capsys):
    Path("in").mkdir()
    for name, content in (("a.csv", ""), ("b.csv", "text\n"), ("c.jsonl", ""), ("d.json", "[]")):
        Path("in", name).write_text(content)
    Path("in/e.csv").write_text("text\nrow\n")
    assert texts("in") == ["row"]
    assert "skipped 4 files that are empty: " in capsys.readouterr().err


# ----------------------------------------------------------------------------- json


def test_json_array():
    rows = [{"text": "one\n", "id": 1}, {"text": None}, {"id": 2}, {"text": ""}, {"text": "2 的"}]
    for content in (json.dumps(rows), json.dumps(rows, indent=1, ensure_ascii=False)):
        for encoding in ("utf-8", "utf-8-sig", "utf-16"):
            assert texts("a.json", content.encode(encoding)) == ["one\n", "", "2 的"]
    assert texts("b.json", '["one", "two"]') == ["one", "two"]
    assert texts("c.json", '[{"id": 1, "body": "a"}, {"id": 2, "body": "b"}]') == ["a", "b"]
    assert "has no column text; its columns are a, b; choose" in refused(
        "d.json", '[{"a": "1", "b": "2"}]'
    )
    assert "has no column b; its columns are a" in refused("e.json", '[{"a": "1"}]', column="b")


def test_json_lines_in_a_json_file():
    assert texts("a.json", '{"text": "a"}\n{"text": "b"}\n') == ["a", "b"]
    assert texts("b.jsonl", '"a"\n\n"b"') == ["a", "b"]
    assert texts("c.ndjson", '\ufeff{"text": "a"}\r\n{"text": "b"}\r\n') == ["a", "b"]


def test_large_array_names_the_remedy(monkeypatch):
    monkeypatch.setattr("brisk.data.json_file.LARGEST", 1000)
    message = refused("a.json", json.dumps(["text " * 10] * 50))
    assert "convert it to jsonl: jq -c '.[]' a.json" in message
    lines = "".join(json.dumps({"text": "text " * 10}) + "\n" for _ in range(50))
    assert len(texts("b.json", lines)) == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b', "a.jsonl, line 2: it is not JSON"),
        ('{"text": "a"}\n{"text": "b', "it is the last line: the file may be incomplete"),
        ('{"text": "a"}\n{"text": "b"}}\n{"text": "c"}\n', "line 2: it is not JSON (Extra data"),
        ('{"text": "a"}\n\n{"text": "b"}\ngarbage', "line 4: it is not JSON"),
        ('{"text": "a"}\n\0\0\0\0', "it has zero bytes"),
        (
            '{"text": "ä"}\n' + '{"text": "a"}\n' * 90000 + "\0\0",
            "line 90002: it has zero bytes",
        ),
        ('{"text": "a"}\n[1]\n', "line 2 is an array, not an object or string"),
        ('{"text": "a"}\n"b"\n', "line 2: some rows are objects, others strings"),
        ('{"text": "a"}\n{"text": ["b"]}\n', "line 2: the column text is not text"),
        ("[" * 100_000, "line 1: it is not JSON"),
        ('{"text": 1' + "0" * 5000 + "}", "line 1: it is not JSON"),
        ("", "a.jsonl is empty"),
        ("\n \n", "a.jsonl is empty"),
        ('{"messages": [{"role": "user"}]}\n', "has no column text; its columns are messages"),
    ],
)
def test_unusable_jsonl_names_the_line(content, message):
    assert message in refused("a.jsonl", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"},\n{"text": "b', "a.json, line 2: it is not JSON"),
        ("[]", "a.json is empty"),
        (" \n", "a.json is empty"),
        ("[1, 2]", "item 1 is a number"),
        ('{"a": 1}', "has no column text; its columns are a"),
        ("[" * 100_000, "it is not JSON"),
    ],
)
def test_unusable_json_is_one_line(content, message):
    assert message in refused("a.json", content)


def test_json_is_re_iterable():
    Path("a.json").write_text('[{"text": "a"}, {"text": "b"}]')
    table = JsonFile(Path("a.json"))
    assert list(table.texts("text")) == list(table.texts("text")) == ["a", "b"]


# ----------------------------------------------------------------------------- parquet


def parquet(name, **columns):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), name)


def test_parquet_columns():
    pyarrow = pytest.importorskip("pyarrow")
    categories = pyarrow.array(["a", "b", "a"]).dictionary_encode()
    parquet("a.parquet", n=[1, 2, 3], body=["a", None, "c"])
    assert texts("a.parquet") == ["a", "c"]
    parquet("b.parquet", kind=categories)
    assert texts("b.parquet") == ["a", "b", "a"]
    parquet("c.parquet", **{"meta.text": ["a"], "meta": [{"text": "b"}]})
    assert texts("c.parquet", column="meta.text") == ["a"]
    Path("a.parquet").rename("a.bin")
    assert texts("a.bin") == ["a", "c"]


def test_unusable_parquet_is_one_line():
    parquet("a.parquet", words=[["a", "b"], ["c"]], n=[1, 2])
    with pytest.raises(UserError, match=r"a\.parquet has no column text; its columns are words, n"):
        texts("a.parquet")
    with pytest.raises(UserError, match="the column words is list<element: string>, not text"):
        texts("a.parquet", column="words")
    parquet("b.parquet", text=[])
    with pytest.raises(UserError, match=r"b\.parquet has no rows"):
        texts("b.parquet")
    parquet("c.parquet", text=["a" * 1000] * 5000)
    whole = Path("c.parquet").read_bytes()
    Path("c.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cannot read c\.parquet"):
        texts("c.parquet")


def test_csv_rows_are_dicts():
    Path("a.csv").write_text("a;b\n1;2\n")
    assert list(CsvFile("a.csv")) == [{"a": "1", "b": "2"}]
