"""Tokenizing on several cores, in parts, or after an interruption gives the same files."""

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_dataset import DOCUMENTS, small_bpe, write

from brisk.data import tokenize_files
from brisk.data.tokenizer import ByteTokenizer, CharTokenizer
from brisk.errors import UserError, one_line_errors


def test_workers_match_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_files, "BATCH", 100)
    tokenizer = small_bpe()
    alone = write(tmp_path / "alone", tokenizer, end_documents=True, workers=1)
    shared = write(tmp_path / "shared", tokenizer, DOCUMENTS, end_documents=True, workers=2)
    assert shared == alone
    same = [(tmp_path / who / "train.bin").read_bytes() for who in ("alone", "shared")]
    assert same[0] == same[1]


def test_pending_batches_are_bounded(monkeypatch):
    monkeypatch.setattr(tokenize_files, "BATCH", 100)
    taken = 0

    def many():
        nonlocal taken
        for _ in range(500):
            taken += 1
            yield "x" * 100

    batches = ((batch, "") for batch in tokenize_files.batched(many()))
    results = tokenize_files.encode(small_bpe(), batches, workers=1)
    next(results)
    assert taken <= tokenize_files.FEW_BATCHES + 1
    batches = ((batch, "") for batch in tokenize_files.batched(many()))
    results = tokenize_files.encode(small_bpe(), batches, workers=2)
    next(results)
    results.close()
    assert taken < 40


PIECES = st.lists(st.sampled_from(["a", "7", "_", " ", "\n", "\r\n", "é", "的", "'s", "!", "\x85"]))


@settings(deadline=None, max_examples=300)
@given(PIECES.map("".join))
def test_parts_have_the_ids_of_the_document(text):
    tokenizer = small_bpe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenize_files, "BATCH", 3)
        parts, ends = zip(*tokenize_files.parts(text), strict=True)
    assert "".join(parts) == text and ends == (False,) * (len(parts) - 1) + (True,)
    ids = [i for part in parts for i in tokenizer.encode(part).tolist()]
    assert ids == tokenizer.encode(text).tolist()


def test_document_without_a_safe_split(monkeypatch):
    monkeypatch.setattr(tokenize_files, "BATCH", 3)
    monkeypatch.setattr(tokenize_files, "LONGEST", 12)
    text = "的，" * 100
    cut = [part for part, _ in tokenize_files.parts(iter(text))]
    assert "".join(cut) == text and max(map(len, cut)) <= 15


def test_empty_documents_are_in_bounded_batches():
    batch = next(tokenize_files.batched("" for _ in range(10**6)))
    assert len(batch) < 20_000


# ----------------------------------------------------------------------------- interruptions

TEXTS = [f"Document {i}.\nIt is about {i * i}, {'and so on ' * (i % 7)}你好.\n" for i in range(300)]


class Killed(BaseException):
    pass


@pytest.fixture
def killed(tmp_path, monkeypatch):
    """`killed(after)`: a run that dies after this many batches, with its progress saved.
    `killed.encoded` lists the batches encoded since then."""
    monkeypatch.setattr(tokenize_files, "BATCH", 1000)
    monkeypatch.setattr(tokenize_files, "SAVE_EVERY", -1)
    encode_batch = tokenize_files.encode_batch

    def run(after, texts=TEXTS, tokenizer=None):
        def dying(tokenizer, batch, end_documents):
            if len(run.encoded) == after:
                raise Killed
            run.encoded.append(batch)
            return encode_batch(tokenizer, batch, end_documents)

        run.encoded = []
        monkeypatch.setattr(tokenize_files, "encode_batch", dying)
        with pytest.raises(Killed):
            write(tmp_path / "data", tokenizer or ByteTokenizer(), texts, workers=1)
        run.encoded, after = [], None

    return run


def finish(tmp_path, killed, texts=TEXTS, tokenizer=None):
    """Run again to the end, and compare the files with those of a run in an empty folder. Returns
    the number of batches tokenized."""
    tokenizer = tokenizer or ByteTokenizer()
    written = write(tmp_path / "data", tokenizer, texts, workers=1)
    encoded = len(killed.encoded)
    assert written == write(tmp_path / "fresh", tokenizer, texts, workers=1)
    for name in ("train.bin", "val.bin", "meta.json"):
        assert (tmp_path / "data" / name).read_bytes() == (tmp_path / "fresh" / name).read_bytes()
    assert not (tmp_path / "data" / ".writing").exists()
    return encoded


