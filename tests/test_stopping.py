"""A run that is asked to stop finishes its step, saves, and goes on as if nothing had been."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from brisk.stopping import StopRequest, stop_requests

LONG = {"max_iters": 400, "lr_decay_iters": 400, "eval_interval": 1000, "dropout": 0.1}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_to_the_bit(settings, train_tiny, resume, tmp_path, number):
    train = str(Path(__file__).parent.parent / "train.py")
    argv = settings(tmp_path / "stopped", log_interval=1, **LONG)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, train, *argv], stdout=subprocess.PIPE, env=env)
    lines = iter(process.stdout.readline, b"")
    assert any(line.startswith(b"iter 20:") for line in lines)
    process.send_signal(number)
    said = b"".join(lines)
    assert process.wait(60) == 128 + number
    step = torch.load(tmp_path / "stopped" / "last.pt")["iter_num"]
    assert 20 < step < 400 and f"saved step {step}".encode() in said

    resumed = resume(tmp_path / "stopped").checkpoint()
    whole = train_tiny(tmp_path / "whole", **LONG).checkpoint()
    assert resumed["iter_num"] == whole["iter_num"] == 401
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name


def test_the_second_signal_stops_at_once(capsys):
    request = StopRequest()
    request.note(signal.SIGINT, None)
    assert request.number == signal.SIGINT and "saving" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        request.note(signal.SIGINT, None)


def test_the_handlers_before_come_back():
    before = signal.getsignal(signal.SIGINT)
    with stop_requests():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


def test_a_stop_before_the_first_step_saves_nothing(settings, tmp_path, capsys):
    import train
    from configurator import configure

    stop = StopRequest()
    stop.number = signal.SIGTERM
    with pytest.raises(SystemExit) as left:
        train.main(configure(train.TrainConfig, settings(tmp_path / "out")), stop)
    assert left.value.code == 128 + signal.SIGTERM
    assert not (tmp_path / "out" / "last.pt").exists()
