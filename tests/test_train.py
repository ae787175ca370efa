"""The training loop: results, files and output of a run, and resuming it."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
from brisk.checkpoint import save_checkpoint
from brisk.data.dataset import write_dataset
from brisk.data.loader import TokenFile
from brisk.data.tokenizer import CharTokenizer
from brisk.errors import UserError
from brisk.interop import pretrained
from brisk.training.inputs import vocabulary_rows
from configurator import configure


def equal(a, b):
    """Assert that nested dicts and lists are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def assert_same_end(run, other):
    """Assert that both runs have the same step, weights and optimizer state."""
    a, b = run.checkpoint(), other.checkpoint()
    for key in ("iter_num", "position", "model_args", "best_val_loss"):
        assert a[key] == b[key]
    assert equal(dict(a["model"]), dict(b["model"]))
    assert equal(a["optimizer"]["state"], b["optimizer"]["state"])
    strip = ("fused", "foreach")
    for one, two in zip(
        a["optimizer"]["param_groups"], b["optimizer"]["param_groups"], strict=True
    ):
        assert all(one[key] == two[key] for key in one if key not in strip)


def assert_same_losses(run, other):
    """Assert that `metrics.jsonl` has the same steps, once each and in order, and numbers."""
    for key in ("loss", "lr", "grad_norm", "tokens"):
        assert run.series(key) == other.series(key)
    for key in ("train_loss", "val_loss"):  # a stopped run has one evaluation more, at its stop
        mine, theirs = run.series(key), other.series(key)
        both = mine.keys() & theirs.keys()
        assert len(both) >= 3 and all(mine[step] == theirs[step] for step in both)
    for lines in (run.metrics, other.metrics):
        kinds = [(line["step"], "loss" not in line) for line in lines]
        assert len(set(kinds)) == len(kinds)
        steps = [line["step"] for line in lines]
        assert steps == sorted(steps)
        seconds = [line["seconds"] for line in lines]
        assert seconds == sorted(seconds)


@pytest.fixture(scope="module")
def trained(char_data, tmp_path_factory):
    """The folder of one finished run of eight steps, for tests that only read it."""
    from conftest import TINY

    out = tmp_path_factory.mktemp("trained") / "out"
    given = {**TINY, "data_dir": char_data, "out_dir": out}
    argv = [f"--{key}={value}" for key, value in given.items()]
    train.main(configure(train.TrainConfig, argv))
    return out


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of that run's folder, to resume."""
    return shutil.copytree(trained, tmp_path / "out")


# ----------------------------------------------------------------------------- resuming

HARD = {"dropout": 0.2, "gradient_accumulation_steps": 3}


@pytest.mark.parametrize(
    "changes, stop",
    [
        ({}, 3),
        ({}, 4),  # not at an evaluation
        ({"dropout": 0.2}, 3),
        ({"gradient_accumulation_steps": 3, "batch_size": 2}, 4),
        (HARD, 3),
        (HARD, 0),
        ({"dtype": "bfloat16"}, 3),
        ({"dtype": "auto", "dropout": 0.1}, 3),
        ({"decay_lr": False, "grad_clip": 0, "weight_decay": 0}, 3),
        ({"optimizer": "muon", "dropout": 0.2}, 3),
        ({"optimizer": "muon", "schedule": "wsd", "decay_frac": 0.5}, 4),
    ],
    ids=str,
)
def test_resume_matches_an_uninterrupted_run(train_tiny, resume, tmp_path, changes, stop):
    whole = train_tiny(tmp_path / "whole", **changes)
    first = train_tiny(tmp_path / "parts", **{**changes, "max_iters": stop})
    assert first.checkpoint()["iter_num"] == stop + 1
    second = resume(tmp_path / "parts", max_iters=7)
    assert f"Resuming training from {tmp_path / 'parts'}" in second.console
    assert_same_losses(whole, second)
    assert_same_end(whole, second)


