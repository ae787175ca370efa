"""Asynchronous checkpoints; a failed save loses neither the run nor the last file."""

import copy
import errno
import os
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import make_checkpoint, same

from brisk.checkpoint import load_checkpoint, save_checkpoint
from brisk.errors import RunError, UserError
from brisk.training.async_checkpoint import Saver, copy_to_host


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def said():
    return []


@pytest.fixture
def saver(tmp_path, said):
    with Saver(tmp_path / "out", said.append) as saver:
        yield saver


@pytest.fixture
def held(monkeypatch):
    """Writes that start, and finish only on request."""
    gate = SimpleNamespace(began=threading.Event(), let=threading.Event(), running=0, most=0)

    def write(*what):
        gate.running += 1
        gate.most = max(gate.most, gate.running)
        gate.began.set()
        assert gate.let.wait(30)
        save_checkpoint(*what)
        gate.running -= 1

    monkeypatch.setattr("brisk.training.async_checkpoint.save_checkpoint", write)
    return gate


# ----------------------------------------------------------------------------- on a thread


def test_save_is_async_and_copies_the_state(saver, held, tmp_path):
    checkpoint = make_checkpoint(10)
    expected = copy.deepcopy(checkpoint | {"model": dict(checkpoint["model"])})
    saver.save(checkpoint, as_best=True)
    assert held.began.wait(30)  # the write has started, and training is not blocked
    for weight in checkpoint["model"].values():
        weight.zero_()
    for moments in checkpoint["optimizer"]["state"].values():
        moments["exp_avg"].fill_(7)
    held.let.set()
    saver.wait()
    for name in ("last.pt", "ckpt.pt"):
        assert same(load_checkpoint(tmp_path / "out" / name), expected)


def test_copy_keeps_tied_weights_tied(tmp_path):
    copied = copy_to_host(make_checkpoint())
    tied = [copied["model"][name] for name in ("lm_head.weight", "transformer.wte.weight")]
    assert tied[0].data_ptr() == tied[1].data_ptr()
    assert same(copied, copy_to_host(copied)) and same(
        dict(make_checkpoint()["model"]), copied["model"]
    )


def test_one_write_at_a_time(saver, held, tmp_path):
    saver.save(make_checkpoint(10), as_best=False)
    second = threading.Thread(target=saver.save, args=(make_checkpoint(20), False))
    second.start()
    time.sleep(0.2)
    assert second.is_alive()  # it waits for the first
    held.let.set()
    second.join()
    saver.wait()
    assert held.most == 1 and load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"] == 20


def test_exit_waits_for_the_save(tmp_path, held):
    with Saver(tmp_path / "out") as saver:
        saver.save(make_checkpoint(10), as_best=False)
        threading.Timer(0.2, held.let.set).start()
    assert load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"] == 10


def test_error_on_the_thread_is_raised(saver, monkeypatch):
    monkeypatch.setattr("brisk.training.async_checkpoint.save_checkpoint", lambda *_: 1 / 0)
    saver.save(make_checkpoint(10), as_best=False)
    with pytest.raises(ZeroDivisionError):
        saver.save(make_checkpoint(20), as_best=False)


# ----------------------------------------------------------------------------- failing


@pytest.mark.parametrize("last", [True, False], ids=["the last one", "one amid the run"])
def test_run_survives_a_failed_save(train_tiny, tmp_path, monkeypatch, capsys, last):
    """The disk is full at one of three saves. The run continues, and fails at its end only if the
    last save failed."""
    original = torch.save

    def save(checkpoint, file):
        if checkpoint["iter_num"] == (12 if last else 8):
            file.write(b"half a file")
            no_space()
        original(checkpoint, file)

    monkeypatch.setattr("brisk.checkpoint.torch.save", save)
    out = tmp_path / "out"
    if last:
        with pytest.raises(RunError, match=r"last\.pt: No space left on device \(it needs"):
            train_tiny(out, max_iters=11)
        console = capsys.readouterr().out
    else:
        console = train_tiny(out, max_iters=11).console
    assert console.count("could not save") == 1 and "iter 11:" in console
    assert load_checkpoint(out / "last.pt")["iter_num"] == (8 if last else 12)
    assert not list(out.glob("*.writing"))


def test_failed_last_save_is_status_1(settings, script, tmp_path, monkeypatch):
    code = "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))"
    if os.name != "posix":
        pytest.skip("limits of a process are POSIX's")
    (tmp_path / "sitecustomize.py").write_text(code)
    argv = settings(tmp_path / "out", max_iters=3)
    result = script("train.py", *argv, env={"PYTHONPATH": str(tmp_path)})
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: could not save")
    assert "iter 3:" in result.stdout and not list((tmp_path / "out").glob("*.pt"))


@pytest.mark.parametrize("instead", ["nothing", "a file"])
def test_folder_removed_during_a_run(train_tiny, tmp_path, monkeypatch, capsys, instead):
    """A missing folder is created again. If a file is in its place, the run continues without
    saving until the path is free."""
    import train

    out, original = tmp_path / "out", train.get_lr

    def vanish(step, *rest):
        if step in (5, 10):
            for thread in threading.enumerate():  # wait for a pending save
                if thread.name == "saver":
                    thread.join()
        if step == 5:
            shutil.rmtree(out)
            if instead == "a file":
                out.write_text("")
        if step == 10 and instead == "a file":
            out.unlink()
        return original(step, *rest)

    monkeypatch.setattr(train, "get_lr", vanish)
    with pytest.raises(RunError, match="was removed during the run"):  # status 1
        train_tiny(out, max_iters=11)
    console = capsys.readouterr().out
    assert ("could not save" in console) == (instead == "a file")
    assert load_checkpoint(out / "ckpt.pt")["iter_num"] == 12
    assert (out / "metrics.jsonl").exists()


