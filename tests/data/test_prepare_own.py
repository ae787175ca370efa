"""Data sets from user files and from shards: complete, split by document, in bounded memory."""

import gzip
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brisk.data import dataset
from brisk.data.bpe import train_bpe
from brisk.data.dataset import join_datasets, write_dataset
from brisk.data.tokenizer import EOT, ByteTokenizer, CharTokenizer, find_words
from brisk.errors import UserError


@pytest.fixture
def prepare(prepare_here):
    return prepare_here


def write(name, text, encoding="utf-8"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode(encoding))
    return name


# ----------------------------------------------------------------------------- user files

POEM = "Über allen Gipfeln ist Ruh,\r\nin allen Wipfeln 你好 🎉\r\n" * 30
TOKENIZERS = ["char", "byte", "word", "bpe", "gpt2"]


@pytest.fixture
def needs(request):
    def needs(tokenizer):
        if tokenizer == "bpe":
            pytest.importorskip("tokenizers")
        if tokenizer == "gpt2":
            request.getfixturevalue("gpt2_tokenizer")

    return needs


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_single_text_is_split_at_its_end(needs, prepare, tokenizer):
    needs(tokenizer)
    write("poem.txt", POEM)
    made = prepare("custom", input="poem.txt", tokenizer=tokenizer, vocab_size=270)
    text = POEM.replace("\r\n", "\n")
    n = int(len(text) * 0.9)
    if tokenizer == "word":
        text, n = " ".join(find_words(text)) + " ", len(" ".join(find_words(text[:n]))) + 1
    assert (made.train, made.val) == (text[:n], text[n:])
    assert made.meta["source"] == "poem.txt" and made.tokenizer.eot not in made.ids("train")


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_files_of_many_kinds(shared_memory, needs, prepare, tokenizer):
    needs(tokenizer)
    datasets = pytest.importorskip("datasets")
    bodies = [f"file {'abcdefghijkl'[i] * 2} says hello to all of them" for i in range(12)]
    write("in/a.txt", bodies[0])
    write("in/b.md", bodies[1], "utf-16")
    write("in/deep/c.py", bodies[2])
    write("in/d.csv", f"n,text\n1,{bodies[3]}\n2,{bodies[4]}\n")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in bodies[5:7])
    write("in/e.jsonl", lines)
    datasets.Dataset.from_dict({"text": bodies[7:9]}).to_parquet("in/f.parquet")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in bodies[9:11])
    Path("in/g.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    Path("in/h.txt.gz").write_bytes(gzip.compress(bodies[11].encode()))
    Path("in/i.png").write_bytes(b"\x89PNG\0\0")
    write("in/.notes", "hidden")
    sources = "in/*.*,in/deep" if tokenizer == "byte" else "in"
    made = prepare("custom", input=sources, tokenizer=tokenizer, vocab_size=270, val_share=0.2)
    if tokenizer == "word":  # each document has one unique word, which is unknown
        bodies = ["file <|unknown|> says hello to all of them"] * 12
    assert [text.strip() for text in made.all_documents()] == sorted(bodies)
    assert len(made.documents("val")) == 3
    assert tokenizer == "word" or not set(made.documents("train")) & set(made.documents("val"))


def test_lines_and_columns(prepare):
    write("a.txt", "\n".join(f"line {i}" for i in range(40)))
    made = prepare("custom", input="a.txt", documents="lines", tokenizer="char")
    assert made.all_documents() == sorted(f"line {i}" for i in range(40))
    write("b.csv", "body,text\n" + "".join(f"body {i},-\n" for i in range(40)))
    again = prepare("custom", input="b.csv", column="body", tokenizer="char", data_dir="b")
    assert again.all_documents() == sorted(f"body {i}" for i in range(40))


def test_split_is_independent_of_the_files(prepare):
    texts = [f"text number {i}" for i in range(60)]
    for i, text in enumerate(texts):
        write(f"in/{i:02}.txt", text)
        write(f"reversed/{99 - i}.txt", text)
    write("one.csv", "text\n" + "".join(text + "\n" for text in texts + texts[:30]))
    first = prepare("custom", input="in", tokenizer="byte")
    for name in ("reversed", "one.csv"):
        other = prepare("custom", input=name, tokenizer="byte", data_dir=f"of-{name}")
        assert set(other.documents("val")) == set(first.documents("val"))
        assert set(other.documents("train")) == set(first.documents("train"))
    assert len(first.documents("val")) == 6


def test_vocabulary_matches_one_in_memory(prepare, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.setattr(
        "brisk.data.raw_files.PIECE", 1000
    )  # pieces end inside words, which must not be learned
    monkeypatch.setattr("brisk.data.tokenize_files.BATCH", 1000)
    rng = random.Random(1)
    text = "".join(f"word{rng.randrange(300)} " for _ in range(5000))
    write("a.txt", text)
    made = prepare("custom", input="a.txt", tokenizer="word", min_count=1)
    counts = Counter(text[: int(len(text) * 0.9)].split())
    assert {*made.tokenizer.words} <= {f"word{i}" for i in range(300)}
    assert made.tokenizer.words == [word for word, _ in counts.most_common()]
    made = prepare("custom", input="a.txt", tokenizer="bpe", vocab_size=300, data_dir="bpe")
    assert made.train + made.val == text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "--input=PATH"),
        ({"input": "missing.txt"}, "there are no files at missing.txt"),
        ({"input": "empty.txt"}, "empty.txt is empty"),
        ({"input": "empty.txt", "tokenizer": "bpe"}, "empty.txt is empty"),
        ({"input": "letter.txt"}, "no tokens are left for train"),
        ({"input": "two.csv", "column": "body"}, "has no column body; its columns are id, text"),
        ({"input": "head.csv"}, "has a header but no rows"),
        ({"input": "zeros.bin"}, "is not text"),
        ({"input": "twins"}, "all 2 documents are equal"),
        ({"input": "line.txt", "encoding": "klingon"}, "no such encoding"),
    ],
)
def test_unusable_input_is_one_line(prepare, settings, message):
    for name, content in (("empty.txt", ""), ("letter.txt", "a"), ("line.txt", "abc\n")):
        write(name, content)
    write("two.csv", "id,text\n1,a\n2,b\n")
    write("head.csv", "id,text\n")
    write("zeros.bin", "a\0b")
    write("twins/a.txt", "same")
    write("twins/b.txt", "same")
    assert message in prepare("custom", fails=True, **{"tokenizer": "char", **settings})


