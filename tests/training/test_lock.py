"""Two runs cannot write to one folder; readers need no lock."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest
from conftest import ROOT

import train
from brisk.distributed.process_group import Ranks
from brisk.errors import RunError, UserError
from brisk.training.lock import FolderLock

LONG = {"max_iters": 100000, "eval_interval": 50, "log_interval": 10}


@pytest.fixture
def running(settings, tmp_path):
    """A run in a subprocess, in the folder `out`, that has saved a checkpoint."""
    command = [sys.executable, str(ROOT / "train.py"), *settings(tmp_path / "out", **LONG)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert any(line.startswith(b"iter 100:") for line in iter(process.stdout.readline, b""))
    threading.Thread(
        target=process.stdout.read, daemon=True
    ).start()  # otherwise it blocks on a full pipe
    yield process
    process.kill()
    process.wait()


def test_second_run_in_a_folder_is_refused(running, settings, resume, quick_script, tmp_path):
    before = (tmp_path / "out" / "metrics.jsonl").stat().st_ino
    for start in ("scratch", "auto"):
        second = quick_script("train.py", *settings(tmp_path / "out", init_from=start))
        assert second.returncode == 2 and second.stderr.count("\n") == 1
        where = f"process {running.pid} on {socket.gethostname()}, since 20"
        assert f"error: another run is in {tmp_path / 'out'}: {where}" in second.stderr
    assert (tmp_path / "out" / "metrics.jsonl").stat().st_ino == before  # nothing was moved
    assert not (tmp_path / "out" / "earlier").exists()

    machine = {"device": "cpu", "max_new_tokens": 5, "num_samples": 1}
    argv = [f"--{key}={value}" for key, value in machine.items()]
    read = quick_script("sample.py", f"--out_dir={tmp_path / 'out'}", *argv)
    assert read.returncode == 0, read.stderr
    with pytest.raises(UserError):
        resume(tmp_path / "out")
    resume(tmp_path / "out", eval_only=True)  # writes nothing, so it needs no lock

    running.send_signal(signal.SIGKILL)  # without cleanup
    running.wait()
    step = resume(tmp_path / "out", max_iters=0).console
    assert "Resuming" in step  # the lock is released with its process


def test_lock_can_be_acquired_again(tmp_path):
    first, second = (FolderLock(tmp_path, Ranks()) for _ in range(2))
    for _ in range(3):
        with first:
            first.acquire()
            first.acquire()
            with second, pytest.raises(UserError, match=f"process {os.getpid()} "):
                second.acquire()
        assert os.listdir(tmp_path) == [".lock"] and not (tmp_path / ".lock").stat().st_size
        with second:
            second.acquire()


def test_lock_file_is_never_replaced(tmp_path):
    """Otherwise a process that opens it while another exits would lock a deleted file, which
    excludes nobody."""
    with FolderLock(tmp_path, Ranks()) as first:
        first.acquire()
        about_to_ask = open(tmp_path / ".lock", "rb")
    with about_to_ask, FolderLock(tmp_path, Ranks()) as third:
        third.acquire()
        assert os.path.samestat(os.fstat(about_to_ask.fileno()), os.stat(third.path))


def test_folder_is_created_only_on_request(tmp_path):
    with FolderLock(tmp_path / "a" / "out", Ranks()) as lock:
        lock.acquire()
        assert not (tmp_path / "a").exists()
        lock.acquire(create=True)
        with pytest.raises(UserError):
            FolderLock(tmp_path / "a" / "out", Ranks()).acquire()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to the folder --out_dir=.*file"):
        FolderLock(tmp_path / "file", Ranks()).acquire(create=True)


@pytest.mark.parametrize("instead", ["nothing", "another run's"])
def test_run_stops_if_its_lock_is_removed(train_tiny, tmp_path, monkeypatch, instead):
    """It does not overwrite the files of another run, which could start."""
    out, original = tmp_path / "out", train.get_lr

    def remove(step, *rest):
        if step == 2:
            (out / ".lock").unlink()
            if instead != "nothing":
                (out / ".lock").touch()
        return original(step, *rest)

    monkeypatch.setattr(train, "get_lr", remove)
    with pytest.raises(RunError, match=r"stopped at step 4 without saving: .*\.lock was removed"):
        train_tiny(out)
    assert not (out / "last.pt").exists()
