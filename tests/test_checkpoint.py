"""Checkpoint files: atomic writes, and detection of damaged and foreign files."""

import os
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_checkpoint, same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from brisk import checkpoint as module
from brisk.checkpoint import (
    archive_previous_run,
    best_checkpoint,
    latest_checkpoint,
    link_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from brisk.errors import UserError
from model import GPTConfig


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "ckpt.pt"
    save_checkpoint(make_checkpoint(), path)
    return path


# ----------------------------------------------------------------------------- there and back


def test_save_and_load(saved):
    expected = make_checkpoint()
    loaded = load_checkpoint(saved)
    loaded["optimizer"] = {**loaded["optimizer"]}
    assert same(loaded, expected | {"model": dict(expected["model"])})
    assert os.listdir(saved.parent) == ["ckpt.pt"]  # no temporary file remains


def test_old_nanogpt_names_are_cleaned(tmp_path):
    checkpoint = make_checkpoint()
    state = dict(checkpoint["model"])
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8)}
    for old in (
        {f"_orig_mod.{name}": weight for name, weight in state.items()},
        state | mask,
        {name: weight for name, weight in state.items() if name != "lm_head.weight"},
        {name: weight for name, weight in state.items() if name != "transformer.wte.weight"},
    ):
        torch.save(checkpoint | {"model": old}, tmp_path / "ckpt.pt")
        assert same(load_checkpoint(tmp_path / "ckpt.pt")["model"], state)


def test_attention_biases_are_kept(tmp_path):
    """`attn.bias` was a mask; `attn.c_attn.bias` is a weight."""
    checkpoint = make_checkpoint()
    assert "transformer.h.0.attn.c_attn.bias" in checkpoint["model"]
    save_checkpoint(checkpoint, tmp_path / "ckpt.pt")
    assert "transformer.h.0.attn.c_attn.bias" in load_checkpoint(tmp_path / "ckpt.pt")["model"]


# ----------------------------------------------------------------------------- damage


def records(path):
    """(name, first byte, last byte + 1) of each record's data in a checkpoint's zip archive."""
    found = []
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            file.seek(info.header_offset + 26)
            lengths = file.read(4)
            skipped = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            start = info.header_offset + 30 + skipped
            found.append((info.filename, start, start + info.file_size))
    return found


def flip(path, place, bit=0):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "ckpt.pt"
    save_checkpoint(make_checkpoint(), path)
    return path


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_flipped_bit_in_a_record_is_detected(whole, data):
    damaged = whole.with_name("damaged.pt")
    shutil.copyfile(whole, damaged)
    name, start, end = data.draw(st.sampled_from([r for r in records(whole) if r[2] > r[1]]))
    flip(damaged, data.draw(st.integers(start, end - 1), label=name), data.draw(st.integers(0, 7)))
    with pytest.raises(UserError, match=r"damaged\.pt is damaged"):
        load_checkpoint(damaged)


