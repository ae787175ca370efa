"""A run's numbers arrive, whatever a recorder does, and cutting back leaves no line behind."""

import json
import os
import re
import subprocess
import sys

import pytest

from brisk.runlog import Forecast, RunLog, cut_metrics, duration

RECORD = {"loss": 2.5, "step_ms": 20.0, "mfu": 0.5, "tokens_per_second": 1000.0, "tokens": 768}


@pytest.fixture
def log(tmp_path):
    """A log that records in `tmp_path` from step 0."""

    def open_log(**recorders):
        log = RunLog()
        log.open(tmp_path, 0, 9, {"batch_size": 12}, **recorders)
        return log

    return open_log


def lines(folder):
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_nanogpts_lines_on_the_console_and_all_numbers_in_the_file(log, tmp_path, capsys):
    log = log()
    log.iteration(3, RECORD)
    log.evaluation(4, {"train_loss": 2.0, "val_loss": 2.25})
    log.close()
    assert capsys.readouterr().out.splitlines() == [
        "iter 3: loss 2.5000, time 20.00ms, mfu 50.00%",
        "step 4: train loss 2.0000, val loss 2.2500",
    ]
    first, second = lines(tmp_path)
    assert {key: first[key] for key in RECORD} == RECORD
    assert (second["step"], second["val_loss"]) == (4, 2.25)


def test_other_processes_are_silent(tmp_path, capsys):
    log = RunLog(active=False)
    log.open(tmp_path, 0, 9, {})
    log.say("a word")
    log.iteration(0, RECORD)
    log.advance()
    log.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_cutting_back_drops_later_lines_and_a_broken_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "seconds": step / 2}) for step in range(6)]
    path.write_text("\n".join(whole) + '\n{"step": 2, "sec', encoding="utf-8")
    assert cut_metrics(path, 4) == 1.5
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert cut_metrics(tmp_path / "none.jsonl", 4) == 0.0


def test_time_goes_on_after_a_restart(log, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": -1, "seconds": 100.0}\n', encoding="utf-8")
    log = log()
    log.iteration(0, RECORD)
    log.close()
    assert 100 <= lines(tmp_path)[-1]["seconds"] < 160


@pytest.mark.parametrize(
    ("package", "recorders"),
    [("wandb", {"wandb": ("project", "name")}), ("tensorboard", {"tensorboard": True})],
)
def test_a_recorder_that_is_not_installed_is_one_line(log, capsys, monkeypatch, package, recorders):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    log = log(**recorders)
    log.iteration(0, RECORD)
    log.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and f"pip install {package}" in said[0]


def test_a_recorder_that_fails_does_not_stop_the_run(log, capsys, tmp_path):
    class Failing:
        def log(self, *_, **__):
            raise OSError("no route to host")

    log = log()
    log.wandb = Failing()
    log.iteration(0, RECORD)
    log.iteration(1, RECORD)
    log.close()
    assert capsys.readouterr().out.count("no route to host") == 1
    assert len(lines(tmp_path)) == 2


def test_wandb_without_a_key_records_offline_and_asks_nothing(tmp_path):
    """In a process of its own: wandb starts others, and would ask on a terminal."""
    pytest.importorskip("wandb")
    script = (
        "import sys; from brisk.runlog import RunLog; log = RunLog();"
        "log.open(sys.argv[1], 0, 9, {}, wandb=('project', 'name'));"
        f"log.iteration(0, {RECORD}); log.close()"
    )
    hidden = ("WANDB_API_KEY", "WANDB_MODE")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")}
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb has no key" in done.stdout
    runs = list((tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1 and runs[0].stat().st_size > 0


def test_tensorboard_holds_the_curve(log, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = log(tensorboard=True)
    log.evaluation(0, {"train_loss": 2.0, "val_loss": 2.25})
    log.evaluation(4, {"train_loss": 1.0, "val_loss": 1.25})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(0, 2.25), (4, 1.25)]


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is a thing of Unix")
def test_a_terminal_shows_a_progress_bar(settings, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
    argv = settings(tmp_path / "out", log_interval=1)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    train = [sys.executable, os.path.join(root, "train.py"), *argv]
    with subprocess.Popen(train, stdout=subprocess.PIPE, stderr=side, cwd=tmp_path) as process:
        os.close(side)
        shown = b""
        try:
            while chunk := os.read(main, 4096):
                shown += chunk
        except OSError:  # Linux's way to say that the other side has closed
            pass
        process.stdout.read()
        assert process.wait(60) == 0
    assert re.search(rb"\d/8 \[\d+:\d+<.*loss=\d", shown), shown[-500:]
    assert b"tokens/s=" in shown


@pytest.fixture
def forecast():
    """A forecast of 1,000 steps of 10 micro-batches and 5 evaluations of 40 batches."""
    said = []
    forecast = Forecast(said.append, 1000, 10, 5, 40)
    forecast.said = said
    return forecast


def test_a_forecast_speaks_once_after_three_timings(forecast):
    for seconds in (3.0, 1.0, 2.0, 1.0, 1.0):
        forecast.evaluation_batch(seconds)
    # 5 * 40 batches of 1 s, 10,000 micro-batches at a guess of 3 s
    guess = "an evaluation takes about 40 s, the whole run at a first guess 8 h"
    assert len(forecast.said) == 1 and forecast.said[0].startswith(guess)
    assert not forecast.is_complete
    for seconds in (9.0, 4.0, 2.0, 1.0):
        forecast.micro_batch(seconds)
    assert forecast.is_complete
    assert forecast.said[1].startswith("a step takes about 20 s, the whole run 6 h")
    assert "--gradient_accumulation_steps=1 makes it 10 times shorter" in forecast.said[1]
    assert len(forecast.said) == 2


def test_a_long_wait_is_told_at_once(forecast):
    forecast.micro_batch(60.0)
    assert forecast.said[0].startswith("a step takes about 10 min, the whole run 7 days")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0204, "20 ms"), (42, "42 s"), (600, "10 min"), (7200, "2 h"), (864000, "10 days")],
)
def test_durations_are_told_in_a_unit_that_fits(seconds, text):
    assert duration(seconds) == text
