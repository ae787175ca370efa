"""A run killed repeatedly, at any moment, ends like one that was never killed."""

import os
import random
import signal
import threading
import time

import pytest
import torch
from tqdm import tqdm

import train
from brisk.checkpoint import latest_checkpoint, load_checkpoint
from configurator import configure

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes made by fork")

# Saves both the best and the newest model after every other step.
SAVING = {"eval_interval": 2, "always_save_checkpoint": False, "keep_last": 2}
SAVING |= {"max_iters": 39, "lr_decay_iters": 39, "dropout": 0.1, "init_from": "auto"}


def start(argv):
    """Start a run in a forked process, which has PyTorch loaded. Returns its id."""
    if child := os.fork():
        return child
    try:  # the child, which must never return
        tqdm.set_lock(
            threading.RLock()
        )  # the default is shared between processes: a killed one would keep it
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        train.main(configure(train.TrainConfig, argv))
        os._exit(0)
    finally:
        os._exit(1)


def half_written(out, since):
    """Whether a checkpoint exists under its temporary name, written since that time."""
    try:
        return (out / "last.pt.writing").stat().st_mtime > since
    except FileNotFoundError:
        return False


def wait_for_a_save(out, draw):
    """One of the next, and a random moment more, of the milliseconds that it takes."""
    began, end = time.time(), time.perf_counter() + 5
    for _ in range(draw.randrange(1, 4)):
        while half_written(out, began) and time.perf_counter() < end:
            pass
        while not half_written(out, began) and time.perf_counter() < end:
            pass
    time.sleep(draw.uniform(0, 0.008))


def wait_a_moment(out, draw):
    time.sleep(draw.uniform(0, 0.6))


def run_through(argv, out, draw, kills):
    """A run, killed at most `kills` times and started again each time, to its end.

    Returns how often it was killed, and how often that left a file half written.
    """
    killed = cut_short = 0
    while True:
        began, child = time.time(), start(argv)
        if killed < kills:
            (wait_a_moment if killed % 2 else wait_for_a_save)(out, draw)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return killed, cut_short
        killed += 1
        cut_short += half_written(out, began)


@pytest.mark.parametrize("kills", [8, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_run_loses_nothing(settings, train_tiny, tmp_path, kills):
    whole = train_tiny(tmp_path / "whole", **SAVING)
    draw, killed, cut_short, runs = random.Random(kills), 0, 0, 0
    while killed < kills:
        out = tmp_path / f"out{runs}"
        counts = run_through(settings(out, **SAVING), out, draw, min(12, kills - killed))
        killed, cut_short, runs = killed + counts[0], cut_short + counts[1], runs + 1

        # killed between the two links of its last save: `ckpt.pt` is the newest
        newest = latest_checkpoint(out).name
        for name in ("last.pt", "ckpt.pt", "step-000038.pt", "step-000040.pt"):
            ours = load_checkpoint(out / (newest if name == "last.pt" else name))
            theirs = whole.checkpoint(name)
            assert ours["iter_num"] == theirs["iter_num"], name
            assert ours["best_val_loss"] == theirs["best_val_loss"]
            for weight in theirs["model"]:
                assert torch.equal(ours["model"][weight], theirs["model"][weight]), (name, weight)
        assert not list(out.glob("*.writing"))
        for key in ("loss", "val_loss"):
            lines = type(whole)(out, "").series(key)
            both = lines.keys() & whole.series(key).keys()
            assert {s: lines[s] for s in both} == {s: whole.series(key)[s] for s in both}
            assert len(both) == len(whole.series(key))
    print(f"{killed} kills in {runs} runs, {cut_short} of them left a file half written")
    assert cut_short or kills < 100  # some of many kills interrupt a write
