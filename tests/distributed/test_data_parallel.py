"""DDP matches a single process with the same global batch."""

import json
import re
import shutil

import pytest
import torch
from conftest import ROOT, Run, same
from hypothesis import given
from hypothesis import strategies as st

from brisk.checkpoint import load_checkpoint
from brisk.distributed.process_group import Ranks
from brisk.errors import UserError

small = st.integers(1, 40)


def shares(world_size, gradient_accumulation_steps, batch_size):
    """The micro-batches of each process, in order of rank."""
    ranks = [Ranks(rank, rank, world_size) for rank in range(world_size)]
    return [r.micro_batches(gradient_accumulation_steps, batch_size) for r in ranks]


@given(world_size=small, steps=small, batch_size=small)
def test_global_batch_divides_evenly_or_raises(world_size, steps, batch_size):
    rows = steps * batch_size
    try:
        shared = shares(world_size, steps, batch_size)
    except UserError as error:
        assert rows % world_size  # an error only if it does not divide
        near = int(re.search(r"--gradient_accumulation_steps=(\d+) ", str(error))[1])
        assert near >= 1 and near * batch_size % world_size == 0
        for nearer in range(max(1, steps - abs(near - steps) + 1), steps + abs(near - steps)):
            assert nearer * batch_size % world_size  # the suggestion is the nearest that works
        shares(world_size, near, batch_size)
        return
    micro_batches = [part for share in shared for part in share]
    assert [index for index, _, _ in micro_batches] == list(range(len(micro_batches)))
    visited = [row for _, first, n in micro_batches for row in range(first, first + n)]
    assert visited == list(range(rows))  # every row once
    assert all(1 <= count <= batch_size for _, _, count in micro_batches)
    assert len({len(share) for share in shared}) == 1  # equal numbers of micro-batches
    assert len({sum(n for *_, n in share) for share in shared}) == 1


@given(steps=small, batch_size=small)
def test_micro_batches_of_one_process(steps, batch_size):
    expected = [(k, k * batch_size, batch_size) for k in range(steps)]
    assert shares(1, steps, batch_size) == [expected]


