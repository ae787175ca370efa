"""A run stopped by a signal finishes its step, saves, and resumes exactly."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import train
from brisk.checkpoint import load_checkpoint
from brisk.training.signals import StopRequest, stop_requests
from configurator import configure

LONG = {"max_iters": 400, "lr_decay_iters": 400, "eval_interval": 1000, "dropout": 0.1}


@pytest.fixture(scope="module")
def whole(char_data, tmp_path_factory):
    """The last checkpoint of the uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    given = {**TINY, **LONG, "data_dir": char_data, "out_dir": out}
    train.main(configure(train.TrainConfig, [f"--{key}={value}" for key, value in given.items()]))
    return load_checkpoint(out / "last.pt")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_stopped_run_resumes_bit_exact(settings, whole, resume, tmp_path, name):
    number = getattr(signal, name)
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip(f"{name} is ignored here, and so by children")
    argv = settings(tmp_path / "stopped", log_interval=1, **LONG)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *argv], stdout=subprocess.PIPE, env=env
    )
    lines = iter(process.stdout.readline, b"")
    assert any(line.startswith(b"iter 20:") for line in lines)
    process.send_signal(number)
    said = b"".join(lines)
    assert process.wait(60) == 128 + number
    step = torch.load(tmp_path / "stopped" / "last.pt")["iter_num"]
    assert 20 < step < 400 and f"saved step {step}".encode() in said

    resumed = resume(tmp_path / "stopped").checkpoint()
    assert resumed["iter_num"] == whole["iter_num"] == 401
    for key, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][key]), key


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in /proc")
@pytest.mark.parametrize("whom, number", [("torchrun", signal.SIGTERM), ("rank 1", signal.SIGUSR1)])
def test_all_ranks_stop_after_the_same_step(
    settings, resumed_settings, torchrun, tmp_path, whom, number
):
    """Signalled by torchrun, or only one of them, they stop and resume together."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "train.py"), *settings(out, **LONG)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env)
    lines = iter(process.stdout.readline, b"")
    assert any(line.startswith(b"iter 20:") for line in lines)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(workers) == 2
    os.kill(process.pid if whom == "torchrun" else int(workers[1]), number)
    said = b"".join(lines).decode()
    errors = process.stderr.read().decode()
    assert process.wait(60) != 0 and "Traceback" not in errors.split("torch/distributed")[0]
    step = torch.load(out / "last.pt")["iter_num"]
    assert 20 < step < 400 and said.count(f"saved step {step} to {out}") == 1
    if whom == "rank 1":  # torchrun reports the exit status of its processes
        assert f"exitcode  : {128 + number}" in errors

    again = torchrun("train.py", *resumed_settings(out, max_iters=step + 5))
    assert again.returncode == 0, again.stderr
    assert f"at step {step}" in again.stdout and f"iter {step + 5}:" in again.stdout


def test_second_ctrl_c_stops_at_once(capfd):
    request = StopRequest()
    request.handle(signal.SIGINT, None)
    assert request.number == signal.SIGINT and "saving" in capfd.readouterr().out
    request.handle(signal.SIGTERM, None)  # a repeated signal does not stop it earlier
    assert request.number == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        request.handle(signal.SIGINT, None)


def test_stop_interrupts_an_evaluation(settings, resume, train_tiny, tmp_path, monkeypatch):
    """The previous step is saved, and the run resumes with that evaluation, bit for bit."""
    whole = train_tiny(tmp_path / "whole", dropout=0.1)
    stop, batches, original = StopRequest(), [], train.to_device

    def at_the_fourth_step(batch, device):
        batches.append(batch)
        if len(batches) == 9:  # four of the first evaluation, four steps, and the second begins
            stop.number = signal.SIGTERM
        return original(batch, device)

    monkeypatch.setattr(train, "to_device", at_the_fourth_step)
    with pytest.raises(SystemExit) as left:
        train.main(configure(train.TrainConfig, settings(tmp_path / "out", dropout=0.1)), stop)
    assert left.value.code == 128 + signal.SIGTERM and len(batches) == 9
    monkeypatch.undo()
    assert torch.load(tmp_path / "out" / "last.pt")["iter_num"] == 4
    again = resume(tmp_path / "out")
    assert again.series("val_loss") == whole.series("val_loss")
    for name, weight in whole.checkpoint()["model"].items():
        assert torch.equal(weight, again.checkpoint()["model"][name])


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_stop_before_the_first_step_saves_nothing(settings, tmp_path, capsys):
    stop = StopRequest()
    stop.number = signal.SIGTERM
    with pytest.raises(SystemExit) as left:
        train.main(configure(train.TrainConfig, settings(tmp_path / "out")), stop)
    assert left.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "last.pt").exists()
