"""A field of the network is written once, in `GPTConfig`; all else knows it from there."""

import re
import shutil

import torch
from conftest import ROOT


def test_a_new_field_is_known_everywhere(script, settings, tmp_path):
    """A copy of the code with one more field: train.py and bench.py take it, help lists it, a
    checkpoint keeps it, and a resume holds on to it."""
    root = tmp_path / "code"
    root.mkdir()
    for file in ROOT.glob("*.py"):
        shutil.copy(file, root)
    (root / "brisk").symlink_to(ROOT / "brisk")
    model = (root / "model.py").read_text(encoding="utf-8")
    line = "    zero_init: bool = False"
    assert model.count(line) == 1
    field = "    width_of_dummies: PositiveInt = 3  # dummies in a block\n"
    (root / "model.py").write_text(model.replace(line, field + line), encoding="utf-8")

    def run(name, *argv):
        return script(name, *argv, root=root, cwd=tmp_path)

    for name in ("train.py", "bench.py"):
        shown = run(name, "--help").stdout
        assert re.search(r"^  --width_of_dummies=3 +dummies in a block$", shown, re.MULTILINE)
        wrong = run(name, "--width_of_dummies=0")
        assert wrong.returncode == 2 and "width_of_dummies=0" in wrong.stderr
    small = ("--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8", "--vocab_size=50")
    bench = run("bench.py", *small, "--width_of_dummies=5", "--steps=1", "--device=cpu")
    assert bench.returncode == 0, bench.stderr

    out = tmp_path / "out"
    first = run("train.py", *settings(out, max_iters=1), "--width_of_dummies=5")
    assert first.returncode == 0, first.stderr
    checkpoint = torch.load(out / "last.pt")
    assert checkpoint["model_args"]["width_of_dummies"] == 5
    resumed = ("--init_from=resume", f"--out_dir={out}", "--device=cpu", "--max_iters=2")
    again = run("train.py", *resumed, "--width_of_dummies=4")
    assert again.returncode == 0, again.stderr
    assert "width_of_dummies=5 stays" in again.stdout
    assert torch.load(out / "last.pt")["model_args"]["width_of_dummies"] == 5


def test_vocab_size(train_tiny, settings, script, tmp_path, text):
    """0 stands for the rows that the tokenizer needs; fewer than it has tokens are refused."""
    run = train_tiny(tmp_path / "out", vocab_size=64, max_iters=0)
    assert run.checkpoint()["model_args"]["vocab_size"] == 64
    few = script("train.py", *settings(tmp_path / "few", vocab_size=9))
    assert few.returncode == 2 and f"the tokenizer has {len(set(text))} tokens" in few.stderr
