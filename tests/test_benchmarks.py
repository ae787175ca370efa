"""The comparisons run, and their judges judge."""

import importlib.util
import json
import math
from pathlib import Path

from brisk.corpus import write_dataset
from brisk.tokenizer import CharTokenizer
from configurator import configure

FOLDER = Path(__file__).parent.parent / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_naive_bayes_is_what_the_formula_says():
    judge = load("label_agreement").NaiveBayes({"a": ["xx", "xy"], "b": ["yy"]}, alpha=0.5)
    # features: x, y and the pairs xx, xy, yy; a has x 3, y 1, xx 1, xy 1 of 6, b has y 2, yy 1 of 3
    a = math.log(1.5 / 8.5) + math.log(3.5 / 8.5)  # of "yx"; the pair is not known
    b = math.log(2.5 / 5.5) + math.log(0.5 / 5.5)
    assert judge.label("yx") == ("a" if a > b else "b")
    assert judge.label("xx") == "a" and judge.label("yy") == "b"


def test_a_model_that_knows_two_kinds_apart_agrees(train_tiny, tmp_path, capsys):
    train = ["+abab", "+aabb", "-cdcd", "-ccdd"] * 20
    tokenizer = CharTokenizer(sorted("+-abcd"), eot=True)
    write_dataset(tmp_path / "data", tokenizer, {"train": train, "val": train}, "kinds", True)
    more = {"data_dir": tmp_path / "data", "rows": "documents", "max_iters": 100, "block_size": 8}
    train_tiny(tmp_path / "out", **more, lr_decay_iters=100, eval_interval=100)
    module = load("label_agreement")
    argv = [f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path / 'data'}", "--prompts=+,-"]
    capsys.readouterr()
    module.main(configure(module.AgreementConfig, [*argv, "--count=50", "--json"]))
    result = json.loads(capsys.readouterr().out)
    for kind in ("+", "-"):
        assert result[kind]["real"] == 1.0 and result[kind]["ratio"] > 0.9
        assert result[kind]["n_written"] == 50
