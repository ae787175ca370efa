"""The run log is complete, whatever a backend does, and does not affect training."""

import json
import math
import os
import re
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from brisk.data.dataset import write_dataset
from brisk.data.saved_tokenizer import from_dict
from brisk.data.tokenizer import CharTokenizer
from brisk.device import Device
from brisk.errors import UserError
from brisk.reporting.curves import read_run
from brisk.reporting.forecast import Forecast, duration
from brisk.reporting.run_log import RunLog, truncate_metrics
from model import GPT

RECORD = {"loss": 2.5, "step_ms": 20.0, "mfu": 0.5, "tokens_per_second": 1000.0, "tokens": 768}
RECORD |= {"lr": 1e-3, "grad_norm": 1.5, "clipped": 0.25, "memory": 10**9}
EVALUATION = {"train_loss": 2.0, "val_loss": 2.25, "tokens": 768}
SAMPLES = ["ROMEO:\n<b>莎</b>\u2028\x1b[31m", "JULIET:"]  # with markup and control characters


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


def test_console_and_metrics_file(log, tmp_path, capsys):
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


def test_other_ranks_are_silent(tmp_path, capsys):
    log = RunLog(active=False)
    log.open(tmp_path, 0, 9, {})
    log.say("a word")
    log.iteration(0, RECORD)
    log.advance()
    log.close()
    assert capsys.readouterr().out == "" and not list(tmp_path.iterdir())


def test_truncate_drops_later_and_broken_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "seconds": step / 2}) for step in range(6)]
    path.write_text("\n".join(whole) + '\n{"step": 2, "sec', encoding="utf-8")
    assert truncate_metrics(path, 4) == 1.5
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 3]
    assert truncate_metrics(tmp_path / "none.jsonl", 4) == 0.0


def test_seconds_continue_after_a_restart(log, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": -1, "seconds": 100.0}\n', encoding="utf-8")
    log = log()
    log.iteration(0, RECORD)
    log.close()
    assert 100 <= lines(tmp_path)[-1]["seconds"] < 160


def test_wall_clock_changes_have_no_effect(log, tmp_path, monkeypatch):
    log, now = log(), time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    log.iteration(0, RECORD)
    log.close()
    assert 0 <= lines(tmp_path)[-1]["seconds"] < 60


def test_seconds_continue_from_the_maximum(log, tmp_path):
    """Earlier versions recorded the wall clock, which may be set back."""
    text = '{"step": -2, "seconds": 100.0}\n{"step": -1, "seconds": -3500.0}\n'
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    log = log()
    log.iteration(0, RECORD)
    log.close()
    assert 100 <= lines(tmp_path)[-1]["seconds"] < 160


def test_nonfinite_losses_are_null(log, tmp_path):
    """null is valid JSON, and a gap in the curves."""
    pytest.importorskip("matplotlib")
    log = log()
    log.iteration(0, RECORD)
    log.iteration(1, RECORD | {"loss": math.nan, "grad_norm": math.inf})
    log.evaluation(2, EVALUATION | {"val_loss": -math.inf})
    log.close()

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    _, second, third = (json.loads(line, parse_constant=refuse) for line in text.splitlines())
    assert second["loss"] is second["grad_norm"] is third["val_loss"] is None
    assert second["lr"] == RECORD["lr"] and third["train_loss"] == EVALUATION["train_loss"]
    steps, losses = read_run(tmp_path).curve("loss")
    assert list(steps) == [0, 1] and losses[0] == 2.5 and math.isnan(losses[1])


def test_unknown_values_are_omitted(log, tmp_path):
    log = log(tensorboard=True)
    log.iteration(0, RECORD | {"memory": None})
    log.close()
    assert lines(tmp_path)[0].keys() == {"step", "seconds", *RECORD} - {"memory"}


@pytest.mark.parametrize(
    ("package", "recorders"),
    [("wandb", {"wandb": ("project", "name")}), ("tensorboard", {"tensorboard": True})],
)
def test_missing_backend_is_one_line(log, capsys, monkeypatch, package, recorders):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    log = log(**recorders)
    log.iteration(0, RECORD)
    log.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and f"pip install {package}" in said[0]


class Failing:
    """A backend that fails at one of its calls."""

    def __init__(self, at):
        self.at, self.calls = at, []

    def __getattr__(self, name):
        def call(*_, **__):
            self.calls.append(name)
            if name == self.at:
                raise OSError("no route to host")

        return call


@pytest.mark.parametrize(
    ("recorder", "at", "calls"),
    [
        ("wandb", "log", ["log"]),
        ("wandb", "finish", ["log", "log", "log", "finish"]),
        ("board", "add_scalar", ["add_scalar"]),
        ("board", "add_text", None),
        ("board", "close", None),
    ],
)
def test_failing_backend_does_not_stop_the_run(log, capsys, tmp_path, recorder, at, calls):
    log, failing = log(), Failing(at)
    setattr(log, recorder, failing)
    log.iteration(0, RECORD)
    log.evaluation(0, EVALUATION | {"samples": ["text"]})
    log.iteration(1, RECORD)
    log.close()
    said = capsys.readouterr().out
    name = {"board": "TensorBoard"}.get(recorder, recorder)
    assert said.count("no route to host") == 1 and f"{name} failed" in said
    assert len(lines(tmp_path)) == 3
    assert failing.calls.count(at) == 1 and calls in (failing.calls, None)


def test_backend_that_cannot_start_is_one_line(log, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    (tmp_path / "tensorboard").write_text("a file where the folder would be")
    log = log(tensorboard=True)
    log.iteration(0, RECORD)
    log.close()
    assert capsys.readouterr().out.count("TensorBoard could not start") == 1


def test_wandb_without_a_key_is_offline(tmp_path):
    """In a subprocess: wandb starts others, and would prompt at a terminal."""
    pytest.importorskip("wandb")
    script = (
        "import sys; from brisk.reporting.run_log import RunLog; log = RunLog();"
        "log.open(sys.argv[1], 0, 9, {'batch_size': 12}, wandb=('project', 'name'));"
        f"log.evaluation(0, {EVALUATION | {'samples': SAMPLES}});"
        f"log.iteration(0, {RECORD}); log.iteration(1, {RECORD | {'loss': 2.25}}); log.close()"
    )
    hidden = ("WANDB_API_KEY", "WANDB_MODE")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "PYTHONIOENCODING": "utf-8"}
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "out")],
        env=env | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "wandb has no API key" in done.stdout
    [run] = (tmp_path / "out" / "wandb").glob("offline-run-*")
    [recorded] = run.glob("*.wandb")
    config, history = read_wandb(recorded)
    assert config["batch_size"] == 12
    loss = {row["_step"]: row["train/batch_loss"] for row in history if "train/batch_loss" in row}
    assert loss == {0: 2.5, 1: 2.25}
    first = next(row for row in history if row["_step"] == 0)
    assert (first["val/loss"], first["train/loss"]) == (2.25, 2.0)
    assert first.items() >= {key: RECORD[key] for key in RECORD if key != "loss"}.items()
    [page] = (run / "files" / "media" / "html").glob("samples*.html")
    shown = page.read_text(encoding="utf-8")
    assert "&lt;b&gt;莎&lt;/b&gt;" in shown and "JULIET:" in shown


