"""Each `prepare.py` as a script, in a copy of the repository."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from brisk.data.dataset import load_tokenizer, read_meta
from brisk.data.tokenizer import EOT

DATA = os.environ.get("BRISK_DATA", "")
needs_shakespeare = pytest.mark.skipif(
    not DATA or not Path(DATA, "tinyshakespeare.txt").exists(),
    reason="BRISK_DATA names no folder with tinyshakespeare.txt",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the files that a `prepare.py` needs, without prepared data."""
    tree = tmp_path_factory.mktemp("tree")
    shutil.copytree(ROOT / "brisk", tree / "brisk", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "configurator.py", tree)
    for script in ROOT.glob("data/*/prepare.py"):
        (tree / "data" / script.parent.name).mkdir(parents=True)
        shutil.copy(script, tree / "data" / script.parent.name)
    return tree


@pytest.fixture
def prepare(tree, tmp_path):
    """Run data/<name>/prepare.py in the copy. Returns its output, or its error."""

    def run(name, *arguments, fails=False, **environment):
        environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), **environment}
        done = subprocess.run(
            [sys.executable, f"data/{name}/prepare.py", *arguments],
            cwd=tree,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == (2 if fails else 0), done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr if fails else done.stdout

    return run


@pytest.fixture
def encode_ordinary(gpt2_tokenizer):
    return gpt2_tokenizer.encoding.encode_ordinary


def decoded(directory, split):
    ids = np.fromfile(directory / f"{split}.bin", dtype=read_meta(directory)["dtype"])
    return load_tokenizer(directory).decode(ids)


def write_uint16(ids):
    return np.array(ids, dtype=np.uint16).tobytes()


# ----------------------------------------------------------------------------- Shakespeare


@needs_shakespeare
def test_shakespeare_char_matches_nanogpt(prepare, tree):
    output = prepare("shakespeare_char")
    text = Path(DATA, "tinyshakespeare.txt").read_text(encoding="utf-8")
    stoi = {character: i for i, character in enumerate(sorted(set(text)))}
    ids, n = [stoi[character] for character in text], int(len(text) * 0.9)
    directory = tree / "data" / "shakespeare_char"
    assert (directory / "train.bin").read_bytes() == write_uint16(ids[:n])
    assert (directory / "val.bin").read_bytes() == write_uint16(ids[n:])
    for line in (
        "length of dataset in characters: 1,115,394",
        "vocab size: 65",
        "train has 1,003,854 tokens",
        "val has 111,540 tokens",
    ):
        assert line in output.splitlines()


@needs_shakespeare
def test_shakespeare_matches_nanogpt(prepare, tree, encode_ordinary):
    output = prepare("shakespeare")
    text = Path(DATA, "tinyshakespeare.txt").read_text(encoding="utf-8")
    n = int(len(text) * 0.9)
    directory = tree / "data" / "shakespeare"
    assert (directory / "train.bin").read_bytes() == write_uint16(encode_ordinary(text[:n]))
    assert (directory / "val.bin").read_bytes() == write_uint16(encode_ordinary(text[n:]))
    assert output == "train has 301,966 tokens\nval has 36,059 tokens\n"


def test_own_text_goes_to_data_dir(prepare, tree, tmp_path):
    text = "Ich weiß nicht, was soll es bedeuten,\r\ndaß ich so traurig bin;\n" * 3
    (tmp_path / "lorelei.txt").write_bytes(text.encode())
    directory = tmp_path / "new" / "lorelei"
    prepare("shakespeare_char", f"--input={tmp_path / 'lorelei.txt'}", f"--data-dir={directory}")
    whole = decoded(directory, "train") + decoded(directory, "val")
    assert whole == text.replace("\r\n", "\n")
    assert not (tree / "data" / "shakespeare_char" / "lorelei.txt").exists()
    assert str(tmp_path) not in (directory / "meta.json").read_text()
    assert read_meta(directory)["source"] == "lorelei.txt"


# ----------------------------------------------------------------------------- OpenWebText


def nanogpt_openwebtext(documents, encode_ordinary):
    """The .bin files that nanoGPT's data/openwebtext/prepare.py writes for these documents."""
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"text": documents})
    splits = dataset.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    return {
        split: write_uint16(
            [i for text in splits[key]["text"] for i in [*encode_ordinary(text), 50256]]
        )
        for split, key in (("train", "train"), ("val", "test"))
    }


