"""A resumed run equals one that was never stopped, for any settings."""

import math
import os
import re
import shutil

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import train
from brisk.checkpoint import save_checkpoint
from brisk.data.dataset import write_dataset
from brisk.data.loader import TokenFile
from brisk.data.tokenizer import CharTokenizer
from brisk.errors import UserError
from brisk.training.signals import StopRequest
from configurator import configure

EPOCHS = {"max_iters": None, "lr_decay_iters": None}  # leave the length to max_epochs


def assert_same_run(run, whole):
    """The same losses and learning rates at every step, and the same state at the end."""
    for key in ("loss", "lr", "grad_norm", "tokens"):
        assert run.series(key) == whole.series(key), key
    a, b = run.checkpoint(), whole.checkpoint()
    assert (a["iter_num"], a["position"]) == (b["iter_num"], b["position"])
    assert a["best_val_loss"] == b["best_val_loss"]
    for name, weight in b["model"].items():
        assert torch.equal(weight, a["model"][name]), name
    moments = [checkpoint["optimizer"]["state"] for checkpoint in (a, b)]
    for index, state in moments[1].items():
        assert all(torch.equal(value, moments[0][index][key]) for key, value in state.items())


def best(run):
    return run.checkpoint("ckpt.pt")["iter_num"]


def windows(char_data, block_size=16):
    return TokenFile(char_data / "train.bin", block_size, 100).rows


# ----------------------------------------------------------------------------- length and schedule


@pytest.mark.parametrize("decay", [None, 100])
def test_epochs_resume_to_the_bit(train_tiny, train_until, resume_run, tmp_path, decay):
    changes = {**EPOCHS, "max_epochs": 0.7, "lr_decay_iters": decay, "dropout": 0.1}
    whole = train_tiny(tmp_path / "whole", **changes)
    train_until(tmp_path / "parts", 5, **changes)
    assert_same_run(resume_run(tmp_path / "parts"), whole)
    assert len(whole.series("lr")) > 10  # it continued after the stop


def test_settings_are_saved_as_given(train_tiny, tmp_path):
    run = train_tiny(tmp_path / "out", **{**EPOCHS, "max_epochs": 0.3})
    config = run.checkpoint()["config"]
    assert (config["max_iters"], config["lr_decay_iters"]) == (600000, 600000)  # the defaults
    assert run.checkpoint()["resolved"]["last_step"] == run.checkpoint()["iter_num"] - 1


def test_note_on_a_learning_rate_of_zero(train_tiny, resume, tmp_path):
    """More steps alone do not extend the schedule."""
    train_tiny(tmp_path / "out", max_iters=2, lr_decay_iters=2, min_lr=0.0)
    note = "the learning rate is 0 after step 2; --lr_decay_iters=4"
    assert note in resume(tmp_path / "out", max_iters=4).console
    assert (
        "learning rate is 0" not in resume(tmp_path / "out", max_iters=6, lr_decay_iters=6).console
    )


def test_lr_decay_iters_given_at_resume(train_until, resume_run, tmp_path):
    train_until(tmp_path / "out", 5, **{**EPOCHS, "max_epochs": 0.7})
    run = resume_run(tmp_path / "out", lr_decay_iters=100)
    assert run.series("lr")[10] > 0.0098  # near the maximum of 0.01: 100 steps are far
    assert run.checkpoint()["config"]["lr_decay_iters"] == 100
    again = resume_run(tmp_path / "out", max_epochs=0.9)
    assert again.series("lr")[max(again.series("lr"))] > 0.0095  # it stays


@pytest.mark.parametrize(
    "changes", [{"batch_size": 2}, {"gradient_accumulation_steps": 3}, {"block_size": 8}], ids=str
)
def test_epochs_are_counted_by_position(train_until, resume_run, char_data, tmp_path, changes):
    """A resume with another batch or window size ends after the same number of epochs."""
    train_until(tmp_path / "out", 9, **{**EPOCHS, "max_epochs": 1.5})
    run = resume_run(tmp_path / "out", **changes)
    size = run.checkpoint()["config"]["batch_size"] * changes.get("gradient_accumulation_steps", 1)
    rows = windows(char_data, changes.get("block_size", 16))
    assert run.checkpoint()["position"] == pytest.approx(1.5 * rows, abs=size / 2 + 1)
    steps = max(run.series("lr")) + 1
    assert run.series("lr")[steps - 1] == pytest.approx(1e-3, rel=0.2)  # min_lr at the new end
    again = resume_run(tmp_path / "out")
    assert "at its end" in again.console