def test_resume_of_a_killed_run(train_tiny, resume, tmp_path, monkeypatch):
    """metrics.jsonl is some steps ahead of last.pt, and its last line is incomplete."""
    whole = train_tiny(tmp_path / "whole", dropout=0.1)
    rate = train.get_lr

    def killed_at_step_6(step, *rest):
        if step == 6:
            raise KeyboardInterrupt
        return rate(step, *rest)

    monkeypatch.setattr(train, "get_lr", killed_at_step_6)
    with pytest.raises(KeyboardInterrupt):
        train_tiny(tmp_path / "parts", dropout=0.1)
    monkeypatch.setattr(train, "get_lr", rate)
    metrics = tmp_path / "parts" / "metrics.jsonl"
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] == 5
    with open(metrics, "a") as file:
        file.write('{"step": 6, "lo')
    again = resume(tmp_path / "parts")
    assert "at step 4" in again.console
    assert_same_losses(whole, again)
    assert_same_end(whole, again)


def test_resume_from_an_older_checkpoint(train_tiny, resume, tmp_path):
    """The lines of metrics.jsonl from its step on are removed."""
    train_tiny(tmp_path / "out", max_iters=3)
    old = (tmp_path / "out" / "last.pt").read_bytes()
    whole = resume(tmp_path / "out", max_iters=7)
    before = whole.metrics
    for name in ("last.pt", "ckpt.pt"):
        (tmp_path / "out" / name).write_bytes(old)
    again = resume(tmp_path / "out", max_iters=5)
    assert max(line["step"] for line in again.metrics) == 6
    kept = [line for line in before if line["step"] < 4]
    assert again.metrics[: len(kept)] == kept  # earlier lines are unchanged
    assert again.series("loss") == {s: v for s, v in whole.series("loss").items() if s < 6}


def test_resume_takes_the_later_checkpoint(finished, resume, tmp_path):
    """If the best model is older than the newest, the newest is resumed."""
    checkpoint = torch.load(finished / "ckpt.pt")
    save_checkpoint(checkpoint | {"iter_num": 4}, finished / "ckpt.pt")
    assert "at step 8" in resume(finished, max_iters=8).console


def test_resume_of_a_finished_run(finished, resume):
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    run = resume(finished)
    assert "max_iters=7" in run.console
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_run_folder_can_be_moved(trained, finished, resume):
    before = (trained / "last.pt").read_bytes()
    run = resume(finished, max_iters=8)
    assert run.checkpoint()["iter_num"] == 9
    assert (trained / "last.pt").read_bytes() == before


def test_resume_takes_saved_settings(train_tiny, resume, tmp_path):
    given = {"dropout": 0.1, "batch_size": 3, "weight_decay": 0.5, "beta1": 0.8, "beta2": 0.9}
    given |= {"eval_iters": 3, "seed": 5, "grad_clip": 0.5, "bias": True, "eval_interval": 5}
    first = train_tiny(tmp_path / "out", **given, max_iters=4)
    second = resume(tmp_path / "out", max_iters=5)
    before, after = first.checkpoint()["config"], second.checkpoint()["config"]
    assert {key: after[key] for key in given} == given
    left = {"max_iters", "init_from"}
    assert {k: v for k, v in after.items() if k not in left} == {
        k: v for k, v in before.items() if k not in left
    }


def test_given_settings_override_saved_ones(finished, resume):
    given = {"learning_rate": 0.002, "weight_decay": 0.7, "beta1": 0.5, "beta2": 0.6}
    run = resume(finished, max_iters=9, decay_lr=False, batch_size=2, **given)
    checkpoint = run.checkpoint()
    matrices, vectors = checkpoint["optimizer"]["param_groups"]
    assert matrices["betas"] == vectors["betas"] == (0.5, 0.6)
    assert matrices["weight_decay"] == 0.7 and vectors["weight_decay"] == 0
    assert run.series("lr")[9] == 0.002
    assert run.series("tokens")[9] - run.series("tokens")[8] == 2 * 16
    assert checkpoint["config"]["weight_decay"] == 0.7


def test_config_file_overrides_saved_settings(finished, main, resumed_settings, tmp_path):
    (tmp_path / "more.py").write_text("max_iters = 8\nweight_decay = 0\n")
    run = main([str(tmp_path / "more.py"), *resumed_settings(finished)])
    assert run.checkpoint()["iter_num"] == 9
    assert run.checkpoint()["optimizer"]["param_groups"][0]["weight_decay"] == 0