@pytest.mark.parametrize("name", ["words", "novel", "shakespeare_char", "custom"])
def test_short_text_is_noted_or_refused(prepare, name):
    text = "alpha beta gamma delta epsilon zeta"
    write("line.txt", text)
    char = {"tokenizer": "char"} if name == "custom" else {}
    made = prepare(name, input="line.txt", **char)
    assert "block_size must be smaller" in made.printed
    if name != "words":
        assert made.train + made.val == text
    for content in ("a", ""):
        write("tiny.txt", content)
        message = prepare(name, fails=True, input="tiny.txt", data_dir="tiny", **char)
        assert any(why in message for why in ("text is too short", "is empty", "has no words"))


def test_hub_name_without_network_is_one_line(script, tmp_path):
    pytest.importorskip("datasets")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    start = time.monotonic()
    done = script(
        "data/custom/prepare.py", "--input=someone/texts", f"--data_dir={tmp_path}", env=offline
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert (
        "there is no file or folder someone/texts" in done.stderr and time.monotonic() - start < 30
    )


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_characters_of_all_planes_round_trip(needs, prepare, tokenizer):
    needs(tokenizer)
    characters = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and i not in (0, 13)]
    chosen = characters[:3000] + characters[3000::61]
    random.Random(1).shuffle(chosen)
    text = "".join(chosen).replace("\ufeff", "") * 2
    write("planes.txt", text)
    made = prepare("custom", input="planes.txt", tokenizer=tokenizer, vocab_size=300)
    assert made.train + made.val == text
    assert {ord(character) >> 16 for character in made.train} == set(range(17))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=30), min_size=2, unique=True), st.sampled_from(["char", "byte"]))