def test_new_block_size_converts_the_position(train_until, resume_run, tmp_path):
    train_until(tmp_path / "out", 4)
    before = torch.load(tmp_path / "out" / "last.pt")["position"]
    run = resume_run(tmp_path / "out", block_size=8, max_iters=4)
    assert run.checkpoint()["position"] == before * 16 // 8 + 4


def test_max_iters_given_later_wins(train_tiny, main, settings, tmp_path):
    argv = settings(tmp_path / "out", **EPOCHS)
    (tmp_path / "epochs.py").write_text("max_epochs = 2.0\n")
    run = main([*argv, str(tmp_path / "epochs.py"), "--max_iters=3"])
    assert list(run.series("loss")) == [0, 1, 2, 3]
    assert "max_iters=3" in run.console  # the key in effect is printed
    run = main([*argv, "--max_iters=3", str(tmp_path / "epochs.py")])
    assert len(run.series("loss")) > 4


def test_later_length_key_wins_over_resumes(train_until, resume_run, char_data, tmp_path):
    out = tmp_path / "out"
    train_until(out, 3, **{**EPOCHS, "max_epochs": 2.0})
    assert resume_run(out, max_iters=5).checkpoint()["iter_num"] == 6
    assert "at its end" in resume_run(out).console  # max_iters still is the later one
    run = resume_run(out, max_epochs=0.5)
    assert run.checkpoint()["position"] == pytest.approx(0.5 * windows(char_data), abs=2)


def test_two_length_keys_in_one_file(main, settings, tmp_path):
    (tmp_path / "both.py").write_text("max_iters = 9\nmax_epochs = 2.0\n")
    with pytest.raises(UserError, match=r"both\.py sets max_iters and max_epochs"):
        main([*settings(tmp_path / "out"), str(tmp_path / "both.py")])


# ----------------------------------------------------------------------------- evaluations


def test_evaluation_at_resume_changes_nothing(
    train_tiny, train_until, resume_run, tmp_path, monkeypatch
):
    """A run is stopped between two evaluations and resumed. The next evaluation is compared with
    the best of the earlier ones, not with the one at the resume."""
    changes = {"always_save_checkpoint": False, "eval_interval": 5, "max_iters": 14}
    whole = train_tiny(tmp_path / "whole", **changes)
    losses = whole.series("val_loss")
    assert losses[5] > losses[10]  # the next evaluation after the stop is the best so far
    for stop in (6, 9):
        out = tmp_path / f"stop{stop}"
        train_until(out, stop, **changes)
        before = torch.load(out / "last.pt")["best_val_loss"]
        assert before == losses[5]
        estimate, evaluations = train.estimate_loss, []

        def low_at_first(*arguments, estimate=estimate, evaluations=evaluations):
            evaluations.append(estimate(*arguments))
            return 0.1 if len(evaluations) <= 2 else evaluations[-1]  # two splits

        with monkeypatch.context() as patch:
            patch.setattr(train, "estimate_loss", low_at_first)
            train_until(out, 11, given=resume_argv(out))
        assert torch.load(out / "ckpt.pt")["iter_num"] == 10
        run = resume_run(out)
        assert_same_run(run, whole)
        assert best(run) == best(whole)


def resume_argv(out, *more):
    return ["--init_from=resume", f"--out_dir={out}", "--device=cpu", *more]


