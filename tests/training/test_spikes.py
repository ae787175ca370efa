"""Non-finite losses and gradient spikes are detected and handled according to `on_spike`."""

import math

import pytest
import torch

import train
from brisk.checkpoint import load_checkpoint
from brisk.errors import RunError
from brisk.training.optim import step_if_finite
from brisk.training.spikes import HISTORY, MIN_HISTORY, PATIENCE, SpikeWatch, median
from model import GPT, GPTConfig


@pytest.fixture
def spoil(monkeypatch):
    """`spoil({5: nan})`: set the gradient at step 5 to NaN, once or `always`; other numbers
    multiply it. `spoil.seen` lists the steps at which it was applied."""
    rate, clip = train.get_lr, torch.nn.utils.clip_grad_norm_

    def spoil(factors, always=True):
        spoil.seen, now = [], {}

        def note(step, *rest):
            now["step"] = step
            return rate(step, *rest)

        def clip_spoiled(parameters, limit):
            parameters = list(parameters)
            step = now["step"]
            if step in factors and (always or step not in spoil.seen):
                spoil.seen.append(step)
                for p in parameters[:1] if math.isnan(factors[step]) else parameters:
                    p.grad.mul_(factors[step])
            return clip(parameters, limit)

        monkeypatch.setattr(train, "get_lr", note)
        monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", clip_spoiled)

    return spoil


NAN = float("nan")


# ----------------------------------------------------------------------------- stop


@pytest.mark.parametrize("log_interval", [1, 5])
def test_stop_keeps_the_good_checkpoint(spoil, train_tiny, tmp_path, capsys, log_interval):
    spoil({5: NAN})
    with pytest.raises(RunError) as caught:
        train_tiny(tmp_path / "out", log_interval=log_interval)
    assert re_all(str(caught.value), "step 5", "nan", "position 20 ", "last.pt is the last good")
    for name in ("last.pt", "ckpt.pt"):
        assert load_checkpoint(tmp_path / "out" / name)["iter_num"] == 4
    assert "iter 6:" not in capsys.readouterr().out


def re_all(text, *parts):
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in {text}"
    return True


def test_stop_is_one_line_and_status_1(settings, script, tmp_path):
    """From the command line, with a learning rate at which the loss soon becomes NaN."""
    wild = {"learning_rate": 1e38, "min_lr": 1e38, "warmup_iters": 0, "grad_clip": 0}
    result = script("train.py", *settings(tmp_path / "out", **wild))
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert re_all(result.stderr, "error: step ", "nothing is saved yet", "--learning_rate")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        ".lock",
        "loss.png",
        "metrics.jsonl",
    ]


def test_stopped_run_resumes_without_the_step(spoil, train_tiny, resume, tmp_path):
    spoil({5: NAN})
    with pytest.raises(RunError):
        train_tiny(tmp_path / "out")
    again = resume(tmp_path / "out", on_spike="skip")
    whole = train_tiny(tmp_path / "whole", on_spike="skip")
    assert_same_weights(whole, again)


def assert_same_weights(run, other):
    a, b = run.checkpoint(), other.checkpoint()
    for name, weight in a["model"].items():
        assert torch.isfinite(weight).all() and torch.equal(weight, b["model"][name]), name
    for key, moments in a["optimizer"]["state"].items():
        for name, tensor in moments.items():
            assert torch.equal(tensor, b["optimizer"]["state"][key][name]), name


# ----------------------------------------------------------------------------- skip


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("factor", [NAN, float("inf")])
def test_skipped_step_changes_no_state(spoil, train_tiny, tmp_path, optimizer, factor):
    """The checkpoints before and after the step have the same weights, moments and counts."""
    spoil({4: factor})
    changes = {"optimizer": optimizer, "eval_interval": 1, "keep_last": 9}
    run = train_tiny(tmp_path / "out", on_spike="skip", **changes)
    before, after, next_one = (run.checkpoint(f"step-{step:06d}.pt") for step in (4, 5, 6))
    for key in ("model", "optimizer"):
        assert flat(before[key]).keys() == flat(after[key]).keys()
        for name, tensor in flat(before[key]).items():
            assert torch.equal(tensor, flat(after[key])[name]), name
    moved = [not torch.equal(w, next_one["model"][name]) for name, w in after["model"].items()]
    assert all(moved) and after["position"] == before["position"] + 4
    assert run.console.count(", skipped") == 1
    assert re_all(run.console, "step 4: the gradient norm is ", "position 16 ")