@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_flipped_bit_is_detected_or_harmless(whole, data):
    """Damage to names, dates and padding between the records may be undetected if the loaded data
    is right. Otherwise it raises a `UserError`."""
    damaged = whole.with_name("damaged.pt")
    shutil.copyfile(whole, damaged)
    size = whole.stat().st_size
    near_end = st.integers(size - 4000, size - 1)  # the archive's table of contents
    flip(damaged, data.draw(near_end | st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
    try:
        loaded = load_checkpoint(damaged)
    except UserError as error:
        assert "damaged.pt" in str(error)
    else:
        assert same(dict(loaded["model"]), dict(load_checkpoint(whole)["model"]))
        assert same(loaded["optimizer"], load_checkpoint(whole)["optimizer"])


@settings(max_examples=40)
@given(share=st.floats(0, 1, exclude_max=True))
def test_truncated_file_is_detected(whole, share):
    damaged = whole.with_name("damaged.pt")
    damaged.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(UserError, match=r"damaged\.pt is damaged"):
        load_checkpoint(damaged)


class Bomb:
    """An object that creates a folder when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickled_code_does_not_run(tmp_path):
    exploded = tmp_path / "exploded"
    for place in ("config", "tokenizer", "model"):
        torch.save(make_checkpoint() | {place: Bomb(exploded)}, tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match="other than tensors and plain values"):
            load_checkpoint(tmp_path / "ckpt.pt")
        with pytest.raises(UserError, match="other than tensors and plain values"):
            latest_checkpoint(tmp_path)
    (tmp_path / "ckpt.pt").write_bytes(pickle.dumps(Bomb(exploded)))  # without an archive
    with pytest.raises(UserError):
        load_checkpoint(tmp_path / "ckpt.pt")
    assert not exploded.exists()
    pickle.loads(pickle.dumps(Bomb(exploded)))
    assert exploded.exists()  # the attack works with plain pickle


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<document/>")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_text("a letter"),
        lambda path: path.write_bytes(b""),
        write_zip,
        lambda path: torch.save([1, 2, 3], path),
        lambda path: torch.save({"weight": torch.zeros(3)}, path),
        lambda path: torch.save({"model": {}, "model_args": {"dim": 4096}}, path),
        lambda path: torch.save({"model": {}, "model_args": None}, path),
        lambda path: torch.save(make_checkpoint() | {"model": torch.zeros(3)}, path),
    ],
    ids=["text", "empty", "zip", "list", "weights", "llama", "no-args", "tensor"],
)
def test_other_files_are_refused(tmp_path, write):
    write(tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt"):
        load_checkpoint(tmp_path / "ckpt.pt")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint .*ckpt\.pt"):
        load_checkpoint(tmp_path / "ckpt.pt")
    for find in (best_checkpoint, latest_checkpoint):
        with pytest.raises(UserError, match=r"no checkpoint in .*--out_dir"):
            find(tmp_path)


# ----------------------------------------------------------------------------- a save that fails


def write_half(checkpoint, file):
    file.write(b"half a file")
    raise OSError(28, "No space left on device")


def write_wrongly(checkpoint, file):
    """A disk that loses written data."""
    original_save(checkpoint, file)
    file.seek(file.tell() // 2)
    file.write(b"\0\1\2\3" * 4)
    file.seek(0, os.SEEK_END)


def be_killed(*_):
    raise KeyboardInterrupt


original_save = torch.save


@pytest.mark.parametrize(
    "place, happens, error",
    [
        ("torch.save", write_half, UserError),
        ("torch.save", write_wrongly, UserError),
        ("os.fsync", write_half, UserError),
        ("torch.save", be_killed, KeyboardInterrupt),
        ("os.fsync", be_killed, KeyboardInterrupt),
        ("os.replace", be_killed, KeyboardInterrupt),
    ],
    ids=["disk full", "disk broken", "flush fails", "killed", "killed late", "killed last"],
)
def test_failed_save_keeps_the_old_file(saved, monkeypatch, place, happens, error):
    before = saved.read_bytes()
    if happens is write_half and place == "os.fsync":
        happens = lambda descriptor: write_half(None, open(os.devnull, "wb"))  # noqa: E731
    monkeypatch.setattr(f"brisk.checkpoint.{place}", happens)
    with pytest.raises(error) as caught:
        save_checkpoint(make_checkpoint(step=20, seed=1), saved)
    monkeypatch.undo()
    assert saved.read_bytes() == before
    if error is UserError:
        assert "ckpt.pt" in str(caught.value) and os.listdir(saved.parent) == ["ckpt.pt"]
    assert latest_checkpoint(saved.parent) == saved  # a partial file is ignored
    save_checkpoint(make_checkpoint(step=20, seed=1), saved)  # and does not block the next save
    assert load_checkpoint(saved)["iter_num"] == 20
    assert os.listdir(saved.parent) == ["ckpt.pt"]


def test_removed_folder_is_created_again(tmp_path):
    save_checkpoint(make_checkpoint(20), tmp_path / "gone" / "out" / "last.pt")
    assert load_checkpoint(tmp_path / "gone" / "out" / "last.pt")["iter_num"] == 20


def test_read_only_folder(tmp_path):
    (tmp_path / "out").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"could not save .*last\.pt: .* are free"):
        save_checkpoint(make_checkpoint(), tmp_path / "out" / "last.pt")
    assert (tmp_path / "out").read_text() == "a file where the folder should be"


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX's")
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9, 0.99])
def test_full_disk_error_states_the_sizes(saved, share):
    """The operating system fails to write in the middle of the file."""
    import resource

    before, (soft, hard) = saved.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * len(before)), hard))
    try:
        with pytest.raises(UserError) as caught:
            save_checkpoint(make_checkpoint(step=20, seed=1), saved)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = r"ckpt\.pt: File too large \(it needs about 0 MB, .* are free\)"
    assert re.search(told, str(caught.value))
    assert saved.read_bytes() == before and os.listdir(saved.parent) == ["ckpt.pt"]


def test_kill_between_two_links_loses_nothing(saved, monkeypatch):
    """ckpt.pt is linked before last.pt: in the other order, a best model could be lost."""
    last = saved.with_name("last.pt")
    link_checkpoint(saved, last)
    replace = os.replace

    def killed_at_last(source, target):
        if Path(target).name == "last.pt":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr("brisk.checkpoint.os.replace", killed_at_last)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(make_checkpoint(20), last, also=[saved])
    assert load_checkpoint(saved)["iter_num"] == 20 and load_checkpoint(last)["iter_num"] == 10
    assert latest_checkpoint(saved.parent) == saved


# ----------------------------------------------------------------------------- two names


def test_second_name_is_a_hard_link(tmp_path):
    last, best = tmp_path / "last.pt", tmp_path / "ckpt.pt"
    save_checkpoint(make_checkpoint(10), last)
    link_checkpoint(last, best)
    assert os.path.samefile(last, best)
    save_checkpoint(make_checkpoint(20), last)  # the next save does not write through the link
    assert load_checkpoint(best)["iter_num"] == 10
    link_checkpoint(last, best)
    assert load_checkpoint(best)["iter_num"] == 20
    assert sorted(os.listdir(tmp_path)) == ["ckpt.pt", "last.pt"]


def test_copy_where_links_are_unsupported(tmp_path, monkeypatch):
    def no_link(*_):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr("brisk.checkpoint.os.link", no_link)
    save_checkpoint(make_checkpoint(10), tmp_path / "last.pt")
    link_checkpoint(tmp_path / "last.pt", tmp_path / "ckpt.pt")
    assert load_checkpoint(tmp_path / "ckpt.pt")["iter_num"] == 10
    assert not os.path.samefile(tmp_path / "last.pt", tmp_path / "ckpt.pt")


# ----------------------------------------------------------------------------- which one


@pytest.mark.parametrize("last, best", [(20, 10), (10, 20)])
def test_latest_resumes_and_best_samples(tmp_path, last, best):
    save_checkpoint(make_checkpoint(last), tmp_path / "last.pt")
    save_checkpoint(make_checkpoint(best), tmp_path / "ckpt.pt")
    assert latest_checkpoint(tmp_path).name == ("last.pt" if last > best else "ckpt.pt")
    assert best_checkpoint(tmp_path).name == "ckpt.pt"


def test_one_checkpoint_is_enough(tmp_path):
    save_checkpoint(make_checkpoint(), tmp_path / "last.pt")
    assert best_checkpoint(tmp_path).name == latest_checkpoint(tmp_path).name == "last.pt"


@pytest.mark.parametrize("damaged, other", [("last.pt", "ckpt.pt"), ("ckpt.pt", "last.pt")])
def test_damaged_checkpoint_is_skipped(tmp_path, capsys, damaged, other):
    save_checkpoint(make_checkpoint(20), tmp_path / damaged)
    save_checkpoint(make_checkpoint(10), tmp_path / other)
    _, start, end = max(records(tmp_path / damaged), key=lambda r: r[2] - r[1])
    flip(tmp_path / damaged, (start + end) // 2)
    assert latest_checkpoint(tmp_path).name == other
    notice = "".join(capsys.readouterr())
    assert damaged in notice and other in notice
    (tmp_path / other).write_bytes(b"")
    with pytest.raises(UserError, match="is damaged"):
        latest_checkpoint(tmp_path)


# ----------------------------------------------------------------------------- earlier runs


def test_archive_previous_run_loses_nothing(tmp_path):
    names = ("ckpt.pt", "metrics.jsonl", "tensorboard")
    assert archive_previous_run(tmp_path / "out", names) is None
    (tmp_path / "out").mkdir()
    assert archive_previous_run(tmp_path / "out", names) is None  # without an empty folder
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for number in range(4):
        (tmp_path / "out" / "ckpt.pt").write_text(f"run {number}")
        (tmp_path / "out" / "tensorboard").mkdir()
        (tmp_path / "out" / "tensorboard" / "events").write_text(f"run {number}")
        folder = archive_previous_run(tmp_path / "out", names)
        assert not any((tmp_path / "out" / name).exists() for name in names)
        assert (folder / "ckpt.pt").read_text() == f"run {number}"
    kept = {path.read_text() for path in Path(tmp_path).rglob("ckpt.pt")}
    assert kept == {path.read_text() for path in Path(tmp_path).rglob("events")}
    assert kept == {f"run {number}" for number in range(4)}
    assert (tmp_path / "out" / "earlier" / "ckpt.pt").read_text() == "run 0"
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"  # it takes only a run's files


def test_model_args_match_nanogpt():
    assert set(module.MODEL_ARGS) == set(GPTConfig().to_args())