def test_interrupted_evaluation_is_repeated(
    train_tiny, settings, resume_run, tmp_path, monkeypatch
):
    """A stop during an evaluation saves without it. The resume evaluates, and saves the best."""
    changes = {"always_save_checkpoint": False, "max_iters": 6}
    stop, estimate = StopRequest(prints=False), train.estimate_loss

    def stopped_at_the_second(model, *rest):
        calls.append(1)
        if len(calls) == 3:  # of two splits each
            stop.number = 15
        return estimate(model, *rest)

    calls = []
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "estimate_loss", stopped_at_the_second)
        argv = settings(tmp_path / "out", **changes)
        train.main(configure(train.TrainConfig, argv), stop)
    assert not (tmp_path / "out" / "ckpt.pt").exists()
    whole = train_tiny(tmp_path / "whole", **changes)
    assert whole.series("val_loss")[4] < whole.series("val_loss")[0]
    monkeypatch.setattr(train, "get_lr", lambda *_: pytest.fail("no step is needed"))
    with pytest.raises(pytest.fail.Exception):
        resume_run(tmp_path / "out")
    assert torch.load(tmp_path / "out" / "ckpt.pt")["iter_num"] == 4


# ----------------------------------------------------------------------------- precision, compiling


def test_compile_stays_as_resolved(train_until, resume_run, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(train, "compile_model", lambda model, *_: compiled.append(model))
    monkeypatch.setattr("brisk.device.why_not_compile", lambda device: None)
    train_until(tmp_path / "out", 3, compile=True, max_iters=9)
    assert len(compiled) == 1
    resume_run(tmp_path / "out", max_iters=4)
    assert len(compiled) == 2
    resume_run(tmp_path / "out", max_iters=5, compile=False)
    resume_run(tmp_path / "out", max_iters=6)
    assert len(compiled) == 2


def test_dtype_stays_as_resolved(train_until, resume_run, tmp_path, monkeypatch):
    """A run that chose bfloat16 by `auto` keeps it on a CPU without native bfloat16."""
    monkeypatch.setattr("brisk.device.has_native_bfloat16", lambda: True)
    large = {"dtype": "auto", "block_size": 32, "n_embd": 256, "batch_size": 32, "eval_iters": 1}
    train_until(tmp_path / "out", 1, max_iters=1, **large)
    monkeypatch.setattr("brisk.device.has_native_bfloat16", lambda: False)
    run = resume_run(tmp_path / "out")
    assert re.search(r"^device: .*, bfloat16,", run.console, re.MULTILINE)
    assert run.checkpoint()["config"]["dtype"] == "auto"
    assert run.checkpoint()["resolved"]["dtype"] == "bfloat16"


def test_other_device_resolves_dtype_again(train_until, resume_run, tmp_path):
    train_until(tmp_path / "out", 2, dtype="auto", compile="auto")
    checkpoint = torch.load(tmp_path / "out" / "last.pt")
    checkpoint["resolved"] |= {"device": "cuda", "dtype": "bfloat16", "compile": True}
    save_checkpoint(checkpoint, tmp_path / "out" / "last.pt")
    run = resume_run(tmp_path / "out")
    assert "note: the checkpoint was trained on cuda" in run.console
    assert run.checkpoint()["resolved"]["dtype"] == "float32"
    assert run.checkpoint()["resolved"]["device"] == "cpu"


def test_parallel_is_kept_in_one_process(train_until, resume_run, tmp_path):
    """A dry run for 8 ranks plans for the FSDP that the run was started with."""

    def memory(**changes):
        said = resume_run(
            tmp_path / "out", dry_run=True, dry_run_world_size=8, **sizes, **changes
        ).console
        return re.search(
            r"^device: 8 processes \((\w+)\).* about (.*) of memory", said, re.M
        ).groups()

    large = {"n_embd": 256, "n_layer": 8}
    sizes = {"gradient_accumulation_steps": 8}
    train_until(tmp_path / "out", 1, parallel="fsdp", max_iters=1, **large)
    assert memory() == memory(parallel="fsdp") != memory(parallel="ddp")


# ----------------------------------------------------------------------------- other data


def test_other_data_starts_at_its_beginning(train_until, resume_run, char_data, text, tmp_path):
    """Another text resets the position to 0. The same text at another path does not."""
    moved = shutil.copytree(char_data, tmp_path / "moved")
    train_until(tmp_path / "a", 4)
    assert resume_run(tmp_path / "a", data_dir=moved, max_iters=4).checkpoint()["position"] == 5 * 4
    tokenizer = CharTokenizer(sorted(set(text)))
    splits = {"train": [text[300:]], "val": [text[:300]]}
    write_dataset(tmp_path / "other", tokenizer, splits, "other")
    train_until(tmp_path / "b", 4)
    run = resume_run(tmp_path / "b", data_dir=tmp_path / "other", max_iters=4)
    assert run.checkpoint()["position"] == 4 and run.checkpoint()["iter_num"] == 5
    assert "note: the training data has changed" in run.console


# ----------------------------------------------------------------------------- older checkpoints


def as_nanogpt_saves(checkpoint):
    keys = ("model", "optimizer", "model_args", "iter_num", "best_val_loss", "config")
    return {key: checkpoint[key] for key in keys}


def test_position_of_a_nanogpt_checkpoint(train_until, resume_run, tmp_path):
    """The number of steps times the batch size of the training, not the current one."""
    out = tmp_path / "out"
    train_until(out, 4, batch_size=3, gradient_accumulation_steps=2)
    save_checkpoint(as_nanogpt_saves(torch.load(out / "last.pt")), out / "last.pt")
    run = resume_run(out, batch_size=5, max_iters=4)
    assert run.checkpoint()["position"] == 4 * 3 * 2 + 5 * 2


def test_checkpoint_of_version_0_1(train_tiny, train_until, resume_run, tmp_path):
    """It saved derived values instead of the settings; they are derived again."""
    out, changes = tmp_path / "out", {**EPOCHS, "max_epochs": 0.7}
    train_until(out, 5, **changes)
    checkpoint = torch.load(out / "last.pt")
    last = checkpoint["resolved"]["last_step"]
    checkpoint["config"] |= {"max_iters": last, "lr_decay_iters": last}
    checkpoint["precision"] = ("cpu", "bfloat16")
    for key in ("given", "resolved", "data"):
        del checkpoint[key]
    save_checkpoint(checkpoint, out / "last.pt")
    shutil.copytree(out, tmp_path / "longer")
    run = resume_run(out)
    assert max(run.series("lr")) == last and "bfloat16" in run.console
    assert run.checkpoint()["config"]["max_iters"] == 600000
    longer = resume_run(tmp_path / "longer", max_epochs=1.4)
    assert max(longer.series("lr")) == pytest.approx(2 * last, abs=2)
    assert longer.series("lr")[max(longer.series("lr"))] == pytest.approx(1e-3)


# ----------------------------------------------------------------------------- any of them

LENGTHS = st.one_of(
    st.fixed_dictionaries({"max_iters": st.integers(9, 12)}),
    st.fixed_dictionaries({"max_epochs": st.floats(0.5, 0.8)}),
)
SETTINGS = st.fixed_dictionaries(
    {
        "lr_decay_iters": st.none() | st.integers(2, 30),
        "batch_size": st.integers(3, 5),
        "gradient_accumulation_steps": st.integers(1, 2),
        "block_size": st.sampled_from([8, 16]),
        "dtype": st.sampled_from(["auto", "float32", "bfloat16"]),
        "schedule": st.sampled_from(["cosine", "wsd"]),
        "optimizer": st.sampled_from(["adamw", "muon"]),
        "eval_interval": st.integers(2, 5),
        "always_save_checkpoint": st.booleans(),
        "rows": st.sampled_from(["windows", "documents"]),
        "spike_factor": st.sampled_from([0.0, 50.0]),
        "dropout": st.sampled_from([0.0, 0.2]),
    }
)


@settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # an example takes seconds to shrink
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(length=LENGTHS, changes=SETTINGS, data=st.data())
def test_resume_is_bit_exact_with_any_settings(
    train_tiny, train_until, resume_run, lines_data, tmp_path_factory, length, changes, data
):
    folder = tmp_path_factory.mktemp("any")
    changes = {**EPOCHS, "data_dir": lines_data, "eval_iters": 1, **length, **changes}
    if "max_iters" in length and changes["lr_decay_iters"] is None:
        changes["lr_decay_iters"] = 9
    whole = train_tiny(folder / "whole", **changes)
    steps = len(whole.series("lr"))
    stop = data.draw(st.integers(1, steps - 1), "stop")
    train_until(folder / "parts", stop, **changes)
    run = resume_run(folder / "parts")
    assert_same_run(run, whole)
    assert best(run) == best(whole)


AT_A_RESUME = st.fixed_dictionaries(
    {},
    optional={
        "batch_size": st.integers(2, 6),
        "gradient_accumulation_steps": st.integers(1, 3),
        "block_size": st.sampled_from([8, 16]),
        "lr_decay_iters": st.integers(2, 30),
        "learning_rate": st.sampled_from([1e-2, 2e-3]),
        "dtype": st.sampled_from(["float32", "bfloat16"]),
        "dropout": st.sampled_from([0.0, 0.3]),
    },
)


@settings(
    max_examples=8,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(length=LENGTHS, changes=AT_A_RESUME, longer=st.none() | LENGTHS, data=st.data())
def test_resume_with_other_settings(
    train_until, resume_run, char_data, tmp_path_factory, length, changes, longer, data
):
    """Given values stay, and derived ones follow: length, decay and position, by the formulas."""
    out = tmp_path_factory.mktemp("other") / "out"
    before = {"batch_size": 4, "gradient_accumulation_steps": 1, "block_size": 16}
    decay = data.draw(st.none() | st.integers(2, 30), "lr_decay_iters")
    stop = data.draw(st.integers(1, 7), "stop")  # the shortest run has 8 steps
    train_until(out, stop, **{**EPOCHS, **before, **length, "lr_decay_iters": decay})
    run = resume_run(out, **changes, **(longer or {}))
    checkpoint, now = run.checkpoint(), {**before, **changes}
    batch = now["batch_size"] * now["gradient_accumulation_steps"]
    first = stop * 4 * 16 // now["block_size"]
    if "max_iters" in (longer or length):
        last = (longer or length)["max_iters"]
    else:
        wanted = (longer or length)["max_epochs"] * windows(char_data, now["block_size"])
        last = round(stop + (wanted - first) / batch) - 1
        same = batch == 4 and now["block_size"] == 16
        last = round(wanted / 4) - 1 if same else last
    if last < stop:
        assert "at its end" in run.console and checkpoint["iter_num"] == stop
        return
    assert checkpoint["iter_num"] == last + 1
    assert checkpoint["position"] == first + (last + 1 - stop) * batch
    decay = changes.get("lr_decay_iters", decay)
    if decay is None:
        decay = last if "max_epochs" in {**length, **(longer or {})} else 600000
    highest = changes.get("learning_rate", 1e-2)
    for step, lr in run.series("lr").items():
        if 2 <= step < decay and step >= stop:  # past the warm-up
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / (decay - 2)))
            assert lr == pytest.approx(1e-3 + cosine * (highest - 1e-3))
    saved = {key: checkpoint["config"][key] for key in changes}
    assert saved == changes
    assert run.checkpoint()["resolved"]["dtype"] == changes.get("dtype", "float32")