def test_documents_round_trip(prepare, documents, tokenizer):
    for number in range(100):
        Path("in", f"{number}.txt").unlink(missing_ok=True)
    documents = [text for text in documents if not {"\0", "\r"} & set(text)]
    documents = [text.removeprefix("\ufeff") for text in documents if text]
    if len(set(documents)) < 2:
        return
    for number, text in enumerate(documents):
        write(f"in/{number}.txt", text)
    made = prepare("custom", input="in", tokenizer=tokenizer)
    assert made.all_documents() == sorted(documents)


# ----------------------------------------------------------------------------- joining


def test_join_refuses_different_tokenizers(tmp_path):
    pytest.importorskip("tokenizers")
    splits = {"train": ["abc " * 50], "val": ["ab"]}
    made = {
        "byte": ByteTokenizer(),
        "char": CharTokenizer("abc "),
        "cha": CharTokenizer(" abc"),
        "bpe": train_bpe(splits["train"], 258),
    }
    for name, tokenizer in made.items():
        write_dataset(tmp_path / name, tokenizer, splits, name)
    for pair in [("byte", "char"), ("char", "cha"), ("byte", "bpe")]:
        with pytest.raises(UserError, match="have different tokenizers"):
            join_datasets(tmp_path, [tmp_path / name for name in pair], "both")
        assert not (tmp_path / "train.bin").exists()


# ----------------------------------------------------------------------------- memory