def test_saved_int_fits_a_float_key(finished, resume):
    """nanoGPT saves `weight_decay = 0` of a config file as an int."""
    checkpoint = torch.load(finished / "last.pt")
    checkpoint["config"] |= {"weight_decay": 0, "dropout": 0, "min_lr": 0}
    for name in ("last.pt", "ckpt.pt"):
        save_checkpoint(checkpoint, finished / name)
    run = resume(finished, max_iters=8)
    assert run.checkpoint()["config"]["weight_decay"] == 0
    assert run.series("lr")[8] == 0  # past lr_decay_iters
    assert run.checkpoint()["optimizer"]["param_groups"][0]["weight_decay"] == 0


def test_new_shape_on_resume_is_ignored(finished, resume):
    run = resume(finished, max_iters=8, n_layer=3)
    assert re.search(r"^note: .*n_layer=1.* stays", run.console, re.MULTILINE)
    assert run.checkpoint()["model_args"]["n_layer"] == 1
    assert run.checkpoint()["config"]["n_layer"] == 1


def test_shorter_context_on_resume(finished, resume):
    run = resume(finished, max_iters=8, block_size=8)
    checkpoint = run.checkpoint()
    assert checkpoint["model_args"]["block_size"] == 8
    assert checkpoint["model"]["transformer.wpe.weight"].shape == (8, 16)


def test_max_iters_on_resume_overrides_epochs(train_tiny, resume, tmp_path):
    train_tiny(tmp_path / "out", max_epochs=0.3)
    steps = torch.load(tmp_path / "out" / "last.pt")["iter_num"]
    assert resume(tmp_path / "out", max_iters=steps + 2).checkpoint()["iter_num"] == steps + 3


def test_precision_is_kept_on_resume(train_tiny, resume, tmp_path):
    train_tiny(tmp_path / "out", dtype="bfloat16", max_iters=3)
    run = resume(tmp_path / "out", max_iters=4)
    assert run.checkpoint()["resolved"]["dtype"] == "bfloat16"
    assert re.search(r"^device: .*bfloat16", run.console, re.MULTILINE)
    run = resume(tmp_path / "out", max_iters=5, dtype="float32")
    assert run.checkpoint()["resolved"]["dtype"] == "float32"


def test_resume_with_float16_without_saved_scaler(finished, resume):
    checkpoint = torch.load(finished / "last.pt")
    del checkpoint["scaler"]  # as in nanoGPT's checkpoints
    for name in ("last.pt", "ckpt.pt"):
        save_checkpoint(checkpoint, finished / name)
    run = resume(finished, max_iters=8, dtype="float16")
    assert run.checkpoint()["scaler"]["scale"] > 0
    assert run.checkpoint()["iter_num"] == 9


def test_weights_alone_cannot_be_resumed(finished, resume):
    checkpoint = torch.load(finished / "last.pt")
    del checkpoint["optimizer"]
    for name in ("last.pt", "ckpt.pt"):
        save_checkpoint(checkpoint, finished / name)
    with pytest.raises(UserError, match="optimizer"):
        resume(finished, max_iters=8)


def test_resume_with_another_tokenizer_is_refused(finished, resume, tmp_path, text):
    """With equally many but different characters, training would silently ruin the model."""
    turned = text.swapcase()
    tokenizer = CharTokenizer(sorted(set(text + turned)))
    write_dataset(tmp_path / "data", tokenizer, {"train": [turned], "val": [text]}, "turned")
    with pytest.raises(UserError, match="another tokenizer"):
        resume(finished, max_iters=8, data_dir=tmp_path / "data")


# ----------------------------------------------------------------------------- starting


def test_scratch_archives_an_earlier_run(finished, train_tiny):
    before = {path.name: path.read_bytes() for path in finished.glob("[!.]*")}
    run = train_tiny(finished, max_iters=1)
    assert f"{finished / 'earlier'}" in run.console
    moved = {path.name: path.read_bytes() for path in (finished / "earlier").iterdir()}
    assert moved == before
    assert list(run.series("loss")) == [0, 1]
    train_tiny(finished, max_iters=0)
    kept = [json.loads(line) for line in before["metrics.jsonl"].splitlines()]
    found = [path.read_text().splitlines() for path in finished.glob("earlier*/metrics.jsonl")]
    assert sorted(map(len, found)) == sorted([len(kept), 4])  # both exist