def flat(tree, path=""):
    """{path: tensor} of a tree of dicts."""
    if isinstance(tree, torch.Tensor):
        return {path: tree}
    parts = tree.items() if isinstance(tree, dict) else ()
    return {k: v for key, part in parts for k, v in flat(part, f"{path}/{key}").items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_modes_agree_without_spikes(train_tiny, tmp_path, optimizer):
    runs = [
        train_tiny(tmp_path / mode, on_spike=mode, optimizer=optimizer, spike_factor=factor)
        for mode, factor in (("ignore", 0), ("stop", 0), ("skip", 0), ("skip", 1e6), ("rewind", 9))
    ]
    for run in runs[1:]:
        assert_same_weights(runs[0], run)


def test_too_many_skipped_steps_end_the_run(spoil, train_tiny, tmp_path):
    spoil(dict.fromkeys(range(10, 100), NAN))
    with pytest.raises(RunError, match=f"step {9 + PATIENCE}: "):
        train_tiny(tmp_path / "out", on_spike="skip", max_iters=99, eval_interval=5)
    assert torch.isfinite(
        load_checkpoint(tmp_path / "out" / "last.pt")["model"]["lm_head.weight"]
    ).all()


def test_float16_scaler_handles_overflow():
    watch = SpikeWatch("cpu", "skip", scaled=True)
    assert check(watch, 0, 1.0, math.inf) == 1  # to be skipped, but not a spike
    assert check(watch, 1, NAN, 1.0) == 1
    assert [spike.step for spike in watch.poll()] == [1]


def test_skip_without_fused_kernel():
    model = GPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.clone() for p in model.parameters()]
    step_if_finite(torch.tensor(1.0), optimizer)
    assert all(map(torch.equal, before, model.parameters()))
    step_if_finite(torch.tensor(0.0), optimizer)
    assert not any(map(torch.equal, before, model.parameters()))


# ----------------------------------------------------------------------------- rewind


def test_rewind_continues_with_new_batches(spoil, train_tiny, tmp_path):
    """From the checkpoint at step 4 it trains on the batches after that of step 6."""
    spoil({6: NAN}, always=False)
    run = train_tiny(tmp_path / "out", on_spike="rewind", max_iters=11)
    assert spoil_count(run) == 1
    end = run.checkpoint()
    assert end["iter_num"] == 12 and end["position"] == 4 * (12 + 3)  # steps 4 to 6 twice
    assert list(run.series("loss")) == list(range(12))  # each once: the rewound lines were removed
    assert run.series("tokens")[4] == 16 * 4 * (4 + 3 + 1)
    assert all(map(math.isfinite, run.series("loss").values()))

    # by hand: the checkpoint of step 4 with a later position
    monkey = train_tiny(tmp_path / "hand", max_iters=3)
    checkpoint = monkey.checkpoint()
    checkpoint["position"] = 4 * 7
    hand = tmp_path / "hand"
    for path in hand.glob("*.pt"):
        path.unlink()
    torch.save(checkpoint, hand / "last.pt")
    by_hand = train_tiny(hand, init_from="resume", max_iters=11)
    assert_same_weights(run, by_hand)


def spoil_count(run):
    return run.console.count("rewinding to ")


def test_rewind_without_a_checkpoint_stops(spoil, train_tiny, tmp_path):
    spoil({2: NAN})
    with pytest.raises(RunError, match="nothing is saved yet"):
        train_tiny(tmp_path / "out", on_spike="rewind")


def test_rewinds_are_limited(spoil, train_tiny, tmp_path, capsys):
    spoil({6: NAN})
    with pytest.raises(RunError, match="step 6"):
        train_tiny(tmp_path / "out", on_spike="rewind")
    assert capsys.readouterr().out.count("rewinding to ") == PATIENCE
    assert load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"] == 4


# ----------------------------------------------------------------------------- ignore