def in_all(texts=TEXTS):
    """The number of batches in the training text, and one for validation."""
    return len(list(tokenize_files.batched(texts))) + 1


@pytest.mark.parametrize("after", [0, 1, 5, 14])
def test_killed_process_is_continued(tmp_path, killed, after):
    killed(after)
    assert finish(tmp_path, killed) == in_all() - after


def test_repeated_kills_are_continued(tmp_path, killed):
    killed(4)
    killed(4)
    killed(4)
    assert finish(tmp_path, killed) == in_all() - 12


def test_finished_split_is_not_repeated(tmp_path, killed):
    killed(in_all() - 1)  # during validation
    assert finish(tmp_path, killed) == 1


@pytest.mark.parametrize("place", [0, 60, 299])
def test_changed_text_starts_over(tmp_path, killed, place):
    killed(14)
    changed = [*TEXTS]
    changed[place] = changed[place].replace("It", "it")
    encoded = finish(tmp_path, killed, changed)
    assert encoded == in_all() - (14 if place == 299 else 0)  # the last one was not in a batch yet


def test_changed_document_border_starts_over(tmp_path, killed):
    killed(5)
    joined = [TEXTS[0] + TEXTS[1], *TEXTS[2:]]
    assert finish(tmp_path, killed, joined) == in_all(joined)


def test_text_with_another_end(tmp_path, killed):
    killed(10)
    assert finish(tmp_path, killed, [*TEXTS, "more of it"]) <= in_all() - 9
    killed(2, [*TEXTS, "other"])
    finish(tmp_path, killed, TEXTS[:5])


def test_another_tokenizer_starts_over(tmp_path, killed):
    killed(10)
    characters = CharTokenizer(sorted(set("".join(TEXTS) + "a")))
    assert finish(tmp_path, killed, tokenizer=characters) == in_all()
    killed(10, tokenizer=characters)
    assert finish(tmp_path, killed) == in_all()


def test_other_end_documents_starts_over(tmp_path, killed):
    killed(10)
    meta = write(tmp_path / "data", ByteTokenizer(), TEXTS, end_documents=True, workers=1)
    assert meta["splits"]["train"]["tokens"] == len("".join(TEXTS).encode()) + len(TEXTS)


@pytest.mark.parametrize(
    ("name", "damage", "anew"),
    [
        ("train.bin", lambda raw: raw[:-1], True),
        ("train.bin", lambda raw: b"", True),
        ("train.bin", lambda raw: raw[:50] + b"\0\0" + raw[52:], True),
        ("train.bin", lambda raw: raw + b"half a batch", False),
        ("train.bin", lambda raw: raw + b"more than there will be " * 5000, False),
        ("train.progress", lambda raw: b"", True),
        ("train.progress", lambda raw: raw[:-3], True),
        ("train.progress", lambda raw: b"{}", True),
        ("train.progress", lambda raw: b"[1]", True),
        ("train.progress", lambda raw: b"\xff\xfe", True),
        ("made-with", lambda raw: raw[:-1], True),
    ],
)
def test_damaged_partial_file_is_detected(tmp_path, killed, name, damage, anew):
    killed(10)
    file = tmp_path / "data" / ".writing" / name
    file.write_bytes(damage(file.read_bytes()))
    assert finish(tmp_path, killed) == in_all() - 10 * (not anew)


def test_missing_partial_file_is_detected(tmp_path, killed):
    killed(10)
    (tmp_path / "data" / ".writing" / "train.bin").unlink()
    assert finish(tmp_path, killed) == in_all()


def test_no_semaphores_means_one_process(tmp_path, monkeypatch, capsys):
    """For example, on Linux without a writable /dev/shm."""

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tokenize_files, "BATCH", 100)
    monkeypatch.setattr("_multiprocessing.SemLock", refused)
    shared = write(tmp_path / "shared", small_bpe(), TEXTS, workers=2)
    assert "in one process" in capsys.readouterr().out
    assert shared == write(tmp_path / "alone", small_bpe(), TEXTS, workers=1)


@pytest.mark.parametrize("texts", [TEXTS, ["another", *TEXTS]], ids=["the same", "another text"])
def test_interruption_ends_the_progress_line(tmp_path, killed, capsys, texts):
    """The bar is shown at once if a file is continued or started over."""
    killed(10)

    def interrupted():
        yield from texts[:300]
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left, one_line_errors():
        write(tmp_path / "data", ByteTokenizer(), interrupted(), workers=1)
    err = capsys.readouterr().err
    assert left.value.code == 130 and err.endswith("\ninterrupted\n") and "tokenizing" in err


