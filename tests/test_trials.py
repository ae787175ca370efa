"""The benchmarks that compare recipes: ablation, race, stability and magnitudes."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation
import magnitudes
import race
import stability
import trials
from brisk.data.dataset import load_tokenizer, write_dataset
from brisk.data.tokenizer import CharTokenizer
from brisk.errors import UserError
from configurator import configure
from model import GPT, GPTConfig

TINY = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=4 --max_iters=2 "
TINY += "--gradient_accumulation_steps=1 --warmup_iters=0 --device=cpu"


@pytest.fixture
def letters(tmp_path):
    """A data set whose val.bin has other characters than its train.bin."""
    text = {"train": ["ab" * 1000], "val": ["c" * 500]}
    write_dataset(tmp_path / "letters", CharTokenizer("abc"), text, source="a test")
    return tmp_path / "letters"


def test_tuning_set_excludes_val(letters, tmp_path):
    trials.write_tuning_set(letters, tmp_path / "tuning")
    ids = np.fromfile(letters / "train.bin", dtype="<u2")
    parts = [np.fromfile(tmp_path / "tuning" / f"{s}.bin", dtype="<u2") for s in ("train", "val")]
    assert len(parts[1]) == len(ids) / 20
    assert np.array_equal(np.concatenate(parts), ids)
    assert load_tokenizer(tmp_path / "tuning").vocab_size == 3


def test_summary_of_losses():
    of = trials.summary([{"loss": n, "step_ms": n} for n in (1.0, 2.0, 6.0)])
    assert of == {"losses": [1, 2, 6], "mean": 3, "spread": pytest.approx(7**0.5), "step_ms": 2}
    broken = trials.summary([{"loss": float("inf"), "step_ms": 1}, {"loss": 1.0, "step_ms": 1}])
    assert broken["mean"] == float("inf")


@pytest.fixture
def quick_starts(forked, monkeypatch):
    """Run trials in forked processes, which have PyTorch loaded."""

    def run(command, **_):
        return forked(command[1], command[2:], trials.ROOT)

    monkeypatch.setattr(trials, "subprocess", SimpleNamespace(run=run))


def test_ablation_removes_one_part_at_a_time(letters, tmp_path, capsys, quick_starts):
    recipe = tmp_path / "recipe.py"
    recipe.write_text('optimizer = "muon"\nposition = "rotary"\nqk_norm = True\n')
    argv = [f"--config={recipe}", f"--data_dir={letters}", f"--more={TINY}", "--seeds=2"]
    ablation.main(configure(ablation.AblationConfig, [*argv, f"--json={tmp_path / 'figures'}"]))
    figures = json.loads((tmp_path / "figures").read_text())
    assert list(figures) == ["the recipe", "without muon", "without rotary", "without qk_norm"]
    assert all(len(set(of["losses"])) == 2 for of in figures.values())  # seeds differ
    assert len({of["mean"] for of in figures.values()}) == 4  # changes have an effect
    printed = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in printed[-4:]] == list(figures)
    with pytest.raises(UserError, match="name a new file"):
        ablation.main(configure(ablation.AblationConfig, [f"--json={tmp_path / 'figures'}"]))
    with pytest.raises(UserError, match="did you mean rotary"):
        ablation.main(configure(ablation.AblationConfig, [*argv, "--only=rotari"]))


def test_shipped_recipe_has_the_ablated_parts():
    fast = ROOT / "config" / "train_shakespeare_char_fast.py"
    assert {"muon", "rotary"} <= set(ablation.parts_of(fast, ""))


def test_failed_trial_is_one_line(letters):
    with pytest.raises(UserError, match="n_embd=9 is not divisible"):
        trials.trial(letters, [*TINY.split(), "--n_embd=9", "--n_head=2"])


def test_race_needs_a_peer():
    with pytest.raises(UserError, match="not a checkout of nanoGPT"):
        race.main(configure(race.RaceConfig, []))


# ---------------------------------------------------------------------------- stability


def test_good_range_is_contiguous():
    losses = {1: 2.09, 2: 2.2, 4: 2.1, 8: 2.0, 16: 2.05, 32: float("inf"), 64: 2.0}
    assert stability.good_range(losses, 0.05) == (4, 16)
    assert stability.good_range(losses, 0.1) == (1, 16)
    assert stability.good_range({1: 2.0, 2: 3.0}, 0.05) == (1, 1)


def test_row_of_two_seeds():
    inf = float("inf")
    by_seed = {1: {1: 3.0, 2: 2.0, 4: 2.1, 8: inf}, 2: {1: 3.0, 2: 2.6, 4: 2.0, 8: 2.05}}
    of = stability.row(by_seed, tolerance=0.05, worst=3.0)
    assert of["best"] == 2.0 and of["at"] == pytest.approx(8**0.5)
    assert of["ranges"] == [2, 2] and of["from"] == pytest.approx(8**0.5)
    assert of["to"] == pytest.approx(32**0.5) and of["open"]  # 8 is the end of the grid
    assert (of["lost"], of["runs"]) == (3, 8)
    assert of["sensitivity"] == pytest.approx((1 + 0 + 0.1 + 1 + 1 + 0.6 + 0 + 0.05) / 8)
    assert not stability.row({1: by_seed[1]}, 0.05, 3.0)["open"]
    line = stability.table({"a recipe": of}).splitlines()[-1]
    assert line.startswith("| a recipe | 2.000 |") and "| ≥ 2 | 2, 2 |" in line


def test_unigram_loss(letters):
    # a and b are equally frequent in training; c is counted once, by the smoothing
    expected = -np.log(1 / (2 * 1001 + 1))
    assert stability.unigram_loss(letters) == pytest.approx(expected)


@pytest.fixture
def study(letters, tmp_path, monkeypatch, capsys):
    """Run a tiny study. Returns the printed lines."""
    monkeypatch.setattr(stability, "SIZE", TINY)
    monkeypatch.setattr(stability, "RECIPES", {"plain": "", "normed": "--qk_norm=True"})

    def run(*more):
        argv = [f"--data_dir={letters}", f"--results={tmp_path / 'found.json'}", "--steps=3"]
        argv += ["--rates=2", "--warmup=0", *more]
        capsys.readouterr()
        stability.main(configure(stability.StabilityConfig, argv))
        return capsys.readouterr().out.splitlines()

    return run


def test_interrupted_study_continues(study, tmp_path, monkeypatch):
    ran, train = [], stability.loss_of_run
    monkeypatch.setattr(stability, "loss_of_run", lambda *a: ran.append(a[1:]) or train(*a))
    lines = study("--only=plain", "--seeds=1")
    assert len(ran) == 2 and ran[0][1:] == (2**-10, 1) and ran[1][1:] == (2**-9, 1)
    table = (tmp_path / "found.md").read_text(encoding="utf-8").splitlines()
    assert lines[-3:] == table and table[-1].startswith("| plain | ")
    assert study("--only=plain", "--seeds=1")[-3:] == table and len(ran) == 2
    assert study("--table", "--seeds=2")[-3:] == table and len(ran) == 2
    study("--seeds=2")
    assert len(ran) == 8 and len(set(ran)) == 8
    losses = [record["loss"] for record in json.loads((tmp_path / "found.json").read_text())]
    assert len(set(losses)) == 8 and all(0 < loss < 5 for loss in losses)


def test_non_finite_run_is_lost(letters):
    keys = f"{TINY} --lr_decay_iters=2 --norm=rms"
    assert stability.loss_of_run(letters, keys, 1e30, 1) == float("inf")
    assert 0 < stability.loss_of_run(letters, keys, 1e-3, 1) < 20


def test_unknown_recipe_is_refused(study):
    with pytest.raises(UserError, match="did you mean normed"):
        study("--only=norned")


def test_recipes_are_valid_for_train_py(letters):
    for keys in stability.RECIPES.values():
        argv = stability.keys_of(stability.StabilityConfig(), keys).split()
        root = ROOT
        configure(stability.train.TrainConfig, [str(root / a) if a[0] != "-" else a for a in argv])


# --------------------------------------------------------------------------- magnitudes


@pytest.mark.parametrize("changes", [{}, {"position": "rotary", "qk_norm": True, "n_kv_head": 1}])
def test_magnitudes(changes):
    torch.manual_seed(0)
    sizes = {"block_size": 8, "vocab_size": 11, "n_layer": 2, "n_head": 2, "n_embd": 16}
    model = GPT(GPTConfig(**sizes, **changes)).eval()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(100)
        model.transformer.h[0].attn.c_attn.weight.mul_(20)
    idx = torch.randint(11, (3, 8))
    found = magnitudes.magnitudes(model, idx)
    assert found["logits"] == model.predict(idx).abs().max().item()
    seen = []
    block = model.transformer.h[1]
    block.mlp.c_fc.register_forward_hook(lambda *a: seen.append(a[2]))
    block.register_forward_hook(lambda *a: seen.append(a[2]))
    model.predict(idx)
    assert found["linear"] == seen[0].abs().max() and found["residual"] >= seen[1].abs().max()
    if not changes:  # recompute for the first block, which has the larger weights
        x = model.transformer.wte(idx) + model.transformer.wpe.weight
        q, k, _ = model.transformer.h[0].attn.c_attn(model.transformer.h[0].ln_1(x)).split(16, 2)
        heads = [q[..., h] @ k[..., h].mT / 8**0.5 for h in (slice(0, 8), slice(8, 16))]
        assert found["attention"] == pytest.approx(max(s.tril().abs().max().item() for s in heads))
    else:  # after the norms, a logit is at most √head_dim
        assert 1 < found["attention"] <= 8**0.5 + 1e-4


def test_magnitudes_of_each_checkpoint(letters, tmp_path, capsys):
    with pytest.raises(UserError, match="--keep_last"):
        magnitudes.main(configure(magnitudes.MagnitudesConfig, [f"--out_dir={tmp_path}"]))
    argv = [*TINY.split(), f"--data_dir={letters}", f"--out_dir={tmp_path}", "--eval_interval=1"]
    train = stability.train
    train.main(configure(train.TrainConfig, [*argv, "--eval_iters=1", "--keep_last=9"]))
    capsys.readouterr()
    argv = [f"--out_dir={tmp_path}", "--windows=2"]
    magnitudes.main(configure(magnitudes.MagnitudesConfig, argv))
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["step", *magnitudes.COLUMNS]
    assert [line.split()[0] for line in lines] == ["1", "2", "3"]
    assert all(0 < float(n) < 10 for line in lines for n in line.split()[1:])