@pytest.mark.parametrize("count", [2, 5000])
def test_openwebtext_matches_nanogpt(prepare, tmp_path, encode_ordinary, count):
    documents = [f"Page {i}\n\nIt's {EOT} about 你好, {'so ' * (i % 9)}\t" for i in range(count)]
    expected = nanogpt_openwebtext(documents, encode_ordinary)
    lines = [json.dumps({"text": text, "url": "-"}) + "\n" for text in documents]
    (tmp_path / "pages.jsonl").write_text("".join(lines))
    prepare("openwebtext", f"--source={tmp_path / 'pages.jsonl'}", f"--data_dir={tmp_path}")
    for split in ("train", "val"):
        assert (tmp_path / f"{split}.bin").read_bytes() == expected[split]
    meta = read_meta(tmp_path)
    assert sum(counts["documents"] for counts in meta["splits"].values()) == count


def test_openwebtext_from_a_folder(prepare, tmp_path, encode_ordinary):
    pytest.importorskip("datasets")
    texts = {f"{name}\nsecond line\n" for name in "abcd"}
    for i, text in enumerate(sorted(texts)):
        (tmp_path / "in" / str(i)).mkdir(parents=True)
        (tmp_path / "in" / str(i) / "text.txt").write_text(text)
    prepare("openwebtext", f"--source={tmp_path / 'in'}", f"--data_dir={tmp_path}")
    read = decoded(tmp_path, "train") + decoded(tmp_path, "val")
    assert set(read.split(EOT)[:-1]) == texts


def test_single_document_is_split_at_its_end(prepare, tmp_path, encode_ordinary):
    pytest.importorskip("datasets")
    (tmp_path / "one.txt").write_text("to be or not to be " * 100)
    prepare("openwebtext", f"--source={tmp_path / 'one.txt'}", f"--data_dir={tmp_path}")
    train, val = decoded(tmp_path, "train"), decoded(tmp_path, "val")
    assert train.replace(EOT, "") + val.replace(EOT, "") == "to be or not to be " * 100
    assert len(val) < len(train) / 8


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("names.jsonl", '{"body": "a"}\n{"body": "b"}\n', "no column text"),
        ("broken.jsonl", '{"text": \n', "JSON parse error"),
    ],
)
def test_openwebtext_refuses_unusable_sources(prepare, tmp_path, name, content, message):
    pytest.importorskip("datasets")
    (tmp_path / name).write_text(content)
    stderr = prepare("openwebtext", f"--source={tmp_path / name}", fails=True)
    assert message in stderr.splitlines()[-1]


def test_openwebtext_without_network_is_one_line(prepare):
    pytest.importorskip("datasets")
    stderr = prepare("openwebtext", fails=True, HF_HUB_OFFLINE="1")
    assert "Skylion007/openwebtext" in stderr and "pip install datasets" in stderr
    assert len(stderr.splitlines()) == 1


# ----------------------------------------------------------------------------- Python source


def test_python_source_of_this_library(prepare, tmp_path):
    output = prepare("python_source", f"--data_dir={tmp_path}")
    assert output.startswith("found ")
    train = decoded(tmp_path, "train").split(EOT)
    val = decoded(tmp_path, "val").split(EOT)
    assert any("class JSONDecoder" in text for text in train + val)
    long = [{text for text in split if len(text) > 1000} for split in (train, val)]
    assert long[0] and long[1] and not long[0] & long[1]  # short files may be equal
    assert 0.03 < len(val) / len(train + val) < 0.2