def test_small_disk(tmp_path, said):
    """A real one, if this user may mount it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=96k tmpfs {disk} 2>/dev/null") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with Saver(disk / "out", said.append) as saver:
            saver.save(make_checkpoint(10), as_best=True)
            saver.wait()
            size = (disk / "out" / "last.pt").stat().st_size
            (disk / "other").write_bytes(b"x" * (96 * 1024 - 2 * size))
            for step in (20, 30):
                saver.save(make_checkpoint(step), as_best=True)
            saver.wait()
            assert len(said) == 2 and "No space left on device" in said[0]
            assert load_checkpoint(disk / "out" / "last.pt")["iter_num"] == 10
            (disk / "other").unlink()
            saver.save(make_checkpoint(40), as_best=True)
            saver.wait()
            assert saver.failure is None
            assert load_checkpoint(disk / "out" / "ckpt.pt")["iter_num"] == 40
    finally:
        os.system(f"umount {disk}")


def test_full_disk_loses_only_metrics(train_tiny, tmp_path, monkeypatch):
    import brisk.reporting.run_log

    class Full:
        """A file on a disk that is temporarily full."""

        writes = 0

        def __init__(self, file):
            self.file = file

        def write(self, text):
            Full.writes += 1
            if 3 <= Full.writes < 6:
                no_space()
            self.file.write(text)

        def __getattr__(self, name):
            return getattr(self.file, name)

    original = brisk.reporting.run_log.truncate_metrics

    def cut(path, step):
        monkeypatch.setattr(
            brisk.reporting.run_log, "open", lambda *a, **k: Full(open(*a, **k)), False
        )
        return original(path, step)

    monkeypatch.setattr(brisk.reporting.run_log, "truncate_metrics", cut)
    run = train_tiny(tmp_path / "out")
    assert run.console.count("cannot write metrics.jsonl: No space left") == 1
    assert len(run.metrics) == 11 - 3 and run.checkpoint()["iter_num"] == 8


# ----------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("what", ["weight", "moment", "loss"])
def test_nonfinite_state_is_not_saved(saver, said, tmp_path, what):
    saver.save(make_checkpoint(10), as_best=True)
    bad, losses = make_checkpoint(20), (1.0, 2.0)
    if what == "weight":
        bad["model"]["transformer.wpe.weight"][1, 2] = float("inf")
    elif what == "moment":
        bad["optimizer"]["state"][0]["exp_avg_sq"][1, 2] = float("nan")
    else:
        losses = (1.0, float("nan"))
    saver.save(bad, as_best=True, losses=losses)
    saver.wait()
    assert len(said) == 1 and "step 20 is not saved" in said[0]
    for name in ("last.pt", "ckpt.pt"):
        assert load_checkpoint(tmp_path / "out" / name)["iter_num"] == 10
    assert "step 20 is not saved" in saver.failure


# ----------------------------------------------------------------------------- history


def test_keep_last(train_tiny, resume, tmp_path):
    out = tmp_path / "out"
    train_tiny(out, max_iters=11, eval_interval=2, keep_last=3, always_save_checkpoint=False)
    assert sorted(p.name for p in out.glob("step-*")) == [
        f"step-{step:06d}.pt" for step in (8, 10, 12)
    ]
    for step in (8, 10, 12):
        assert load_checkpoint(out / f"step-{step:06d}.pt")["iter_num"] == step
    assert (out / "step-000012.pt").samefile(out / "last.pt")  # a hard link, not a copy

    for name in ("last.pt", "ckpt.pt"):  # restore an older one
        (out / name).unlink()
        shutil.copyfile(out / "step-000008.pt", out / name)
    resume(out, max_iters=10, eval_interval=1, keep_last=2)
    steps = [load_checkpoint(path)["iter_num"] for path in sorted(out.glob("step-*"))]
    assert steps == [10, 11, 12]  # the two newest, and one ahead from another run
    train_tiny(out, max_iters=3)
    assert not list(out.glob("step-*")) and len(list(out.glob("earlier/step-*"))) == 3


def test_no_step_files_by_default(train_tiny, tmp_path):
    assert not list(train_tiny(tmp_path / "out").out_dir.glob("step-*"))


def test_failed_save_is_a_user_error(tmp_path):
    """`save_checkpoint` called directly raises `UserError`."""
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError):
        save_checkpoint(make_checkpoint(), tmp_path / "out" / "last.pt")


@pytest.mark.parametrize("max_iters", [3, 5])
def test_resume_removes_partial_files(train_tiny, resume, tmp_path, max_iters):
    """Also if the run is already at its end and does nothing else."""
    out = train_tiny(tmp_path / "out", max_iters=3).out_dir
    (out / "last.pt.writing").write_bytes(b"a process killed in a save leaves this")
    resume(out, max_iters=max_iters)
    assert not list(out.glob("*.writing"))