def test_ignore_keeps_the_good_checkpoint(spoil, train_tiny, tmp_path, capsys):
    """As in nanoGPT, except that a non-finite model never replaces a finite one."""
    spoil({5: NAN})
    with pytest.raises(RunError, match="step 8 is not saved"):
        train_tiny(tmp_path / "out", on_spike="ignore")
    assert "iter 7: loss nan" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["iter_num"] == 4


@pytest.mark.parametrize("on_spike", ["stop", "ignore"])
def test_nonfinite_weight_is_not_saved(train_tiny, tmp_path, monkeypatch, on_spike):
    """A weight becomes NaN between a step and its save, so no training loss shows it."""
    estimate, calls = train.estimate_loss, []

    def poison(model, *rest):
        calls.append(1)
        if len(calls) == 5:  # two splits at steps 0 and 4, and then at 8, the end
            with torch.no_grad():
                model.transformer.wpe.weight[0, 0] = NAN
        return estimate(model, *rest)

    monkeypatch.setattr(train, "estimate_loss", poison)
    with pytest.raises(RunError, match="step 8 is not saved"):
        train_tiny(tmp_path / "out", on_spike=on_spike)
    assert load_checkpoint(tmp_path / "out" / "last.pt")["iter_num"] == 4


# ----------------------------------------------------------------------------- explosions


def norms(watch, values, start=0):
    """The results of `check` for steps with a loss of 1 and these norms."""
    return [check(watch, step, 1.0, norm) for step, norm in enumerate(values, start)]


def check(watch, step, loss, norm):
    """Check and record a step."""
    loss, norm = torch.tensor(float(loss)), torch.tensor(float(norm))
    limit, is_spike = watch.check(loss, norm)
    watch.record(step, 4 * step, loss, norm, limit)
    return is_spike.item()


def test_norm_above_the_median_is_a_spike():
    watch = SpikeWatch("cpu", "skip", factor=4.0)
    usual = [1 + 0.5 * math.sin(k) for k in range(HISTORY)]
    assert not any(norms(watch, usual))
    middle = torch.tensor(usual).median().item()
    assert norms(watch, [3.9 * middle, 4.1 * middle], HISTORY) == [0, 1]
    (spike,) = watch.poll()
    assert (spike.step, spike.position) == (HISTORY + 1, 4 * (HISTORY + 1))
    assert re_all(str(spike), "is 4.1, 4.06 times the median")


@pytest.mark.parametrize("count", [1, 2, 31, 32, 127, 128])
def test_median_matches_nanmedian(count):
    """PyTorch's nanmedian would synchronize with the GPU in every step."""
    found = torch.full((HISTORY,), math.nan)
    found[-count:] = torch.randn(count, generator=torch.Generator().manual_seed(count)).abs()
    assert median(found).equal(found.nanmedian())


def test_norms_need_a_minimal_history():
    watch = SpikeWatch("cpu", "skip", factor=4.0)
    assert norms(watch, [1.0] * (MIN_HISTORY - 1) + [100, 100]) == [0] * MIN_HISTORY + [1]


def test_median_follows_the_norms():
    """A lasting higher level is not a spike forever, and a single NaN does not move the median."""
    watch = SpikeWatch("cpu", "skip", factor=4.0)
    norms(watch, [1.0] * HISTORY)
    verdicts = norms(watch, [10.0] * HISTORY)
    assert verdicts[0] == 1 and verdicts[-1] == 0 and sum(verdicts) <= HISTORY // 2 + 1
    assert norms(watch, [math.nan, 10.0, math.inf, 10.0]) == [1, 0, 1, 0]
    assert norms(SpikeWatch("cpu", "skip"), [1.0] * HISTORY + [1e30]) == [0] * (HISTORY + 1)


def test_skipped_step_is_also_skipped_on_resume(spoil, train_tiny, resume, tmp_path):
    """The earlier norms are in the checkpoint, so the resumed run detects the same spikes."""
    spoil({50: 1000.0})
    changes = {"on_spike": "skip", "spike_factor": 20, "max_iters": 60, "eval_interval": 20}
    whole = train_tiny(tmp_path / "whole", **changes)
    assert whole.console.count(", skipped") == 1 and "step 50: " in whole.console
    train_tiny(tmp_path / "parts", **{**changes, "max_iters": 45})
    again = resume(tmp_path / "parts", max_iters=60)
    assert again.console.count(", skipped") == 1
    assert_same_weights(whole, again)
