"""Compatibility with nanoGPT in both directions: checkpoints, data files and config files.

Set NANOGPT to a checkout of https://github.com/karpathy/nanoGPT. Its scripts run unmodified in a
temporary copy.
"""

import importlib.util
import math
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from brisk.checkpoint import load_checkpoint
from brisk.data.dataset import load_tokenizer, read_meta
from brisk.training.optim import load_optimizer
from configurator import as_dict, configure
from model import GPT, GPTConfig
from train import TrainConfig

CHECKOUT = Path(os.environ.get("NANOGPT") or "nowhere")
pytestmark = pytest.mark.skipif(
    not (CHECKOUT / "train.py").exists(), reason="NANOGPT names no checkout of nanoGPT"
)

DATASET = "shakespeare_char"
ON_CPU = ["--device=cpu", "--dtype=float32", "--compile=False"]


@pytest.fixture(scope="module")
def root(tmp_path_factory, text, script):
    """A copy of nanoGPT with a data set that its prepare.py made from our text."""
    root = tmp_path_factory.mktemp("nanogpt") / "nanoGPT"
    shutil.copytree(CHECKOUT, root, ignore=shutil.ignore_patterns(".git", "assets", "out*"))
    for name in ("train.bin", "val.bin", "meta.pkl"):
        (root / "data" / DATASET / name).unlink(missing_ok=True)
    (root / "data" / DATASET / "input.txt").write_text(text, encoding="utf-8")
    succeed(script(f"data/{DATASET}/prepare.py", root=root, cwd=root))
    return root