# Peak memory of a process and its workers in MB, measured in a new process.
MEASURE = """
import re, resource, runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
own = int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
print(own // 1024, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def peak_of_custom(*argv):
    if not sys.platform.startswith("linux"):
        pytest.skip("memory is measured by what Linux says of a process")
    script = ROOT / "data" / "custom" / "prepare.py"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, script, *argv], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return max(map(int, done.stdout.splitlines()[-1].split()))


def write_large(path, megabytes):
    """Lines of words: the same block of two megabytes, repeated."""
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(1, 9))) for _ in range(20_000)]
    block = "".join(" ".join(rng.choices(words, k=12)) + "\n" for _ in range(28_000))
    with open(path, "w") as file:
        for _ in range(1 + int(megabytes * 1e6 / len(block))):
            file.write(block)


@pytest.mark.parametrize(("tokenizer", "megabytes"), [("char", 100), ("byte", 200), ("bpe", 30)])
def test_memory_is_independent_of_text_size(needs, tmp_path, tokenizer, megabytes):
    needs(tokenizer)
    write_large(tmp_path / "large.txt", megabytes)
    options = ["--bpe_sample=1", "--vocab_size=300", "--num_proc=2"]
    settings = [f"--input={tmp_path / 'large.txt'}", f"--data_dir={tmp_path}", *options]
    peak = peak_of_custom(*settings, f"--tokenizer={tokenizer}")
    assert peak < (250 if tokenizer == "bpe" else 150)


def test_memory_is_independent_of_line_length(tmp_path):
    with open(tmp_path / "line.txt", "w", encoding="utf-8") as file:
        piece = "".join(random.Random(1).choices("abcde的了", k=10**6))
        for _ in range(40):
            file.write(piece)
    settings = [f"--input={tmp_path / 'line.txt'}", f"--data_dir={tmp_path}"]
    assert peak_of_custom(*settings, "--tokenizer=char") < 220


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_two_gigabytes_of_text(needs, tmp_path, tokenizer):
    needs(tokenizer)
    write_large(tmp_path / "large.txt", 2000)
    settings = [f"--input={tmp_path / 'large.txt'}", f"--data_dir={tmp_path}"]
    peak = peak_of_custom(*settings, f"--tokenizer={tokenizer}")
    print(f"{tokenizer}: {peak} MB at most")
    assert peak < 1000


# ----------------------------------------------------------------------------- FineWeb-Edu


@pytest.fixture
def shards(needs, prepare, tmp_path):
    """Three parquet files of 200 documents each, in the folder `in`."""
    needs("gpt2")
    datasets = pytest.importorskip("datasets")
    Path("in").mkdir()
    for number in range(3):
        texts = [f"shard {number} has a document {i}, 你好" for i in range(200)]
        ids = [f"{number}-{i}" for i in range(200)]
        datasets.Dataset.from_dict({"text": texts, "id": ids}).to_parquet(f"in/00{number}.parquet")
    return lambda **options: prepare("fineweb_edu", source="in", val_share=0.1, **options)


def in_order(folders, split):
    return b"".join((folder / f"{split}.bin").read_bytes() for folder in sorted(folders))


def test_shards_are_joined(shards):
    made = shards()
    folders = list((made.folder / "shards").iterdir())
    assert sorted(folder.name for folder in folders) == ["000", "001", "002"]
    assert made.bins() == [in_order(folders, "train"), in_order(folders, "val")]
    expected = [f"shard {n} has a document {i}, 你好" for n in range(3) for i in range(200)]
    assert made.all_documents() == sorted(expected)
    assert 30 < len(made.documents("val")) < 90
    for split in ("train", "val"):
        text, raw = made.text(split), (made.folder / f"{split}.bin").read_bytes()
        assert made.meta["splits"][split] == {
            "tokens": len(raw) // 2,
            "bytes": len(text.replace(EOT, "").encode()),
            "characters": len(text.replace(EOT, "")),
            "documents": text.count(EOT),
            "sha256": dataset.hashlib.sha256(raw).hexdigest(),
        }


def test_killed_shards_continue_and_grow(shards, monkeypatch):
    whole = shards(data_dir="whole")
    first = shards(shards=1)
    assert first.bins()[0] == whole.bins()[0][: len(first.bins()[0])]
    for moves in (1, 2):  # killed after moving meta.json, or train.bin too
        left, replace = [moves], type(whole.folder).replace

        def dying(path, target, left=left, replace=replace):
            if "shards" in str(target) and path.parent.name == ".writing":
                if path.suffix in (".json", ".bin") and not left[0]:
                    raise KeyboardInterrupt
                left[0] -= path.suffix in (".json", ".bin")
            return replace(path, target)

        monkeypatch.setattr(type(whole.folder), "replace", dying)
        with pytest.raises(KeyboardInterrupt):
            shards()
        monkeypatch.setattr(type(whole.folder), "replace", replace)
        assert not (first.folder / "shards" / "001" / "val.bin").exists()
    (first.folder / ".writing-old").mkdir()  # from a process killed while joining
    made = shards()
    assert made.printed.count("exists already") == 1
    assert made.bins() == whole.bins() and made.meta == whole.meta
    assert not (first.folder / ".writing-old").exists()
    assert shards().printed.count("exists already") == 3


def test_unusable_shards_are_one_line(shards, prepare):
    settings = {"fails": True, "val_share": 0.1}
    assert "must have at least one file" in prepare("fineweb_edu", source="nowhere", **settings)
    assert "no files at a/b/c" in prepare("fineweb_edu", source="a/b/c", **settings)
    Path("twice/in").mkdir(parents=True)
    Path("twice/000.parquet").write_bytes(Path("in/000.parquet").read_bytes())
    Path("twice/in/000.parquet").write_bytes(Path("in/001.parquet").read_bytes())
    assert "no two with the same name" in prepare("fineweb_edu", source="duplicate", **settings)
    write("damaged/a.parquet", "not a parquet file")
    assert "a.parquet" in prepare("fineweb_edu", source="damaged", **settings)


def test_hub_without_network_is_one_line(script, tmp_path):
    pytest.importorskip("huggingface_hub")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = script("data/fineweb_edu/prepare.py", f"--data_dir={tmp_path}", env=offline)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "cannot list the files of HuggingFaceFW/fineweb-edu" in done.stderr