def read_wandb(path):
    """(config, rows of the history) of a run that was recorded offline.

    The file is LevelDB's log format after 7 bytes of its own: blocks of 32 KiB, in them fragments
    with a checksum (4 bytes), a length (2) and a type (1 whole, 2 first, 3 middle, 4 last).
    """
    proto = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    data, at, pending, config, history = path.read_bytes(), 7, b"", {}, []
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        pending += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (2, 3):
            continue
        record = proto.Record.FromString(pending)
        pending = b""
        if items := record.history.item:
            row = {item.key or "/".join(item.nested_key): item.value_json for item in items}
            history.append({key: json.loads(value) for key, value in row.items()})
        for item in record.run.config.update:
            config[item.key] = json.loads(item.value_json)
    return config, history


def test_tensorboard_has_curves_and_samples(log, tmp_path):
    pytest.importorskip("tensorboard")
    log = log(tensorboard=True)
    log.evaluation(0, EVALUATION)
    log.iteration(0, RECORD)
    log.evaluation(4, EVALUATION | {"val_loss": 1.25, "samples": SAMPLES})
    log.close()
    events = read_tensorboard(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("val/loss")] == [(0, 2.25), (4, 1.25)]
    names = {"train/loss", "val/loss", "train/batch_loss", *RECORD} - {"loss"}
    assert set(events.Tags()["scalars"]) == names
    for key in ("grad_norm", "clipped", "memory", "mfu", "tokens_per_second"):
        assert [event.value for event in events.Scalars(key)] == [pytest.approx(RECORD[key])]
    [text] = events.Tensors("samples/text_summary")
    assert text.step == 4 and "莎" in text.tensor_proto.string_val[0].decode()


def test_tensorboard_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    for first, steps in ((0, range(6)), (3, range(3, 8))):
        log = RunLog()
        log.open(tmp_path, first, 9, {}, tensorboard=True)
        for step in steps:
            log.iteration(step, RECORD | {"loss": float(first)})
        log.close()
    losses = {
        event.step: event.value for event in read_tensorboard(tmp_path).Scalars("train/batch_loss")
    }
    assert losses == {0: 0, 1: 0, 2: 0, 3: 3, 4: 3, 5: 3, 6: 3, 7: 3}
    assert len(read_tensorboard(tmp_path).Scalars("train/batch_loss")) == 8