def succeed(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


def sizes(**changes):
    """The arguments of a tiny run, for both train.py."""
    from conftest import TINY

    return [f"--{k}={v}" for k, v in {**TINY, "dataset": DATASET, **changes}.items()]


@pytest.fixture(scope="module")
def theirs(root, script):
    """The folder and console output of a run of nanoGPT's train.py, saved at step 8."""
    console = succeed(
        script("train.py", *sizes(out_dir="out-theirs", max_iters=8), root=root, cwd=root)
    )
    return root / "out-theirs", console


@pytest.fixture
def inside(root, monkeypatch):
    monkeypatch.chdir(root)
    return root


@pytest.fixture(scope="module")
def gpt2_ids(root):
    """Files of GPT-2 tokens, instead of the data sets that its prepare.py would download."""
    rng = np.random.default_rng(0)
    for dataset in ("openwebtext", "shakespeare"):
        for split in ("train", "val"):
            ids = rng.integers(50257, size=2000).astype("<u2")
            ids.tofile(root / "data" / dataset / f"{split}.bin")


@pytest.fixture
def ours(inside, main, tmp_path):
    """A run of our train.py on nanoGPT's data files, saved at step 8."""
    return main(sizes(out_dir=tmp_path / "out-ours")).out_dir


@pytest.fixture(scope="module")
def their_model():
    """nanoGPT's model.py as a module."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", CHECKOUT / "model.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt_model"] = module
    spec.loader.exec_module(module)
    return module


def open_as_they_do(their_model, path):
    """nanoGPT's model with the weights of a checkpoint, loaded as its sample.py loads them."""
    checkpoint = torch.load(path, map_location="cpu")
    model = their_model.GPT(their_model.GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


# ----------------------------------------------------------------------------- their files, here


def test_their_data_files_are_read(root, text):
    folder = root / "data" / DATASET
    assert read_meta(folder) is None
    tokenizer = load_tokenizer(folder)
    ids = np.fromfile(folder / "train.bin", dtype="<u2")
    assert tokenizer.decode(ids) == text[: int(len(text) * 0.9)]
    assert tokenizer.vocab_size == len(set(text))


def test_their_checkpoint_resumes_here(inside, theirs, resume, tmp_path):
    folder, console = theirs
    out = shutil.copytree(folder, tmp_path / "out")
    run = resume(out, max_iters=11)
    assert "at step 8" in run.console
    assert list(run.series("loss")) == [8, 9, 10, 11]
    # their evaluation at step 8 used other windows; an untrained model would be far off
    told = re.search(r"step 8: train loss ([\d.]+), val loss ([\d.]+)", console)
    assert run.series("train_loss")[8] == pytest.approx(float(told[1]), abs=0.3)
    assert max(run.series("loss").values()) < run.series("train_loss")[8] + 0.3
    checkpoint = run.checkpoint()
    assert checkpoint["config"]["dataset"] == DATASET
    assert checkpoint["config"]["learning_rate"] == 1e-2  # theirs, not our default
    state = checkpoint["optimizer"]["state"]
    assert {entry["step"].item() for entry in state.values()} == {12}  # continued, not restarted
    assert run.checkpoint("ckpt.pt")["iter_num"] == 12


def test_their_checkpoint_samples_here(inside, theirs, text, capsys):
    argv = ["--out_dir=out-theirs", "--num_samples=2", "--max_new_tokens=30", *ON_CPU]
    sample.main(configure(sample.SampleConfig, argv))
    out = capsys.readouterr().out
    assert out.count("\n---------------\n") == 2 and len(out) > 60
    assert set(out) <= set(text) | {"-"}


def test_their_config_files_work_here(root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    monkeypatch.setattr("time.time", lambda: 0.0)  # it is part of a run's name
    for file in sorted((root / "config").glob("*.py")):
        scope = {}
        exec(file.read_text(), scope)
        config = configure(TrainConfig, [str(file)])
        expected = {key: value for key, value in scope.items() if not key.startswith("_")}
        ours = as_dict(config)
        assert expected.keys() <= ours.keys() | {"time"}
        assert {k: ours[k] for k in expected if k != "time"} == {
            k: v for k, v in expected.items() if k != "time"
        }
    assert capsys.readouterr() == ("", "")


CONFIGS = ["train_shakespeare_char", "train_gpt2", "finetune_shakespeare"]
CONFIGS += [f"eval_gpt2{size}" for size in ("", "_medium", "_large", "_xl")]


def run_config(root, main, name, out_dir, **changes):
    """Train a tiny run with a config file of theirs. Returns (settings, `Run`)."""
    scope = {}
    exec((root / "config" / f"{name}.py").read_text(), scope)
    settings = {key: value for key, value in scope.items() if key not in ("__builtins__", "time")}
    tiny = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 16, "eval_iters": 2}
    tiny |= {"init_from": "scratch", "out_dir": out_dir, "wandb_log": False, **changes}
    argv = [f"config/{name}.py", *ON_CPU, *(f"--{k}={v}" for k, v in tiny.items())]
    return settings, main(argv)


def test_all_their_config_files_are_tested(root):
    assert sorted(path.stem for path in (root / "config").glob("*.py")) == sorted(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS[:3])
def test_their_training_configs_run_here(inside, gpt2_ids, main, tmp_path, name):
    changes = {"max_iters": 3, "eval_interval": 2, "log_interval": 1, "batch_size": 2}
    out = tmp_path / "out"
    settings, run = run_config(
        inside, main, name, out, gradient_accumulation_steps=2, wandb_run_name="tiny", **changes
    )
    checkpoint = run.checkpoint()
    kept = checkpoint["config"]
    given = {*changes, "n_layer", "n_head", "n_embd", "block_size", "eval_iters", "init_from"}
    given |= {"out_dir", "wandb_log", "wandb_run_name", "gradient_accumulation_steps"}
    assert {key: kept[key] for key in settings.keys() - given} == {
        key: value for key, value in settings.items() if key not in given
    }
    assert checkpoint["iter_num"] == 4 and list(run.series("val_loss")) == [0, 2, 4]
    rows = 50304 if kept["dataset"] != DATASET else checkpoint["model_args"]["vocab_size"]
    assert run.series("loss")[0] == pytest.approx(math.log(rows), abs=0.3)
    for step, lr in run.series("lr").items():  # all steps are in nanoGPT's warm-up
        share = (step + 1) / (kept["warmup_iters"] + 1) if kept["decay_lr"] else 1
        assert lr == pytest.approx(kept["learning_rate"] * share, rel=1e-12)
    losses = run.series("val_loss")
    saved = 4 if settings.get("always_save_checkpoint", True) else min(losses, key=losses.get)
    assert (out / "ckpt.pt").exists() == (saved > 0)  # the first evaluation saves nothing
    assert saved == 0 or run.checkpoint("ckpt.pt")["iter_num"] == saved


@pytest.mark.parametrize("name", CONFIGS[3:])
def test_their_evaluation_configs_run_here(inside, gpt2_ids, main, tmp_path, name):
    settings, run = run_config(inside, main, name, tmp_path / "out")
    assert settings["eval_only"] and not (tmp_path / "out").exists()
    lines = re.findall(r"^step (\d+): train loss ([\d.]+), val loss", run.console, re.MULTILINE)
    assert [step for step, _ in lines] == ["0"]
    assert float(lines[0][1]) == pytest.approx(math.log(50304), abs=0.3)


# ----------------------------------------------------------------------------- our files, there


def test_our_checkpoint_samples_there(root, ours, script, text):
    argv = [f"--out_dir={ours}", "--num_samples=2", "--max_new_tokens=30", *ON_CPU]
    out = succeed(script("sample.py", *argv, root=root, cwd=root))
    assert "Loading meta from" in out  # the characters, not GPT-2's
    samples = out.split("Loading meta from", 1)[1].split("\n", 1)[1].split("\n---------------\n")
    assert len(samples) == 3 and all(len(s) >= 30 for s in samples[:2])
    assert set("".join(samples)) <= set(text)


def test_our_checkpoint_resumes_there_and_back(root, ours, script, resume):
    last = load_checkpoint(ours / "last.pt")
    argv = [*sizes(out_dir=ours, max_iters=12), "--init_from=resume"]
    console = succeed(script("train.py", *argv, root=root, cwd=root))
    losses = {int(i): float(x) for i, x in re.findall(r"iter (\d+): loss ([\d.]+)", console)}
    assert list(losses) == [8, 9, 10, 11, 12]
    assert float(re.search(r"step 8: train loss ([\d.]+)", console)[1]) < 3.5
    assert max(losses.values()) < last["best_val_loss"] + 0.5
    # they save step 12 to ckpt.pt, which is then later than our last.pt
    run = resume(ours, max_iters=13)
    assert "at step 12" in run.console
    state = run.checkpoint()["optimizer"]["state"]
    assert {entry["step"].item() for entry in state.values()} == {14}


# ----------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("whose", ["theirs", "ours"])
def test_models_match(theirs, ours, their_model, whose):
    path = {"theirs": theirs[0], "ours": ours}[whose] / "ckpt.pt"
    there, here = open_as_they_do(their_model, path), GPT.from_checkpoint(path).eval()
    generator = torch.Generator().manual_seed(0)
    idx, targets = torch.randint(here.config.vocab_size, (2, 4, 16), generator=generator)
    with torch.no_grad():
        for a, b in ((there(idx), here(idx)), (there(idx, targets), here(idx, targets))):
            torch.testing.assert_close(a[0], b[0], atol=1e-6, rtol=0)
            assert a[1] is b[1] is None or abs(a[1].item() - b[1].item()) < 1e-6
    assert there.get_num_params() == here.get_num_params()
    assert there.estimate_mfu(12, 0.5) == pytest.approx(here.estimate_mfu(12, 0.5))


@pytest.mark.parametrize("bias", [True, False])
def test_optimizers_match(their_model, bias):
    shape = dict(block_size=16, vocab_size=40, n_layer=2, n_head=2, n_embd=16, bias=bias)
    torch.manual_seed(0)
    here, there = GPT(GPTConfig(**shape)), their_model.GPT(their_model.GPTConfig(**shape))
    there.load_state_dict(here.state_dict())
    # the gradient of the key biases is only rounding error, which AdamW amplifies
    here.double(), there.double()
    optimizers = [m.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu") for m in (here, there)]
    for step in range(6):
        idx, targets = torch.randint(40, (2, 4, 16))
        for model, optimizer in zip((here, there), optimizers, strict=True):
            model(idx, targets)[1].backward()
            optimizer.step()
            optimizer.zero_grad()
        if step == 2:  # exchange their states
            states = [optimizer.state_dict() for optimizer in optimizers]
            load_optimizer(optimizers[0], states[1])
            optimizers[1].load_state_dict(states[0])
    for name, weight in there.state_dict().items():
        torch.testing.assert_close(weight, here.state_dict()[name], atol=1e-7, rtol=0)


def test_initializations_match(their_model):
    shape = dict(block_size=64, vocab_size=300, n_layer=3, n_head=2, n_embd=64, bias=True)
    here, there = GPT(GPTConfig(**shape)), their_model.GPT(their_model.GPTConfig(**shape))
    ours, theirs = here.state_dict(), there.state_dict()
    assert ours.keys() == {name for name in theirs if not name.endswith(".attn.bias")}
    for name, weight in ours.items():
        assert weight.shape == theirs[name].shape
        assert weight.std(correction=0).item() == pytest.approx(
            theirs[name].std(correction=0).item(), rel=0.1, abs=1e-8
        )
        assert weight.mean().item() == pytest.approx(theirs[name].mean().item(), abs=2e-3)