def test_auto_starts_then_resumes(train_tiny, main, settings, tmp_path):
    argv = settings(tmp_path / "out", init_from="auto", max_iters=2)
    first = main(argv)
    assert list(first.series("loss")) == [0, 1, 2]
    second = main([*argv, "--max_iters=4"])
    assert "Resuming" in second.console
    assert list(second.series("loss")) == [0, 1, 2, 3, 4]
    assert not (tmp_path / "out" / "earlier").exists()


@pytest.mark.parametrize("init_from", ["scratch", "resume", "auto"])
def test_torchrun_restart_resumes(finished, main, settings, monkeypatch, init_from):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run = main(settings(finished, init_from=init_from, max_iters=8))
    assert "Resuming" in run.console and not (finished / "earlier").exists()
    assert run.checkpoint()["iter_num"] == 9


def test_torchrun_restart_without_checkpoint(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert train_tiny(tmp_path / "out", max_iters=0).checkpoint()["iter_num"] == 1


def test_resume_without_a_run(resume, tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        resume(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finetune_a_checkpoint(trained, train_tiny, tmp_path, monkeypatch):
    """The weights of a file, with a new optimizer and step count."""

    def rule(batch_size, block_size, n_embd):
        assert (batch_size, block_size, n_embd) == (4, 16, 16)  # the model's, not the defaults
        return "float32"

    monkeypatch.setattr("brisk.training.plan.cpu_training_dtype", rule)
    shape = {"n_layer": None, "n_head": None, "n_embd": None, "block_size": None, "bias": None}
    start = trained / "ckpt.pt"
    run = train_tiny(tmp_path / "new", init_from=start, max_iters=1, dtype="auto", **shape)
    source = torch.load(start)
    assert list(run.series("loss")) == [0, 1]
    assert run.series("val_loss")[0] == pytest.approx(source["best_val_loss"], abs=1e-6)
    assert run.checkpoint()["model_args"] == source["model_args"]
    assert run.checkpoint()["position"] == 2 * 4
    assert {s["step"].item() for s in run.checkpoint()["optimizer"]["state"].values()} == {2}


def test_finetune_with_a_shorter_context(trained, train_tiny, tmp_path):
    run = train_tiny(tmp_path / "new", init_from=trained / "ckpt.pt", block_size=8, max_iters=0)
    assert run.checkpoint()["model_args"]["block_size"] == 8
    with pytest.raises(UserError, match="block_size=32"):
        train_tiny(tmp_path / "new", init_from=trained / "ckpt.pt", block_size=32)


# ----------------------------------------------------------------------------- writing or not


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_layers_do_not_change(train_tiny, resume, tmp_path, optimizer):
    start = train_tiny(tmp_path / "start", n_layer=2)
    given = {"init_from": start.out_dir / "ckpt.pt", "freeze_layers": 1, "optimizer": optimizer}
    tuned = train_tiny(tmp_path / "out", dropout=0.1, **given)
    before, after = start.checkpoint("ckpt.pt")["model"], tuned.checkpoint()["model"]
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    lower = ("transformer.wte", "transformer.wpe", "lm_head", "transformer.h.0.")
    assert frozen == {name for name in before if name.startswith(lower)}

    shorter = train_tiny(tmp_path / "stopped", dropout=0.1, max_iters=3, **given)
    assert_same_end(resume(shorter.out_dir, max_iters=7), tuned)


def test_too_many_frozen_layers(train_tiny, tmp_path):
    with pytest.raises(UserError, match="freeze_layers=2: the model has 1"):
        train_tiny(tmp_path / "out", freeze_layers=2)


def test_eval_only_saves_nothing(trained, finished, train_tiny, resume, tmp_path):
    fresh = train_tiny(tmp_path / "fresh", eval_only=True)
    assert not fresh.out_dir.exists()
    pattern = r"^step 0: train loss [\d.]+, val loss [\d.]+$"
    assert len(re.findall(pattern, fresh.console, re.MULTILINE)) == 1
    assert "iter 0" not in fresh.console

    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    again = resume(finished, eval_only=True)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before
    last = json.loads(before["metrics.jsonl"].splitlines()[-1])
    losses = f"step 8: train loss {last['train_loss']:.4f}, val loss {last['val_loss']:.4f}"
    assert losses in again.console

    train_tiny(finished, eval_only=True)  # not even an earlier run is moved
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_dry_run_needs_no_data(main, settings, tmp_path, char_data):
    argv = [a for a in settings(tmp_path / "out") if not a.startswith("--data_dir")]
    argv += ["--dry_run", f"--data_dir={tmp_path / 'nowhere'}"]
    console = main(argv).console
    assert "is not prepared; assuming a vocabulary of 50,304" in console
    assert re.search(r"compute: [\d.e+]+ FLOP; at least .* TFLOP/s", console)
    with pytest.raises(UserError, match=r"no train\.bin"):  # its length is needed
        main([*argv, "--max_epochs=2"])


def test_notes_on_float16_and_mfu(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "out", dtype="float16", max_iters=1)
    assert "far slower" in run.console and "float32 matrix product" in run.console
    assert max(run.series("mfu").values()) < 1


def test_dry_run_writes_nothing(finished, train_tiny, resume, tmp_path):
    fresh = train_tiny(tmp_path / "fresh", dry_run=True)
    assert not fresh.out_dir.exists()
    assert "8 steps" in fresh.console and "512 tokens" in fresh.console
    assert "step 0" not in fresh.console
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    train_tiny(finished, dry_run=True)
    resume(finished, dry_run=True, max_iters=9)
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


@pytest.mark.parametrize("max_iters", [0, 1, 4, 5])
def test_max_iters_is_the_number_of_the_last_step(train_tiny, tmp_path, max_iters):
    run = train_tiny(tmp_path / "out", max_iters=max_iters)
    assert list(run.series("loss")) == list(range(max_iters + 1))
    evaluations = sorted({*range(0, max_iters + 1, 4), max_iters + 1})
    assert list(run.series("val_loss")) == evaluations  # the last one after the last step
    assert run.checkpoint()["iter_num"] == max_iters + 1
    assert run.checkpoint("ckpt.pt")["iter_num"] == max_iters + 1


def test_ckpt_is_best_and_last_is_newest(train_tiny, tmp_path):
    """A learning rate that becomes far too high, so that the best model is in the middle."""
    changes = {"learning_rate": 3.0, "min_lr": 3.0, "warmup_iters": 40, "lr_decay_iters": 40}
    changes |= {"max_iters": 30, "eval_interval": 1, "eval_iters": 8, "grad_clip": 0}
    run = train_tiny(tmp_path / "out", always_save_checkpoint=False, **changes)
    losses = run.series("val_loss")
    best = min(losses, key=losses.get)
    assert 0 < best < 31  # otherwise this test shows nothing
    assert run.checkpoint("ckpt.pt")["iter_num"] == best
    assert run.checkpoint("ckpt.pt")["best_val_loss"] == losses[best]
    assert run.checkpoint("last.pt")["iter_num"] == 31
    assert run.checkpoint("last.pt")["best_val_loss"] == losses[best]


def test_console_matches_nanogpt(trained, train_tiny, tmp_path):
    """Scripts parse these lines with regular expressions, so they match nanoGPT's."""
    console = train_tiny(tmp_path / "out").console
    assert re.search(r"^tokens per iteration will be: 64$", console, re.MULTILINE)
    assert re.search(r"^number of parameters: \d+\.\d\dM$", console, re.MULTILINE)
    steps = re.findall(
        r"^step (\d+): train loss (\d+\.\d{4}), val loss (\d+\.\d{4})$", console, re.MULTILINE
    )
    assert [int(step) for step, *_ in steps] == [0, 4, 8]
    iters = re.findall(
        r"^iter (\d+): loss (\d+\.\d{4}), time (\d+\.\d\d)ms, mfu (-?\d+\.\d\d)%$",
        console,
        re.MULTILINE,
    )
    assert [int(step) for step, *_ in iters] == list(range(8))
    saved = re.findall(r"^saving checkpoint to (.*)$", console, re.MULTILINE)
    assert saved == [str(tmp_path / "out")] * 2


def test_log_interval(train_tiny, tmp_path):
    assert list(train_tiny(tmp_path / "out", log_interval=3).series("loss")) == [0, 3, 6]


def test_keys_of_metrics(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    step = {"step", "tokens", "seconds", "loss", "lr", "grad_norm", "step_ms"}
    step |= {"tokens_per_second", "mfu", "clipped", "memory"}
    evaluation = {"step", "tokens", "seconds", "train_loss", "val_loss"}
    assert {frozenset(line) for line in lines} == {frozenset(step), frozenset(evaluation)}
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]  # it learns
    tokens = {line["step"]: line["tokens"] for line in lines if "loss" in line}
    assert tokens == {step: 64 * (step + 1) for step in range(8)}


# ----------------------------------------------------------------------------- numbers


def test_learning_rate_matches_nanogpt(train_tiny, tmp_path):
    rates = {"learning_rate": 1e-2, "min_lr": 1e-3, "warmup_iters": 3, "lr_decay_iters": 6}

    def get_lr(it):  # the formulas of nanoGPT's train.py
        if it < 3:
            return 1e-2 * (it + 1) / 4
        if it > 6:
            return 1e-3
        return 1e-3 + 0.5 * (1 + math.cos(math.pi * (it - 3) / 3)) * 9e-3

    found = train_tiny(tmp_path / "out", max_iters=8, **rates).series("lr")
    assert found == pytest.approx({step: get_lr(step) for step in range(9)})


@pytest.mark.parametrize("schedule, share", [("cosine", 0.2), ("wsd", 0.2), ("wsd", 0), ("wsd", 1)])
@pytest.mark.parametrize("warmup, decay", [(0, 0), (5, 5), (6, 3), (0, 1)])
def test_schedules_never_divide_by_zero(warmup, decay, schedule, share):
    config = SimpleNamespace(decay_lr=True, learning_rate=1.0, min_lr=0.1)
    config.schedule, config.decay_frac = schedule, share
    config.warmup_iters = warmup
    rates = [train.get_lr(step, config, decay) for step in range(10)]
    assert all(0 < rate <= 1 for rate in rates) and rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize("rows", ["windows", "documents"])
def test_accumulation_matches_the_whole_batch(train_tiny, tmp_path, lines_data, rows):
    """With twelve rows in one, three or twelve micro-batches, the loss is the sum over all targets
    divided by their number, also if documents of different lengths make the parts unequal."""
    runs = []
    for steps, size in ((1, 12), (3, 4), (12, 1)):
        batch = {"gradient_accumulation_steps": steps, "batch_size": size, "rows": rows}
        changes = {"data_dir": lines_data, "max_iters": 3, "eval_iters": 1}
        runs.append(train_tiny(tmp_path / f"out{steps}", **changes, **batch))
    for run in runs[1:]:
        for key in ("loss", "grad_norm"):
            assert run.series(key) == pytest.approx(runs[0].series(key), rel=2e-4)
        assert run.series("tokens") == runs[0].series("tokens")


def test_loss_is_of_the_rows_of_the_loader(train_tiny, char_data, tmp_path, trained):
    """The loss of a step is the loss of the model on the batch at its position."""
    start = trained / "ckpt.pt"
    run = train_tiny(tmp_path / "out", init_from=start, learning_rate=0, min_lr=0, max_iters=2)
    model = train.GPT.from_checkpoint(start).eval()
    data = TokenFile(char_data / "train.bin", 16, model.config.vocab_size, seed=1337)
    for step, loss in run.series("loss").items():
        with torch.no_grad():
            expected = model(*data.batch(step * 4, 4))[1].item()
        assert loss == pytest.approx(expected, abs=1e-6)


def test_run_matches_a_textbook_loop(train_tiny, char_data, tmp_path, trained):
    """A loop in plain PyTorch (forward, backward, clip, AdamW with two groups) ends with the same
    weights."""
    start = trained / "ckpt.pt"
    changes = {"gradient_accumulation_steps": 2, "batch_size": 3, "max_iters": 4}
    changes |= {"grad_clip": 0.3, "weight_decay": 0.4, "beta1": 0.8, "beta2": 0.9}
    run = train_tiny(tmp_path / "out", init_from=start, **changes)

    model = train.GPT.from_checkpoint(start).train()
    decayed = [w for w in model.parameters() if w.dim() > 1]
    plain = [w for w in model.parameters() if w.dim() == 1]
    groups = [{"params": decayed, "weight_decay": 0.4}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    data = TokenFile(char_data / "train.bin", 16, model.config.vocab_size, seed=1337)
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = run.series("lr")[step]
        _, loss = model(*data.batch(6 * step, 6))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        assert norm > 0.3  # it does clip
        optimizer.step()
        optimizer.zero_grad()
        assert run.series("loss")[step] == pytest.approx(loss.item(), abs=1e-5)
        assert run.series("grad_norm")[step] == pytest.approx(norm.item(), abs=1e-4)
    # The two add up a gradient's 6 rows of 16 terms in different orders. Roundings of 2^-24 of the
    # clipped gradient's length are independent: 96 of them amount to √96 (Higham & Mary 2019).
    # AdamW moves a weight by lr m / √v, which amplifies them where its gradients, and so √v, are
    # small.
    rounding, weights = 96**0.5 * 2**-24 * 0.3, run.checkpoint()["model"]
    rates, tolerances = run.series("lr").values(), []
    for name, expected in model.named_parameters():
        v = optimizer.state[expected]["exp_avg_sq"] / (1 - 0.9**5)
        tolerances.append(1e-7 + sum(rates) * rounding / v.sqrt())
        assert ((weights[name] - expected).abs() <= tolerances[-1]).all(), name
    assert torch.cat([each.flatten() for each in tolerances]).median() < 0.005 * max(rates)


def test_evaluations_read_the_same_windows(train_tiny, tmp_path):
    """A model that does not change has the same loss for any dropout, seed and batch size."""
    still = {"learning_rate": 0, "min_lr": 0, "weight_decay": 0, "eval_interval": 2}
    run = train_tiny(tmp_path / "out", dropout=0.3, **still)
    assert len(set(run.series("val_loss").values())) == 1
    assert len(set(run.series("train_loss").values())) == 1
    assert len(set(run.series("loss").values())) > 1
    start = tmp_path / "out" / "ckpt.pt"
    other = {"gradient_accumulation_steps": 3, "seed": 99, "init_from": start}
    again = train_tiny(tmp_path / "other", max_iters=0, **other)
    assert again.series("val_loss")[0] == run.series("val_loss")[0]


def test_seed_determines_the_run(train_tiny, tmp_path):
    changes = {"max_iters": 2, "dropout": 0.1}
    a = train_tiny(tmp_path / "a", **changes)
    b = train_tiny(tmp_path / "b", **changes)
    c = train_tiny(tmp_path / "c", **changes, seed=7)
    assert a.series("loss") == b.series("loss") != c.series("loss")
    assert_same_end(a, b)


def test_dropout_differs_between_steps(train_tiny, tmp_path):
    """With one row and a model that does not change, losses differ only by dropout."""
    splits = {"train": ["a" * 9 + "b" * 8], "val": ["ab" * 9]}
    write_dataset(tmp_path, CharTokenizer("ab"), splits, "letters")
    still = {"learning_rate": 0, "min_lr": 0, "weight_decay": 0, "data_dir": tmp_path}
    run = train_tiny(tmp_path / "out", dropout=0.5, batch_size=1, **still)
    assert len(set(run.series("loss").values())) == 8
    run = train_tiny(tmp_path / "out", dropout=0.0, batch_size=1, **still)
    assert len(set(run.series("loss").values())) == 1


def test_max_epochs(train_tiny, char_data, tmp_path):
    run = train_tiny(tmp_path / "out", max_epochs=2, max_iters=None, lr_decay_iters=None)
    rows = TokenFile(char_data / "train.bin", 16, 100).rows
    steps = len(run.series("loss"))
    assert steps == round(2 * rows / 4)
    told = float(re.search(r"^plan: .* ([\d.]+) epochs", run.console, re.MULTILINE)[1])
    assert told == pytest.approx(2, abs=2 / rows * 2)  # to half a step
    assert run.series("lr")[steps - 1] == pytest.approx(1e-3)  # min_lr is reached at the end
    given = train_tiny(tmp_path / "given", max_epochs=0.5, lr_decay_iters=1000)
    assert given.series("lr")[len(given.series("lr")) - 1] > 9e-3
    with pytest.raises(UserError, match="max_epochs"):
        train_tiny(tmp_path / "endless", max_epochs=1e308)


# ----------------------------------------------------------------------------- vocabulary


def test_vocab_size_of_characters(trained, text):
    checkpoint = torch.load(trained / "last.pt")
    assert checkpoint["model_args"]["vocab_size"] == len(set(text))
    assert checkpoint["model"]["transformer.wte.weight"].shape == (len(set(text)), 16)


@pytest.mark.parametrize(
    "kind, size, rows",
    [("char", 65, 65), ("byte", 257, 257), ("bpe", 1000, 1024), ("bpe", 50257, 50304)],
)
def test_vocabulary_rows(kind, size, rows):
    assert vocabulary_rows(SimpleNamespace(kind=kind, vocab_size=size)) == rows


def test_data_without_meta_is_gpt2(train_tiny, tmp_path, monkeypatch):
    """nanoGPT's GPT-2 data sets are only .bin files. Without GPT-2's vocabulary the run continues,
    and its checkpoint can be sampled where the vocabulary is available."""

    def no_network():
        raise UserError("cannot get GPT-2's vocabulary")

    monkeypatch.setattr("brisk.training.resume.gpt2", no_network)
    ids = np.random.default_rng(0).integers(0, 50257, 400)
    for split in ("train", "val"):
        ids.astype("<u2").tofile(tmp_path / f"{split}.bin")
    changes = {"data_dir": tmp_path, "n_embd": 8, "max_iters": 0, "eval_iters": 1}
    run = train_tiny(tmp_path / "out", **changes)
    assert run.checkpoint()["model_args"]["vocab_size"] == 50304
    assert run.series("loss")[0] == pytest.approx(math.log(50304), abs=0.1)
    monkeypatch.setattr(pretrained, "gpt2", lambda: "GPT-2's")
    assert pretrained.tokenizer_of(run.checkpoint()) == "GPT-2's"


# ----------------------------------------------------------------------------- the file


def test_checkpoint_matches_nanogpt(trained):
    checkpoint = torch.load(trained / "ckpt.pt", weights_only=True)
    keys = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
    assert keys <= checkpoint.keys()
    seven = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
    assert checkpoint["model_args"].keys() == seven
    names = checkpoint["model"].keys()
    assert {"lm_head.weight", "transformer.wte.weight"} <= names
    assert not any(name.startswith(("_orig_mod.", "module.")) for name in names)
    matrices, vectors = checkpoint["optimizer"]["param_groups"]
    # wte, wpe, four matrices in the block; two norms in the block and one at the end, no biases
    assert [len(group["params"]) for group in (matrices, vectors)] == [6, 3]
    assert matrices["weight_decay"] == 0.1 and vectors["weight_decay"] == 0
    assert type(checkpoint["best_val_loss"]) is float and type(checkpoint["iter_num"]) is int


def test_checkpoint_size(trained):
    """The tied weight is stored once, and both names are links to one file."""
    checkpoint = torch.load(trained / "ckpt.pt")
    numbers = sum(w.numel() for w in checkpoint["model"].values())
    numbers -= checkpoint["model"]["lm_head.weight"].numel()
    assert (trained / "ckpt.pt").stat().st_size < 3 * 4 * numbers + 40_000
    assert (trained / "ckpt.pt").samefile(trained / "last.pt")


def test_files_of_a_run(trained):
    assert sorted(path.name for path in trained.iterdir()) == [
        ".lock",
        "ckpt.pt",
        "last.pt",
        "loss.png",
        "metrics.jsonl",
    ]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_run_matches_eager(train_tiny, resume, tmp_path):
    plain = train_tiny(tmp_path / "plain", max_iters=3)
    compiled = train_tiny(tmp_path / "compiled", max_iters=3, compile=True)
    assert compiled.series("loss") == pytest.approx(plain.series("loss"), abs=1e-4)
    assert compiled.checkpoint()["model"].keys() == plain.checkpoint()["model"].keys()
    assert compiled.checkpoint()["model_args"] == plain.checkpoint()["model_args"]
    again = resume(tmp_path / "compiled", max_iters=7)
    assert again.series("loss") == pytest.approx(
        train_tiny(tmp_path / "whole").series("loss"), abs=1e-3
    )


def test_run_without_a_compiler(train_tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("brisk.device.shutil.which", lambda name: None)
    run = train_tiny(tmp_path / "out", compile=True, max_iters=0)
    assert re.search(r"^not compiling: ", run.console, re.MULTILINE)
    assert "not compiled" in run.console and run.checkpoint()["iter_num"] == 1