def test_resume_with_renamed_keys(train_until, resume_run, tmp_path):
    train_until(tmp_path / "out", 4, keep_last=2, schedule="wsd", decay_frac=0.5)
    path = tmp_path / "out" / "last.pt"
    checkpoint = torch.load(path)
    old = {"keep_last": "keep_checkpoints", "decay_frac": "decay_share"}
    checkpoint["config"] = {old.get(k, k): value for k, value in checkpoint["config"].items()}
    checkpoint["given"] = [old.get(k, k) for k in checkpoint["given"]]
    save_checkpoint(checkpoint, path, [tmp_path / "out" / "ckpt.pt"])
    config = resume_run(tmp_path / "out").checkpoint()["config"]
    assert (config["keep_last"], config["decay_frac"]) == (2, 0.5)


def test_vocab_size_given_at_resume_is_noted(train_until, resume_run, tmp_path):
    train_until(tmp_path / "out", 4)
    assert re.search(
        r"the checkpoint's vocab_size=\d+ stays",
        resume_run(tmp_path / "out", vocab_size=999).console,
    )


@pytest.mark.skipif(os.name != "posix", reason="paths are bytes on POSIX only")
def test_resume_from_a_non_utf8_folder(train_until, resume_run, tmp_path):
    out = tmp_path / os.fsdecode(b"out-\xff")
    try:
        out.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    train_until(out, 4)
    assert resume_run(out).checkpoint()["iter_num"] == 8