def read_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


# ----------------------------------------------------------------------------- of each step


def test_clipped_fraction_since_the_last_line(train_tiny, resume, tmp_path):
    free = train_tiny(tmp_path / "free", grad_clip=0)
    assert set(free.series("clipped").values()) == {0}
    limit = sorted(free.series("grad_norm").values())[4]
    each = train_tiny(tmp_path / "each", grad_clip=limit)
    over = {step: norm > limit for step, norm in each.series("grad_norm").items()}
    assert each.series("clipped") == over and 0 < sum(over.values()) < 8

    third = train_tiny(tmp_path / "third", grad_clip=limit, log_interval=3)  # one evaluated between
    shares = {0: [0], 3: [1, 2, 3], 6: [4, 5, 6]}
    expected = {step: sum(over[k] for k in steps) / len(steps) for step, steps in shares.items()}
    assert third.series("clipped") == pytest.approx(expected)
    again = resume(tmp_path / "third", max_iters=9, grad_clip=1e-9)
    assert again.series("clipped")[9] == 1  # of steps 8 and 9


def test_memory_is_logged_and_never_falls(train_tiny, tmp_path):
    pytest.importorskip("resource")
    memory = list(train_tiny(tmp_path / "out").series("memory").values())
    assert len(memory) == 8 and memory == sorted(memory) and memory[0] > 50e6


# ----------------------------------------------------------------------------- texts


