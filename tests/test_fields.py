"""A model field is defined once, in `GPTConfig`; scripts and --help derive it."""

import shutil

import torch
from conftest import ROOT

# Runs in a copy of the code with an additional field, with the arguments of a tiny run.
CHECK = """
import contextlib, io, re, sys
import bench, train
from brisk.errors import UserError
from configurator import configure

def printed(call, *arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        call(*arguments)
    return out.getvalue()

for Config in (train.TrainConfig, bench.BenchConfig):
    shown = printed(configure, Config, ["--help"])
    line = "^  --width_of_dummies=3 +dummies in a block \\[int >= 1\\]$"
    assert re.search(line, shown, re.MULTILINE), shown
    try:
        configure(Config, ["--width_of_dummies=0"])
    except UserError as error:
        assert "width_of_dummies=0" in str(error)
    else:
        raise AssertionError("0 is out of bounds")
small = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=8 --vocab_size=50 --steps=1 --device=cpu"
bench.main(configure(bench.BenchConfig, [*small.split(), "--width_of_dummies=5"]))
tiny = sys.argv[1:]
train.main(configure(train.TrainConfig, [*tiny, "--max_iters=1", "--width_of_dummies=5"]))
out = next(argument for argument in tiny if argument.startswith("--out_dir="))
resumed = ["--init_from=resume", out, "--device=cpu", "--max_iters=2", "--width_of_dummies=4"]
said = printed(train.main, configure(train.TrainConfig, resumed))
assert "width_of_dummies=5 stays" in said, said
"""


def test_new_field_is_known_everywhere(script, settings, tmp_path):
    """train.py and bench.py accept it within its bounds, help lists it, and checkpoints save it."""
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
    (root / "check.py").write_text(CHECK, encoding="utf-8")
    result = script("check.py", *settings(tmp_path / "out"), root=root, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert torch.load(tmp_path / "out" / "last.pt")["model_args"]["width_of_dummies"] == 5


def test_vocab_size(train_tiny, settings, script, tmp_path, text):
    """0 means the tokenizer's vocabulary. Smaller values than that are refused."""
    run = train_tiny(tmp_path / "out", vocab_size=64, max_iters=0)
    assert run.checkpoint()["model_args"]["vocab_size"] == 64
    few = script("train.py", *settings(tmp_path / "few", vocab_size=9))
    assert few.returncode == 2 and f"the tokenizer has {len(set(text))} tokens" in few.stderr