def test_plain_python_is_a_single_rank(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.from_environment()
    assert ranks.is_alone and ranks.is_main
    assert ranks.broadcast("value") == "value"
    assert ranks.all_reduce_sum(torch.ones(2)).tolist() == [1, 1]


def test_torchrun_environment_is_read(monkeypatch):
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    ranks = Ranks.from_environment()
    assert (ranks.rank, ranks.local_rank, ranks.world_size) == (5, 1, 8)
    assert not ranks.is_alone and not ranks.is_main


# ----------------------------------------------------------------------------- two processes


def metrics(out_dir, key):
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def assert_same_run(run, other):
    """The same steps, and the same losses except for the order of float additions."""
    for key in ("loss", "train_loss", "val_loss", "grad_norm", "lr", "tokens"):
        a, b = metrics(run, key), metrics(other, key)
        both = a.keys() & b.keys()
        assert both and (key in ("train_loss", "val_loss") or a.keys() == b.keys())
        tolerance = 1e-3 if key == "grad_norm" else 1e-4
        assert {s: a[s] for s in both} == pytest.approx({s: b[s] for s in both}, abs=tolerance)
    a, b = (load_checkpoint(out / "last.pt") for out in (run, other))
    assert a.keys() == b.keys() and a["model"].keys() == b["model"].keys()
    assert all(a[key] == b[key] for key in ("iter_num", "position", "model_args"))
    for name, weight in a["model"].items():
        torch.testing.assert_close(weight, b["model"][name], atol=1e-3, rtol=0)


def succeed(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


# Micro-batches that two processes split as one does, so that dropout draws the same numbers.
DROPPING = {"gradient_accumulation_steps": 4, "batch_size": 3, "dropout": 0.2, "eval_iters": 3}
# Six rows three times in one process, four and five in each of two; and their targets differ in
# number, so that a mean of means would weigh a short document's tokens more than a long one's.
UNEVEN = {"gradient_accumulation_steps": 3, "batch_size": 6, "rows": "documents"}


@pytest.mark.parametrize("changes", [DROPPING, UNEVEN], ids=["dropout", "uneven"])
def test_ddp_matches_one_process_and_resumes(
    train_tiny, resume, settings, resumed_settings, torchrun, tmp_path, lines_data, changes
):
    changes = {**changes, "eval_interval": 2, "data_dir": lines_data}
    whole = train_tiny(tmp_path / "whole", **changes, max_iters=5).out_dir

    # start with two processes and resume with one, and the reverse
    two = tmp_path / "two"
    console = succeed(torchrun("train.py", *settings(two, **changes, max_iters=3)))
    assert len(re.findall(r"^iter 2: ", console, re.MULTILINE)) == 1  # one of them speaks
    shutil.copytree(two, tmp_path / "two-one")
    assert_same_run(whole, resume(tmp_path / "two-one", max_iters=5).out_dir)

    train_tiny(tmp_path / "one-two", **changes, max_iters=3)
    succeed(torchrun("train.py", *resumed_settings(tmp_path / "one-two", max_iters=5)))
    assert_same_run(whole, tmp_path / "one-two")


def test_error_under_torchrun_is_one_line(settings, torchrun, tmp_path):
    uneven = {"gradient_accumulation_steps": 1, "batch_size": 3}
    result = torchrun("train.py", *settings(tmp_path / "out", **uneven))
    assert result.returncode != 0
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "--gradient_accumulation_steps=2 " in errors[0]
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- one process


@pytest.mark.parametrize("parallel, optimizer", [("ddp", "adamw"), ("fsdp", "muon")])
def test_torchrun_with_one_rank_is_bit_exact(
    train_tiny, settings, torchrun, tmp_path, parallel, optimizer
):
    """It is wrapped in DDP, so that DDP can be tested on one device, and computes the same."""
    changes = {"gradient_accumulation_steps": 2, "optimizer": optimizer}
    alone = train_tiny(tmp_path / "alone", **changes)
    argv = settings(tmp_path / "one", **changes, parallel=parallel)
    done = torchrun("train.py", *argv, processes=1)
    assert done.returncode == 0, done.stderr
    assert f"device: 1 process ({parallel}), each on cpu" in done.stdout
    one = Run(tmp_path / "one", done.stdout)
    for key in ("loss", "grad_norm", "val_loss"):
        assert one.series(key) == alone.series(key)
    assert same(one.checkpoint()["model"], alone.checkpoint()["model"])
    assert same(one.checkpoint()["optimizer"]["state"], alone.checkpoint()["optimizer"]["state"])


def test_rank_without_launcher_is_one_line(settings, script, tmp_path):
    done = script("train.py", *settings(tmp_path / "out"), env={"RANK": "0"})
    assert done.returncode == 2 and done.stdout == ""
    assert "RANK is set without MASTER_ADDR" in done.stderr and len(done.stderr.splitlines()) == 1


NOT_DISTRIBUTED = """
import importlib, sys
import torch

del torch._C._c10d_init  # by which PyTorch knows whether it was built with torch.distributed
for name in [name for name in sys.modules if name.startswith("torch.distributed")]:
    del sys.modules[name]
for name in ("distributed_c10d", "rendezvous", "device_mesh", "fsdp", "tensor"):
    sys.modules[f"torch.distributed.{name}"] = None
torch.distributed = importlib.import_module("torch.distributed")
assert not torch.distributed.is_available()

import train
from brisk.distributed.process_group import clean_end
from brisk.errors import one_line_errors

with clean_end(), one_line_errors():
    train.main(train.configure(train.TrainConfig, sys.argv[1:]))
"""


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "WORLD_SIZE": "1"}], ids=["one", "rank"])
def test_trains_without_torch_distributed(settings, script, tmp_path, environment):
    (tmp_path / "start.py").write_text(NOT_DISTRIBUTED)
    environment |= {"PYTHONPATH": str(ROOT)}
    argv = settings(tmp_path / "out", optimizer="muon")
    done = script(tmp_path / "start.py", *argv, env=environment)
    if "RANK" in environment:
        assert done.returncode == 2 and "this PyTorch has no torch.distributed" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    else:
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "out" / "ckpt.pt").exists()