def test_samples_do_not_change_the_run(train_tiny, tmp_path):
    hard = {"dropout": 0.2, "eval_iters": 1}
    without = train_tiny(tmp_path / "without", **hard)
    drawn = train_tiny(tmp_path / "with", eval_samples=3, eval_start="Shall I", **hard)
    assert drawn.series("val_loss") == without.series("val_loss")
    assert drawn.series("loss") == without.series("loss")
    before, after = without.checkpoint()["model"], drawn.checkpoint()["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not without.series("samples")

    samples = drawn.series("samples")
    assert list(samples) == [0, 4, 8]
    for texts in samples.values():
        assert len(set(texts)) == 3
        assert all(text.startswith("Shall I") and len(text) == 107 for text in texts)
    assert samples[0] != samples[8]  # it has learned
    for line in samples[8][0].splitlines():
        assert f"  | {line}" in drawn.console.splitlines()


def test_samples_match_the_saved_model(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "out", eval_samples=1, eval_start="Thou")
    checkpoint = run.checkpoint()
    tokenizer = from_dict(checkpoint["tokenizer"])
    idx = torch.tensor(tokenizer.encode("Thou").astype("int64"))[None]
    ids = GPT.from_checkpoint(checkpoint).generate(idx, 100, 0.8, 200, seed=1337)
    assert run.series("samples")[8] == [tokenizer.decode(ids[0].tolist())]


def test_samples_of_documents(train_tiny, lines_data, tmp_path):
    rows = {"data_dir": lines_data, "rows": "documents", "max_iters": 60, "eval_interval": 60}
    run = train_tiny(tmp_path / "out", eval_samples=8, **rows)
    texts = run.series("samples")[61]
    assert len(texts) == 8 and not any("endoftext" in text for text in texts)
    assert min(len(text) for text in texts) < 100
    started = train_tiny(tmp_path / "out", eval_samples=2, eval_start="Thou", **rows)
    assert all(text.startswith("Thou") for text in started.series("samples")[61])


def test_samples_without_a_newline_token(train_tiny, tmp_path):
    write_dataset(
        tmp_path / "data", CharTokenizer("ab"), {"train": ["ab" * 99], "val": ["ab" * 99]}, "ab"
    )
    run = train_tiny(tmp_path / "out", data_dir=tmp_path / "data", eval_samples=1)
    assert set(run.series("samples")[8][0]) <= {"a", "b"}


def test_unknown_character_in_the_prompt(train_tiny, tmp_path):
    with pytest.raises(UserError, match=r"--eval_start: .*莎"):
        train_tiny(tmp_path / "out", eval_samples=1, eval_start="莎")
    assert not (tmp_path / "out").exists()


def test_samples_need_a_tokenizer(train_tiny, char_data, tmp_path, monkeypatch):
    monkeypatch.setattr("brisk.training.inputs.load_tokenizer", lambda *_: None)
    monkeypatch.setattr("brisk.training.inputs.describe_tokenizer", lambda *_: None)
    run = train_tiny(tmp_path / "out", eval_samples=1)
    assert run.console.count("--eval_samples needs a tokenizer") == 1
    assert not run.series("samples")


def test_samples_after_a_resume(train_tiny, resume, tmp_path):
    whole = train_tiny(tmp_path / "whole", eval_samples=1, max_iters=11)
    stopped = train_tiny(tmp_path / "out", eval_samples=1)
    with open(stopped.out_dir / "metrics.jsonl", "a", encoding="utf-8") as file:
        later = {"step": 9, "seconds": 9.0, "val_loss": 1.0, "samples": ["later than was saved"]}
        file.write(json.dumps(later) + "\n")
    assert resume(stopped.out_dir, max_iters=11).series("samples") == whole.series("samples")


def test_samples_cannot_control_the_terminal(log, capsys, tmp_path):
    log = log()
    log.evaluation(0, EVALUATION | {"samples": ["one\niter 5: loss\r\x1b[31mred\x07\u2028two", ""]})
    log.close()
    assert lines(tmp_path)[0]["samples"][0].endswith("\u2028two")
    assert truncate_metrics(tmp_path / "metrics.jsonl", 1) >= 0 and len(lines(tmp_path)) == 1
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\x07" not in said and "  | two" in said.splitlines()
    assert not re.search(r"^iter", said, re.MULTILINE)


def test_unicode_spaces_and_joiners_are_kept(log, capsys):
    """These are not control characters: a Chinese indent, a joined emoji, Persian."""
    text = "\u3000\u3000床前明月光\tcol 👩\u200d💻 می\u200cخواهم"
    log = log()
    log.evaluation(0, EVALUATION | {"samples": [text]})
    log.close()
    assert f"  | {text}" in capsys.readouterr().out.splitlines()


def test_console_with_a_limited_encoding(script, settings, tmp_path):
    argv = settings(tmp_path / "莎", max_iters=0)
    done = script("train.py", *argv, env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is a thing of Unix")
def test_progress_bar_in_a_terminal(settings, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 120, 0, 0))
    argv = settings(tmp_path / "out", log_interval=1)
    root = ROOT
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
    forecast = Forecast(said.append, None, 1000, 10, 5, 40)
    forecast.said = said
    return forecast


def test_forecast_after_three_timings(forecast):
    for seconds in (3.0, 1.0, 2.0, 1.0, 1.0):
        forecast.add_timing("evaluation", seconds)
    # 5 * 40 batches of 1 s, 10,000 micro-batches estimated at 3 s
    guess = "an evaluation takes about 40 s, the run roughly 8 h"
    assert len(forecast.said) == 1 and forecast.said[0].startswith(guess)
    assert not forecast.is_complete
    for seconds in (9.0, 4.0, 2.0, 1.0):
        forecast.add_timing("micro-batch", seconds)
    assert forecast.is_complete
    assert forecast.said[1].startswith("a step takes about 20 s, the run about 6 h")
    assert "--gradient_accumulation_steps=1 makes it 10 times shorter" in forecast.said[1]
    assert len(forecast.said) == 2


def test_forecast_of_a_step_includes_the_optimizer(monkeypatch):
    """A step of one micro-batch of 1 s, and an update of 3 s; an evaluation between two steps."""
    clock, said = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    forecast = Forecast(said.append, Device(torch.device("cpu"), "float32"), 100, 1, 1, 0)
    for step in range(6):
        for _ in forecast.timed("evaluation", [0] if step == 2 else []):
            clock[0] += 50.0
        for _ in forecast.timed("micro-batch", [0]):
            clock[0] += 1.0
        clock[0] += 3.0
    assert [line for line in said if line.startswith("a step takes about 4 s")]


def test_forecast_ignores_compilation():
    """The first step of a compiled run takes minutes and does not predict the others."""
    said = []
    forecast = Forecast(said.append, None, 1000, 10, 5, 40, compiled=True)
    forecast.add_timing("evaluation", 90.0)
    forecast.add_timing("micro-batch", 100.0)
    assert said == []
    for seconds in (2.1, 2.0, 2.2):
        forecast.add_timing("micro-batch", seconds)
    assert len(said) == 1 and said[0].startswith("a step takes about 20 s, the run about 6 h")


def test_forecast_ignores_micro_batches_before_a_graph():
    """They are slower than replays, and the capture takes long."""
    said = []
    forecast = Forecast(said.append, None, 1000, 10, 5, 40, captured=True)
    for seconds in (9.0, 8.0, 8.0, 60.0, 2.0, 2.1, 2.0):
        assert said == []
        forecast.add_timing("micro-batch", seconds)
    assert len(said) == 1 and said[0].startswith("a step takes about 20 s, the run about 6 h")


def test_forecast_of_a_slow_step_is_immediate(forecast):
    forecast.add_timing("micro-batch", 60.0)
    assert forecast.said[0].startswith("a step takes about 10 min, the run about 7 days")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0204, "20 ms"), (42, "42 s"), (600, "10 min"), (7200, "2 h"), (864000, "10 days")],
)
def test_duration_units(seconds, text):
    assert duration(seconds) == text
