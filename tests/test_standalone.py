"""model.py works without the package; with it, the fallbacks are never used."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from networks import random_ids, random_model

import model as model_file

MODEL = Path(model_file.__file__)

PRELUDE = """
import importlib.util, sys
sys.path.insert(0, "")  # isolated mode omits the working directory
if {alone} and importlib.util.find_spec("brisk"):
    sys.modules["brisk"] = None  # hides an installed package
import torch
from model import GPT, GPTConfig
torch.manual_seed(0)
torch.set_num_threads(1)
"""

TRAIN = """
modern = dict(position="rotary", norm="rms", qk_norm=True, mlp="swiglu", bias=False, n_kv_head=1)
idx = torch.arange(64).view(4, 16) % 7
for fields in ({}, {**modern, "ngrams": 2, "ngram_rows": 50, "tied": False}):
    sizes = dict(block_size=16, vocab_size=7, n_layer=2, n_head=2, n_embd=16, dropout=0.2)
    model = GPT(GPTConfig(**sizes, **fields))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")
    losses = []
    for step in range(40):
        _, loss = model(idx[:, :-1], idx[:, 1:], return_logits=False)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2, losses
    found = model.generate(idx[:2, :5], 20, temperature=0)  # beyond the window
    assert found.shape == (2, 25) and model.training
    correct = (found[:, 1:] == (found[:, :-1] + 1) % 7).float().mean()
    assert correct > 0.8, found
    assert model.generate(idx[:2, :5], 20, temperature=0.8, top_k=3).shape == (2, 25)
    for option in ({"seed": 1}, {"stop_ids": [2]}):
        try:
            model.generate(idx, 1, **option)
        except TypeError as error:
            assert "without the brisk package" in str(error)
        else:
            raise AssertionError("an option was ignored")
    model.eval()
    logits, loss = model(idx, idx)
    assert logits.shape == (4, 16, 7) and model(idx, idx, return_logits=False)[1].equal(loss)
assert not any(name.split(".")[0] == "brisk" for name in sys.modules if sys.modules[name])
"""


def run_in(folder, script, alone):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = PRELUDE.format(alone=alone) + script
    return subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=folder, env=clean, capture_output=True, text=True
    )


def test_model_alone_trains_and_generates(tmp_path):
    shutil.copy(MODEL, tmp_path)
    result = run_in(tmp_path, TRAIN, alone=True)
    assert result.returncode == 0, result.stderr


def test_broken_package_is_an_error(tmp_path):
    shutil.copy(MODEL, tmp_path)
    (tmp_path / "brisk").mkdir()
    (tmp_path / "brisk" / "__init__.py").touch()
    script = "GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8)).generate(torch.zeros(1, 1).long(), 1)"
    result = run_in(tmp_path, script, alone=False)
    assert "No module named 'brisk.generation'" in result.stderr


@pytest.fixture
def alone(monkeypatch):
    monkeypatch.setattr(model_file, "HAS_BRISK", False)


@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, 1), (1.0, 99)])
def test_short_loop_samples_like_the_package(temperature, top_k, alone, monkeypatch):
    model, idx = random_model(n_kv_head=2, position="rotary"), random_ids(T=5)
    torch.manual_seed(0)
    found = model.generate(idx, 40, temperature, top_k)
    monkeypatch.setattr(model_file, "HAS_BRISK", True)
    greedy = model.generate(idx, 40, temperature, top_k, exact_window=True)
    assert found.equal(greedy) == (top_k != 99) and found[:, :5].equal(idx)


def test_plain_optimizer_and_loss_match(alone, monkeypatch):
    """The same parameter groups in the same order, so that states are interchangeable."""
    updated, losses = [], []
    for has_brisk in (False, True):
        monkeypatch.setattr(model_file, "HAS_BRISK", has_brisk)
        model = random_model(tied=False)
        model.freeze_layers(1)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        _, loss = model(random_ids(), random_ids().flip(1), return_logits=False)
        losses.append(loss.item())
        torch.manual_seed(0)
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight) if weight.requires_grad else None
        optimizer.step()
        updated.append((model.state_dict(), optimizer.state_dict()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    (plain, plain_state), (ours, our_state) = updated
    for name, weight in ours.items():
        torch.testing.assert_close(plain[name], weight, rtol=0, atol=1e-5)
    for one, other in zip(plain_state["param_groups"], our_state["param_groups"], strict=True):
        assert one["params"] == other["params"] and one["weight_decay"] == other["weight_decay"]
