"""`prepare`: any text becomes a data set in one call, and the same text is reused."""

import json
import os
from pathlib import Path

import pytest

from brisk.data.dataset import load_tokenizer, read_meta
from brisk.data.documents import Corpus
from brisk.data.prepare import TextStats, choose_tokenizer, measure_text, prepare
from brisk.errors import UserError

TEXT = "Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch.\n" * 20


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("my.txt").write_text(TEXT, encoding="utf-8")


def modified(folder):
    return {file: (Path(folder) / file).stat().st_mtime_ns for file in os.listdir(folder)}


# ----------------------------------------------------------------------------- statistics


def test_text_stats():
    Path("my.txt").write_text("ab 你好!\n", encoding="utf-8")
    stats = measure_text(Corpus("my.txt"))
    assert stats == TextStats(11, 7, True, 7, 2 / 7, 4 / 7)
    assert measure_text([]) == TextStats(0, 0, True, 0, 0, 0)


def test_text_stats_of_a_long_text():
    stats = measure_text(["ä" * 10**6] * 20, size=40_000_000, limit=10_000)
    assert (stats.bytes, stats.characters, stats.is_whole) == (40_000_000, 20_000_000, False)


def stats(size, distinct=90, cjk=0.0):
    return TextStats(size, size, True, distinct, cjk, 0.8)


def test_tokenizer_by_size_and_script():
    assert choose_tokenizer(stats(10**4)) == ("char", 0)
    assert choose_tokenizer(stats(10**9, distinct=13)) == ("char", 0)  # sums
    assert choose_tokenizer(stats(10**6, distinct=3000, cjk=0.8)) == ("char", 0)
    assert choose_tokenizer(stats(10**7, distinct=3000, cjk=0.8)) == ("bpe", 8192)
    sizes = [choose_tokenizer(stats(size)) for size in (10**5, 10**6, 4 * 10**6, 10**7, 10**11)]
    assert sizes == [("bpe", size) for size in (1024, 2048, 4096, 8192, 8192)]


def test_characters_without_tokenizers(monkeypatch, capsys):
    monkeypatch.setattr("brisk.data.prepare.find_spec", lambda name: None)
    Path("long.txt").write_text("".join(f"sentence {i}, Öl\n" for i in range(3000)))
    assert load_tokenizer(prepare("long.txt")).kind == "char"
    assert "pip install tokenizers" in capsys.readouterr().err


# ----------------------------------------------------------------------------- folders


def test_same_text_is_reused(capsys):
    folder = prepare("my.txt")
    assert folder == Path("data/my") and read_meta(folder)["source"] == "my.txt"
    before = modified(folder)
    os.utime("my.txt", (0, 0))  # only the contents matter
    Path("my.txt").rename("other.txt")
    assert prepare("other.txt", folder) == folder
    assert modified(folder) == before
    assert "using it" in capsys.readouterr().out


def test_other_text_gets_another_folder(capsys):
    first = prepare("my.txt", tokenizer="char")
    second = prepare("my.txt", tokenizer="byte")
    Path("my.txt").write_text(TEXT[::-1], encoding="utf-8")
    third = prepare("my.txt", tokenizer="char")
    assert [path.name for path in (first, second, third)] == ["my", "my-2", "my-3"]
    assert "using data/my-3" in capsys.readouterr().out
    assert prepare("my.txt", tokenizer="byte") == Path("data/my-4")
    with pytest.raises(UserError, match="data/my was made from another text"):
        prepare("my.txt", "data/my", tokenizer="char")
    assert load_tokenizer(first).characters == sorted(set(TEXT))


def test_foreign_folder_is_unchanged():
    Path("data/my").mkdir(parents=True)
    Path("data/my/prepare.py").write_text("")
    assert prepare("my.txt", tokenizer="char") == Path("data/my-2")
    with pytest.raises(UserError, match="data/my was made from another text"):
        prepare("my.txt", "data/my", tokenizer="char")


@pytest.mark.parametrize("lost", ["val.bin", "train.bin"])
def test_damaged_set_is_remade(lost):
    folder = prepare("my.txt", tokenizer="char")
    whole = (folder / lost).read_bytes()
    (folder / lost).unlink()
    assert prepare("my.txt", tokenizer="char") == folder
    (folder / lost).write_bytes(whole[:-2])
    assert prepare("my.txt", tokenizer="char") == folder
    assert (folder / lost).read_bytes() == whole


def test_meta_has_no_local_paths(tmp_path):
    folder = prepare(str(tmp_path / "my.txt"))
    assert str(tmp_path) not in json.dumps(read_meta(folder))


def test_file_changed_during_reading_is_one_line(monkeypatch):
    def growing(corpus, size):
        with open("my.txt", "a") as file:
            file.write("more")
        return measure_text(corpus)

    monkeypatch.setattr("brisk.data.prepare.measure_text", growing)
    with pytest.raises(UserError, match=r"my\.txt changed during reading"):
        prepare("my.txt")
    assert not Path("data/my/train.bin").exists()


def test_fifo_is_refused():
    os.mkfifo("pipe.txt")
    for name in ("pipe.txt", "/dev/null"):
        with pytest.raises(UserError, match="is not a regular file"):
            prepare(name)


# ----------------------------------------------------------------------------- tokens


def test_vocabulary_is_limited_by_the_text(capsys):
    pytest.importorskip("tokenizers")
    folder = prepare("my.txt", tokenizer="bpe", vocab_size=8192)
    made = load_tokenizer(folder)
    assert 257 < made.vocab_size < 400
    assert f"using {made.vocab_size}" in capsys.readouterr().out
    folder = prepare("my.txt", "words", tokenizer="word", vocab_size=8192)
    assert len(load_tokenizer(folder).words) == 12
    assert "only 12 words" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [("!!! … ???\n" * 20, "has no words"), ("no word of it twice", "use a smaller --min_count")],
)
def test_text_without_words_is_one_line(text, message):
    Path("my.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        prepare("my.txt", tokenizer="word")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the of and to in the the of\n", "no words except stop words"),
        ("apples and pears\n" * 9 + "the of and the of\n" * 3, "has only stop words"),
    ],
)
def test_text_of_stop_words_is_one_line(prepare_here, text, message):
    Path("my.txt").write_text(text)
    assert message in prepare_here("words", fails=True, input="my.txt")


def test_names_that_are_not_utf8(script, tmp_path):
    """File names on Linux are bytes, and these are not UTF-8."""
    name, folder = (os.fsdecode(os.fsencode(tmp_path) + end) for end in (b"/t\xfe.txt", b"/d\xff"))
    try:
        Path("my.txt").rename(name)
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    for _ in range(2):
        done = script("data/custom/prepare.py", f"--input={name}", f"--data_dir={folder}")
        assert done.returncode == 0, done.stderr
    assert load_tokenizer(folder).characters == sorted(set(TEXT))
    made = prepare(name)
    assert made == Path("data/t") == prepare(name)
