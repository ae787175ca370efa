"""Processes under torchrun that are killed, hang, or are restarted with another world size."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, free_port
from test_data_parallel import assert_same_run

from brisk.checkpoint import load_checkpoint
from brisk.distributed.rendezvous import agree_on_name, lost_peers
from brisk.errors import RunError

LENGTH = {"max_iters": 80, "lr_decay_iters": 80, "eval_interval": 10, "dropout": 0.1}
BATCH = {"gradient_accumulation_steps": 2, "batch_size": 3}
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/task").exists(), reason="children are found in /proc"
)


def start(command, cwd=None, env=ENV):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=env, **pipes)


def lines_until(process, text):
    """Read lines from `process` until one begins with `text`."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith(text):
            return lines
    raise AssertionError("".join(lines))


def assert_same_to_the_bit(run, other):
    ours, theirs = (load_checkpoint(out_dir / "last.pt") for out_dir in (run, other))
    assert ours["iter_num"] == theirs["iter_num"]
    for name, weight in theirs["model"].items():
        assert torch.equal(weight, ours["model"][name]), name
    assert_same_run(run, other)


# ----------------------------------------------------------------------------- killed


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, torchrun):
    """`undisturbed(argv)`: run with two processes, without kills. Returns the folder."""
    done = {}

    def run(settings):
        if not done:
            done["out"] = tmp_path_factory.mktemp("two") / "out"
            whole = torchrun("train.py", *settings(done["out"], **LENGTH, **BATCH))
            assert whole.returncode == 0, whole.stderr
        return done["out"]

    return run


