"""The data sets of reviews, words and novels, decoded from their files."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest

from brisk.data.tokenizer import find_words

DATA = Path(os.environ.get("BRISK_DATA") or "nowhere")


@pytest.fixture
def prepare(prepare_here):
    return prepare_here


def write(name, text, encoding="utf-8"):
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(text.encode(encoding))
    return name


# ----------------------------------------------------------------------------- reviews


@pytest.fixture
def reviews(prepare):
    """A csv of 200 good, 50 bad and 7 other reviews, and 30 duplicates."""
    rows = [f'"好看 {i}, 真的",1' for i in range(200)] + [f'"难看 {i}\nvery",0' for i in range(50)]
    rows += [f"odd {i},x" for i in range(7)]
    rows += rows[:20] + rows[200:205]
    rows += ['" 好看 1, 真的 ",1'] * 5  # duplicates except for spaces
    random.Random(1).shuffle(rows)
    return write("reviews.csv", "\n".join(["review,sentiment", *rows]))


def labels(documents):
    return Counter({"好": "1", "难": "0", "o": "x"}[text[0]] for text in documents)


def test_reviews_are_split_by_label(prepare, reviews):
    made = prepare("reviews", input=reviews)
    assert len(set(made.all_documents())) == len(made.all_documents()) == 257
    assert "50 labelled 0, 200 labelled 1, 7 labelled x; 30 duplicates removed" in made.printed
    assert labels(made.documents("val")) == {"1": 20, "0": 5, "x": 1}
    assert labels(made.documents("train")) == {"1": 180, "0": 45, "x": 6}
    assert "难看 3\nvery" in made.all_documents()


def test_balance_changes_training_only(prepare, reviews):
    plain = prepare("reviews", input=reviews)
    balanced = prepare("reviews", "--balance", input=reviews, data_dir="balanced")
    assert labels(balanced.documents("train")) == {"1": 180, "0": 180, "x": 180}
    assert set(balanced.documents("train")) == set(plain.documents("train"))
    repeats = Counter(text for text in balanced.documents("train") if text[0] == "难")
    assert set(repeats.values()) == {4}
    assert balanced.bins()[1] == plain.bins()[1]


def test_label_prompts(prepare, reviews):
    plain = prepare("reviews", input=reviews)
    made = prepare("reviews", "--label_prompt", input=reviews, data_dir="prompted")
    words = {"好": "好评：", "难": "差评：", "o": "x: "}
    assert made.documents("val") == [words[text[0]] + text for text in plain.documents("val")]
    other = prepare("reviews", "--label_prompt", input=reviews, prompts="1=Good: ", data_dir="o")
    assert (
        "Good: 好看 1, 真的" in other.all_documents() and "0: 难看 1\nvery" in other.all_documents()
    )


def test_windows_are_one_text(prepare, reviews):
    plain = prepare("reviews", input=reviews)
    made = prepare("reviews", input=reviews, rows="windows", data_dir="lines")
    for split in ("train", "val"):
        expected = [text.replace("\n", " ") for text in plain.documents(split)]
        assert made.text(split) == "".join(line + "\n" for line in expected)
    assert made.tokenizer.eot is None


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        ("review,sentiment\n", {}, "text is too short"),
        ("", {}, "is empty"),
        ("text,stars\na,1\n", {}, "has no column review; its columns are text, stars"),
        (
            "text,stars\na,1\n",
            {"column": "text"},
            "has no column sentiment; its columns are text, stars",
        ),
        ("review,sentiment\na,1\n", {}, "no tokens are left for val"),
    ],
)
def test_unusable_reviews_are_one_line(prepare, content, changes, message):
    file = write("a.csv", content)
    assert message in prepare("reviews", fails=True, input=file, **changes)


def test_reviews_in_another_encoding(prepare, reviews):
    made = prepare("reviews", input=reviews)
    text = Path(reviews).read_text()
    write("gb.csv", text, "gb18030")
    write("marked.csv", "\ufeff" + text.replace("\n", "\r\n"))
    assert prepare("reviews", input="gb.csv", data_dir="gb").bins() == made.bins()
    assert prepare("reviews", input="marked.csv", data_dir="marked").bins() == made.bins()


@pytest.mark.skipif(not (DATA / "reviews.csv").exists(), reason="BRISK_DATA has no reviews.csv")
def test_the_film_reviews(prepare, monkeypatch):
    monkeypatch.setenv("BRISK_DATA", str(DATA))
    made = prepare("reviews", "--label_prompt")
    assert "680 labelled 0, 4,174 labelled 1; 146 duplicates removed" in made.printed
    train, val = made.documents("train"), made.documents("val")
    assert (len(train), len(val), len(set(train + val))) == (4369, 485, 4854)
    bad = [sum(text.startswith("差评：") for text in part) for part in (train, val)]
    assert bad == [612, 68] and all(text[:3] in ("差评：", "好评：") for text in train + val)
    balanced = prepare("reviews", "--balance", "--label_prompt", data_dir="balanced")
    counts = Counter(text[:2] for text in balanced.documents("train"))
    assert counts == {"好评": 3757, "差评": 3757} and balanced.documents("val") == val


# ----------------------------------------------------------------------------- words

ABSTRACT = "The clustering of texts. A text is clustered by its words, and the words by texts!\n"


def test_words_without_stop_words(prepare):
    write("a.txt", ABSTRACT * 10)
    made = prepare("words", input="a.txt")
    kept = [word for word in find_words(ABSTRACT) if word not in ("the", "of", "a", "is")]
    kept = [word for word in kept if word not in ("by", "its", "and")]
    assert made.tokenizer.words[:2] == ["texts", "words"]
    assert (made.train + made.val).split()[: len(kept)] == kept
    assert made.meta["splits"]["train"]["tokens"] == len(made.train.split())
    every = prepare("words", input="a.txt", stop_words="none", data_dir="all", lower=False)
    assert every.train.startswith("The clustering of texts A text is clustered by its words and ")
    write("stop.txt", "\ufeffclustering\r\nTexts\r\n", "utf-16-le")
    own = prepare("words", input="a.txt", stop_words="stop.txt", data_dir="own")
    assert own.train.startswith("the of a text is clustered by its words and the words by the of ")


def test_words_are_learned_from_training_only(prepare):
    write("a.txt", "one two two three three three " * 30 + "four five " * 10)
    made = prepare("words", input="a.txt", min_count=31)
    assert made.tokenizer.words == ["three", "two"] and made.tokenizer.unk == 2
    made = prepare("words", input="a.txt", stop_words="none")
    assert "four" not in made.tokenizer.words and "four" not in made.val
    assert made.val.split()[-1] == "<|unknown|>" and " are unknown" in made.printed


@pytest.mark.skipif(not (DATA / "words.txt").exists(), reason="BRISK_DATA has no words.txt")
def test_the_abstracts_in_words(prepare, monkeypatch):
    monkeypatch.setenv("BRISK_DATA", str(DATA))
    made = prepare("words", stop_words=DATA / "stopwords.txt")
    stop_words = set((DATA / "stopwords.txt").read_text().lower().split())
    text = (DATA / "words.txt").read_text()
    words = [word for word in find_words(text[: int(len(text) * 0.9)]) if word not in stop_words]
    assert made.train.split() == words
    assert made.tokenizer.words == [word for word, _ in Counter(words).most_common()]


# ----------------------------------------------------------------------------- a novel

CHINESE = {
    "numbered": [
        "第一章　风雪\n那年冬天。",
        "第十二回 梨花\n春天到了。",
        "第3章\n夏天。",
        "　　楔子\n秋。",
    ],
    "bare": ["一　開頭\n那年冬天。", "二\n" + "春天到了，" * 30, "十、末尾\n完。"],
    "english": [
        "Chapter 1\nIt was cold.",
        "CHAPTER II. Spring\nIt was warm.",
        "chapter three\nHot.",
    ],
}


@pytest.mark.parametrize("kind", CHINESE)
@pytest.mark.parametrize("before", ["", "书名\n作者\n\n"])
def test_chapters_begin_with_their_heading(prepare, kind, before):
    chapters = CHINESE[kind]
    write("a.txt", before + "\n\n\n".join(chapters) + "\n")
    made = prepare("novel", input="a.txt", val_share=0.3)
    expected = [before.strip()] * bool(before) + [chapter.strip() for chapter in chapters]
    assert made.documents("train") + made.documents("val") == expected
    assert len(made.documents("val")) == round(0.3 * len(expected))
    assert f"in {len(expected)} chapters" in made.printed


def test_novel_is_independent_of_encoding(prepare):
    text = "\n".join(
        f"第{n}章　風雪\n那年冬天，雪下得很大。他推開門，看見一個人。" for n in "一二三四"
    )
    bins = []
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "gb18030", "big5"):
        write("a.txt", text.replace("\n", "\r\n"), encoding)
        bins.append(prepare("novel", input="a.txt", data_dir=encoding).bins())
    assert all(each == bins[0] for each in bins)


def test_novel_with_other_chapters(prepare):
    text = "Es war einmal ein König.\n* * *\nUnd wenn er nicht gestorben ist.\n" * 20
    write("a.txt", text)
    made = prepare("novel", input="a.txt", val_share=0.25)
    assert made.train + made.val == text and made.tokenizer.eot is None
    assert len(made.val) == len(text) - int(len(text) * 0.75)
    made = prepare("novel", input="a.txt", chapters=r"^\* \* \*", data_dir="stars")
    assert len(made.all_documents()) == 21 and len(made.documents("val")) == 2
    assert prepare("novel", input="a.txt", chapters="", data_dir="none").train in text


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "*"])
def test_invalid_pattern_is_one_line(prepare, pattern):
    write("a.txt", "text")
    message = prepare("novel", fails=True, input="a.txt", chapters=pattern)
    assert f"--chapters={pattern} is not a regular expression: " in message
