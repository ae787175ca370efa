"""The scripts that judge recipes: what they judge on, and what they print."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import ablation
import race
import trials
from brisk.corpus import load_tokenizer, write_dataset
from brisk.errors import UserError
from brisk.tokenizer import CharTokenizer
from configurator import configure

TINY = "--n_layer=1 --n_head=1 --n_embd=8 --block_size=8 --batch_size=4 --max_iters=2 "
TINY += "--gradient_accumulation_steps=1 --warmup_iters=0 --device=cpu"


@pytest.fixture
def letters(tmp_path):
    """A data set whose val.bin is of another kind than its train.bin."""
    text = {"train": ["ab" * 1000], "val": ["c" * 500]}
    write_dataset(tmp_path / "letters", CharTokenizer("abc"), text, source="a test")
    return tmp_path / "letters"


def test_trials_see_the_last_twentieth_of_the_training_text_and_nothing_else(letters, tmp_path):
    trials.write_tuning_set(letters, tmp_path / "tuning")
    ids = np.fromfile(letters / "train.bin", dtype="<u2")
    parts = [np.fromfile(tmp_path / "tuning" / f"{s}.bin", dtype="<u2") for s in ("train", "val")]
    assert len(parts[1]) == len(ids) / 20
    assert np.array_equal(np.concatenate(parts), ids)
    assert load_tokenizer(tmp_path / "tuning").vocab_size == 3


def test_a_summary_of_losses():
    of = trials.summary([{"loss": n, "step_ms": n} for n in (1.0, 2.0, 6.0)])
    assert of == {"losses": [1, 2, 6], "mean": 3, "spread": pytest.approx(7**0.5), "step_ms": 2}
    broken = trials.summary([{"loss": float("inf"), "step_ms": 1}, {"loss": 1.0, "step_ms": 1}])
    assert broken["mean"] == float("inf")


def test_an_ablation_takes_back_one_part_at_a_time(letters, tmp_path, capsys):
    recipe = tmp_path / "recipe.py"
    recipe.write_text('optimizer = "muon"\nposition = "rotary"\nqk_norm = True\n')
    argv = [f"--config={recipe}", f"--data_dir={letters}", f"--more={TINY}", "--seeds=2"]
    ablation.main(configure(ablation.AblationConfig, [*argv, f"--json={tmp_path / 'figures'}"]))
    figures = json.loads((tmp_path / "figures").read_text())
    assert list(figures) == ["the recipe", "without muon", "without rotary", "without qk_norm"]
    assert all(len(set(of["losses"])) == 2 for of in figures.values())  # a seed each
    assert len({of["mean"] for of in figures.values()}) == 4  # and each change is one
    printed = capsys.readouterr().out.splitlines()
    assert [line[:20].strip() for line in printed[-4:]] == list(figures)
    with pytest.raises(UserError, match="name a new file"):
        ablation.main(configure(ablation.AblationConfig, [f"--json={tmp_path / 'figures'}"]))
    with pytest.raises(UserError, match="did you mean rotary"):
        ablation.main(configure(ablation.AblationConfig, [*argv, "--only=rotari"]))


def test_the_shipped_recipe_has_the_parts_that_the_ablation_takes_back():
    fast = Path(__file__).parents[1] / "config" / "train_shakespeare_char_fast.py"
    assert {"muon", "rotary"} <= set(ablation.parts_of(fast, ""))


def test_a_trial_that_fails_says_why_in_one_line(letters):
    with pytest.raises(UserError, match="n_embd=9 is not divisible"):
        trials.trial(letters, [*TINY.split(), "--n_embd=9", "--n_head=2"])


def test_a_race_needs_a_peer():
    with pytest.raises(UserError, match="no checkout of nanoGPT"):
        race.main(configure(race.RaceConfig, []))