def train_and_kill(settings, out, victims, amid_a_save):
    """Run under torchrun, killing these ranks one after another. Returns the output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = settings(out, **LENGTH, **BATCH, init_from="auto")
    process = start([*torchrun, f"--max_restarts={len(victims)}", ROOT / "train.py", *argv])
    children, said = Path(f"/proc/{process.pid}/task/{process.pid}/children"), []
    for number, victim in enumerate(victims):
        said += lines_until(process, f"iter {15 + 20 * number}:")
        until = time.monotonic() + 20
        while amid_a_save and not (out / "last.pt.writing").exists():
            assert time.monotonic() < until
        os.kill(int(children.read_text().split()[victim]), signal.SIGKILL)
    said += process.stdout.readlines()
    assert process.wait(60) == 0, "".join(said)
    return "".join(said)


@needs_proc
@pytest.mark.parametrize(
    "victims, amid_a_save",
    [
        pytest.param([0], True, id="the main one, amid a save"),
        pytest.param([1], False, id="another", marks=pytest.mark.slow),
        pytest.param([1, 0, 1], False, id="one after another", marks=pytest.mark.slow),
        pytest.param([1, 1, 0], True, id="amid saves", marks=pytest.mark.slow),
    ],
)
def test_killed_process_changes_nothing(settings, undisturbed, tmp_path, victims, amid_a_save):
    whole = undisturbed(settings)
    said = train_and_kill(settings, tmp_path / "out", victims, amid_a_save)
    assert said.count("Resuming training from") == len(victims)
    assert "failed to connect" not in said  # the ranks of each start found each other
    assert_same_to_the_bit(tmp_path / "out", whole)
    assert not list((tmp_path / "out").glob("*.writing"))


def test_resume_on_other_world_size_same_batches(
    settings, resume, resumed_settings, train_tiny, script, tmp_path
):
    batch = {"gradient_accumulation_steps": 4, "batch_size": 3, "learning_rate": 1e-3}
    whole = train_tiny(tmp_path / "whole", **batch).out_dir
    run = tmp_path / "out"

    def on(processes, argv):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = script("train.py", *argv, launcher=launcher)
        assert done.returncode == 0, done.stderr

    on(2, settings(run, **batch, max_iters=2))
    resume(run, max_iters=4)
    on(3, resumed_settings(run, max_iters=7))
    assert_same_run(whole, run)


# ----------------------------------------------------------------------------- by themselves


def start_rank(rank, argv, port, cwd):
    """Start one of two processes in a separate folder, without torchrun."""
    cwd.mkdir(exist_ok=True)
    who = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    env = ENV | {name: str(value) for name, value in (who | where).items()}
    return start([ROOT / "train.py", *argv], cwd, env)


def start_both(argv, folder):
    port = free_port()
    return [start_rank(rank, argv, port, folder / f"rank{rank}") for rank in (0, 1)]


def test_only_rank_0_needs_the_folder(settings, train_tiny, tmp_path):
    """Each rank has a separate working directory. Nothing is written to that of rank 1, and it
    resumes anyway."""
    batch = {**BATCH, "learning_rate": 1e-3, "min_lr": 1e-4, "init_from": "auto"}
    whole = train_tiny(tmp_path / "whole", **batch).out_dir
    for last in (3, 7):
        both = start_both(settings("out", **batch, max_iters=last), tmp_path)
        said = [process.communicate(timeout=120)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
    assert "Resuming training from out at step 4" in said[0] and "iter" not in said[1]
    assert os.listdir(tmp_path / "rank0") == ["out"] and os.listdir(tmp_path / "rank1") == []
    assert_same_run(whole, tmp_path / "rank0" / "out")

    (tmp_path / "rank0" / "out" / "last.pt").write_bytes(b"no checkpoint")
    (tmp_path / "rank0" / "out" / "ckpt.pt").unlink()
    for process in start_both(settings("out", **batch), tmp_path):
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 2 and "last.pt is damaged" in said


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cannot halt a process")
def test_silent_rank_ends_the_others(settings, resume, tmp_path):
    length = {"max_iters": 100000, "eval_interval": 10}
    main, other = start_both(settings("out", **BATCH, **length, timeout=5), tmp_path)
    try:
        lines_until(main, "iter 15:")
        other.send_signal(signal.SIGSTOP)  # alive but silent, like a lost link or a hung device
        began = time.monotonic()
        said = main.communicate(timeout=60)[0].splitlines()
        assert main.returncode == 1 and time.monotonic() - began < 40
        assert said[-1].startswith("error: lost the run's other processes (Timed out waiting 5000")
        assert not any(line.startswith("Traceback") for line in said)
        step = load_checkpoint(tmp_path / "rank0" / "out" / "last.pt")["iter_num"]
        assert step % 10 == 0  # from the last evaluation; the unfinished step is not saved
    finally:
        other.kill()
    assert f"at step {step}" in resume(tmp_path / "rank0" / "out", max_iters=step).console


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM")
def test_sigterm_ends_a_waiting_rank(settings, tmp_path):
    """Nothing has to be saved yet, and torchrun would wait half a minute before SIGKILL."""
    process = start_rank(1, settings("out"), free_port(), tmp_path / "rank1")
    time.sleep(8)  # it is importing, or waiting for the missing rank 0
    assert process.poll() is None
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


# ----------------------------------------------------------------------------- finding one another


def names(store, world_size, only=None):
    """The name that each process of a start (or `only` some) computes."""
    found = {}

    def ask(rank):
        found[rank] = agree_on_name(store, rank, world_size, seconds=20)

    ranks = range(world_size) if only is None else only
    threads = [threading.Thread(target=ask, args=(rank,), daemon=True) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return found


def test_each_start_has_a_unique_name():
    store, before = dist.HashStore(), set()
    for _ in range(4):
        found = names(store, 5)
        assert len(found) == 5 and len({*found.values()}) == 1
        assert not before & {*found.values()}
        before |= {*found.values()}
        # and a start that is killed while its processes look for one another leaves its hellos
        for rank in (1, 3):
            store.set(f"id/{rank}", "of a dead process")


def test_missing_rank_is_reported():
    with pytest.raises(RunError, match=r"only 1 of 3 processes joined within 1 s"):
        with lost_peers():
            agree_on_name(dist.HashStore(), 0, 3, seconds=1)


def test_other_errors_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shape"), lost_peers():
        raise RuntimeError("shape '[2, 3]' is invalid")