def test_killed_workers_are_reported(shared_memory, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenize_files, "BATCH", 1000)
    monkeypatch.setattr(tokenize_files, "SAVE_EVERY", -1)

    def texts():
        for number, text in enumerate(TEXTS):
            if number == 250:
                for child in multiprocessing.active_children():
                    os.kill(child.pid, signal.SIGKILL)
            yield text

    class Deadly:
        def __iter__(self):
            return texts()

    with pytest.raises(UserError, match="it continues from here"):
        write(tmp_path / "data", small_bpe(), Deadly(), workers=2)
    noted = json.loads((tmp_path / "data" / ".writing" / "train.progress").read_text())
    assert noted["batches"] > 0
    written = write(tmp_path / "data", small_bpe(), TEXTS, workers=2)
    assert written == write(tmp_path / "fresh", small_bpe(), TEXTS, workers=1)


def test_second_process_is_refused(tmp_path):
    from filelock import FileLock

    (tmp_path / ".writing").mkdir()
    (tmp_path / ".writing" / "train.progress").write_text("of the first")
    with FileLock(tmp_path / ".writing" / "lock"):
        with pytest.raises(UserError, match="another process is writing to"):
            write(tmp_path, ByteTokenizer())
        assert (tmp_path / ".writing" / "train.progress").read_text() == "of the first"


# ----------------------------------------------------------------------------- subprocesses


@pytest.fixture(scope="module")
def big_text(tmp_path_factory):
    """A text that takes some seconds to tokenize, and the files of an uninterrupted run."""
    pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("big")
    rng = random.Random(1)
    words = ["".join(rng.choices("etaoinshrdlu的了", k=rng.randint(1, 9))) for _ in range(5000)]
    lines = (" ".join(rng.choices(words, k=12)) + "\n" for _ in range(600_000))
    (folder / "big.txt").write_text("".join(lines), encoding="utf-8")
    command = [sys.executable, ROOT / "data" / "custom" / "prepare.py"]
    command += [f"--input={folder / 'big.txt'}", "--bpe_sample=1", "--vocab_size=400"]
    command += ["--num_proc=2"]

    def start(data_dir, **options):
        return subprocess.Popen(
            [*command, f"--data_dir={data_dir}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    undisturbed = start(folder / "undisturbed")
    assert undisturbed.wait(timeout=200) == 0, undisturbed.stderr.read()
    return start, folder / "undisturbed"


def wait_for_progress(process, data_dir, batches=0):
    """Wait until the saved progress exceeds this many batches. Returns the progress."""
    note = data_dir / ".writing" / "train.progress"
    while process.poll() is None:
        if note.exists() and (noted := json.loads(note.read_text())["batches"]) > batches:
            return noted
        time.sleep(0.02)
    return None


def same(one, other):
    names = ("train.bin", "val.bin", "meta.json")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def test_process_killed_repeatedly_finishes(tmp_path, big_text):
    start, undisturbed = big_text
    note = tmp_path / ".writing" / "train.progress"
    batches = 0
    for number, sent in enumerate([signal.SIGKILL, signal.SIGINT, signal.SIGKILL]):
        process = start(tmp_path)
        noted = wait_for_progress(process, tmp_path, batches)
        if number > 0 and process.returncode == 0:
            break  # on a fast machine it may finish first
        assert noted, process.stderr.read()
        if number == 0:
            second = start(tmp_path)  # at the same time
            status = second.wait(timeout=60)
            if status == 0 and process.wait(timeout=60) == 0:
                break  # the first finished before the second started
            assert status == 2
            refusal = second.stderr.read().splitlines()
            assert len(refusal) == 1 and "another process is writing to" in refusal[0]
        time.sleep(random.random() / 2)
        group = os.getpgid(process.pid)  # Ctrl-C reaches all processes of the terminal
        os.killpg(group, sent)
        assert process.wait(timeout=60) != 0
        if sent == signal.SIGINT:
            last = process.stderr.read().splitlines()[-1]
            assert process.returncode == 130 and last == "interrupted"
        batches = json.loads(note.read_text())["batches"]  # the next one must make progress
        assert not (tmp_path / "train.bin").exists()
    process = start(tmp_path)
    assert process.wait(timeout=200) == 0, process.stderr.read()
    assert same(tmp_path, undisturbed)
    assert not (tmp_path / ".writing").exists()
