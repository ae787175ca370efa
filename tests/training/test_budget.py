"""Runs that end by time, or when the validation loss has stopped falling."""

import json
import time
from types import SimpleNamespace

import pytest

import train
from brisk.training.budget import fit_to_minutes
from configurator import configure


def fitted(*argv, step_seconds=0.1, first_step=0, micro_batches=(0,)):
    config = configure(train.TrainConfig, [*argv])
    plan = SimpleNamespace(micro_batches=micro_batches, first_step=first_step)
    return fit_to_minutes(config, plan, step_seconds, say=lambda line: None)


@pytest.mark.parametrize("minutes", [0.5, 5, 60])
@pytest.mark.parametrize("step_seconds", [0.001, 0.1, 2.0])
def test_steps_and_evaluations_fill_the_minutes(minutes, step_seconds):
    values = fitted(f"--minutes={minutes}", step_seconds=step_seconds)
    steps = values["max_iters"] + 1
    evaluations = steps / values["eval_interval"]
    seconds = steps * step_seconds
    seconds += evaluations * 2 * values["eval_iters"] * step_seconds / 3
    if steps > 10:
        assert seconds == pytest.approx(60 * minutes, rel=0.12)
    assert values["lr_decay_iters"] == values["max_iters"]


def test_keys_given_after_minutes_stay(tmp_path):
    values = fitted("--max_iters=5", "--minutes=1", "--eval_iters=3", "--lr_decay_iters=7")
    assert "max_iters" in values and not values.keys() & {"eval_iters", "lr_decay_iters"}


def test_run_takes_and_records_its_minutes(train_tiny, resume_run, tmp_path):
    began = time.perf_counter()
    run = train_tiny(tmp_path / "out", minutes=0.05, max_iters=10**6)
    assert time.perf_counter() - began < 60
    saved = run.checkpoint()
    assert saved["iter_num"] == saved["config"]["max_iters"] + 1
    assert saved["given"][-1] == "max_iters" and saved["config"]["lr_decay_iters"] < 10**6
    again = resume_run(tmp_path / "out")  # the length is saved: nothing is measured
    assert "at its end" in again.console and "for 0.05 minutes" not in again.console


def test_throwaway_steps_change_nothing(train_tiny, tmp_path):
    timed = train_tiny(tmp_path / "timed", minutes=0.05)
    saved = timed.checkpoint()["config"]
    keys = ("eval_iters", "eval_interval", "warmup_iters", "lr_decay_iters", "max_iters")
    plain = train_tiny(tmp_path / "plain", **{key: saved[key] for key in keys})
    assert timed.series("val_loss") == plain.series("val_loss")


PATIENT = {"eval_interval": 1, "learning_rate": 0.5, "min_lr": 0.5, "max_iters": 60, "patience": 3}


def test_patience_ends_the_run(train_tiny, resume_run, tmp_path):
    run = train_tiny(tmp_path / "out", **PATIENT)
    losses = run.series("val_loss")
    steps = sorted(losses)
    best = min(steps, key=losses.get)
    assert steps[-1] < 61 and steps[-1] - best == 3
    assert "stopped early: 3 evaluations without a lower val loss" in run.console
    assert "at its end" in resume_run(tmp_path / "out").console
    longer = resume_run(tmp_path / "out", patience=5)
    longer = max(longer.series("val_loss"))
    assert longer > steps[-1]
    again = resume_run(tmp_path / "out", max_iters=70)  # a new length restarts patience
    assert max(again.series("val_loss")) > longer


def test_patience_counts_over_resumes(train_tiny, train_until, resume_run, tmp_path):
    whole = train_tiny(tmp_path / "whole", **PATIENT)
    last = max(whole.series("val_loss"))
    for stop in (1, last - 1):
        train_until(tmp_path / f"{stop}", stop, **PATIENT)
        run = resume_run(tmp_path / f"{stop}")
        assert run.series("val_loss") == whole.series("val_loss")
        assert json.dumps(run.checkpoint()["evals_since_best"]) == "3"