def test_python_source_skips_tests_and_binaries(prepare, tmp_path):
    for i in range(40):
        (tmp_path / "in" / "package").mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / "package" / f"module{i}.py").write_text(f"# ordinary {i}\n")
    for path in ("test/a.py", "package/tests/b.py", "site-packages/c.py", "package/notes.txt"):
        (tmp_path / "in" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / path).write_text("# unwanted\n")
    (tmp_path / "in" / "latin.py").write_bytes(b"# -*- coding: latin-1 -*- \xe9\n")
    prepare(
        "python_source", f"--input={tmp_path / 'in'}", f"--data_dir={tmp_path}", "--tokenizer=byte"
    )
    documents = [text for split in ("train", "val") for text in decoded(tmp_path, split).split(EOT)]
    assert sorted(filter(None, documents)) == sorted(f"# ordinary {i}\n" for i in range(40))
    assert read_meta(tmp_path)["splits"]["val"]["documents"] > 0


def test_python_source_vocab_size(prepare, tmp_path):
    for i in range(40):
        (tmp_path / f"module{i}.py").write_text(f"def function{i}(number):\n    return number\n")
    prepare("python_source", f"--input={tmp_path}", f"--data_dir={tmp_path}", "--vocab_size=270")
    assert read_meta(tmp_path)["vocab_size"] == 270
    documents = decoded(tmp_path, "train").split(EOT)
    assert documents[0] == "def function0(number):\n    return number\n"


# ----------------------------------------------------------------------------- addition


def problems_in(directory, split):
    """Check the sums of a split. Returns {(a, b): count}."""
    problems = Counter()
    for document in filter(None, decoded(directory, split).split(EOT)):
        question, answer = document.split("=")
        a, b = map(int, question.split("+"))
        assert (question, answer) == (f"{a}+{b}", str(a + b))
        problems[a, b] += 1
    return problems


def unordered(problems):
    return {tuple(sorted(pair)) for pair in problems}


def test_addition_splits_unordered_pairs(prepare, tmp_path):
    prepare("addition", "--passes=3", f"--data_dir={tmp_path}")
    train, val = problems_in(tmp_path, "train"), problems_in(tmp_path, "val")
    assert len(train) + len(val) == 10_000
    assert set(train.values()) == {3} and set(val.values()) == {1}
    assert not unordered(train) & unordered(val)
    assert 900 < len(val) < 1100
    meta = read_meta(tmp_path)
    assert (meta["task"], meta["digits"], meta["vocab_size"]) == ("addition", 2, 13)


def test_addition_sample_is_reproducible(prepare, tmp_path):
    arguments = ("addition", "--digits=5", "--max_problems=2000", "--passes=1")
    for where in ("a", "b"):
        prepare(*arguments, f"--data_dir={tmp_path / where}")
    prepare(*arguments, "--seed=1", f"--data_dir={tmp_path / 'c'}")
    bins = [(tmp_path / where / "train.bin").read_bytes() for where in "abc"]
    assert bins[0] == bins[1] != bins[2]
    train, val = problems_in(tmp_path / "a", "train"), problems_in(tmp_path / "a", "val")
    assert len(train) + len(val) == 2000
    assert not unordered(train) & unordered(val)


# ----------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "name, argument, message",
    [
        ("shakespeare_char", "--input=nowhere.txt", "cannot read nowhere.txt"),
        ("shakespeare_char", "--inptu=a", "did you mean input?"),
        ("shakespeare_char", "--input=data/shakespeare_char/prepare.py/x", "cannot read"),
        ("shakespeare", "--input=brisk", "cannot read brisk: Is a directory"),
        ("python_source", "--input=nowhere", "no Python files in nowhere"),
        ("addition", "--digits=0", "a whole number from 1 to 9"),
        ("addition", "--max_problems=1", "no tokens are left for train"),
        ("addition", "--data_dir=configurator.py", "cannot write to configurator.py"),
    ],
)
def test_wrong_input_is_one_line(prepare, name, argument, message):
    stderr = prepare(name, argument, fails=True)
    assert message in stderr
    assert len(stderr.splitlines()) == 1


def test_missing_text_is_three_lines(prepare, tree, tmp_path):
    (tree / "data" / "shakespeare" / "input.txt").unlink(missing_ok=True)
    no_network = {"https_proxy": "http://127.0.0.1:9", "BRISK_DATA": str(tmp_path)}
    stderr = prepare("shakespeare", fails=True, **no_network)
    assert len(stderr.splitlines()) == 3
    assert str(tmp_path) in stderr and "--input=PATH" in stderr and "input.txt" in stderr
