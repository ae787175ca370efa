"""Activation checkpointing: the same run in less memory."""

import shutil

import pytest
import torch

from brisk.device import Device
from brisk.distributed.parallelize import checkpoint_activations
from brisk.training.memory import expected_memory
from model import GPT, GPTConfig

CPU = Device(torch.device("cpu"), "float32")
MODERN = {"position": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "tied": False}


@pytest.mark.parametrize("changes", [{"dropout": 0.2}, MODERN], ids=["dropout", "modern"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_checkpointed_run_is_bit_exact(train_tiny, tmp_path, changes, dtype):
    changes = {**changes, "n_layer": 2, "gradient_accumulation_steps": 2, "dtype": dtype}
    kept = train_tiny(tmp_path / "kept", **changes)
    again = train_tiny(tmp_path / "again", **changes, activation_checkpointing=True)
    for key in ("loss", "train_loss", "val_loss", "grad_norm"):
        assert again.series(key) == kept.series(key)
    weights, expected = (run.checkpoint()["model"] for run in (again, kept))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_compiled_blocks(train_tiny, tmp_path):
    changes = {"n_layer": 2, "compile": True, "max_iters": 3, "dropout": 0.2}
    kept = train_tiny(tmp_path / "kept", **changes)
    again = train_tiny(tmp_path / "again", **changes, activation_checkpointing=True)
    assert again.series("loss") == pytest.approx(kept.series("loss"), abs=1e-6)


def a_model():
    torch.manual_seed(1)
    return GPT(GPTConfig(block_size=32, vocab_size=64, n_layer=6, n_head=2, n_embd=32))


def bytes_kept(model):
    """The bytes that autograd saves in a forward pass through the blocks, without weights."""
    kept, mine = {}, {w.untyped_storage().data_ptr() for w in model.parameters()}

    def count(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.zeros(4, 32, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        for block in model.transformer.h:
            x = block(x, None, None)
    return sum(size for key, size in kept.items() if key not in mine)


def test_block_saves_only_its_input():
    model, recomputed = a_model(), a_model()
    for block in recomputed.transformer.h:
        checkpoint_activations(block, preserve_rng=False)
    sequences = 4 * 32 * 32 * 4  # bytes of the input of a block
    assert bytes_kept(recomputed) <= 6 * sequences < bytes_kept(model) / 5
    foretold, whole = (expected_memory(model, 4, CPU, recomputed=r) for r in (True, False))
    spared = bytes_kept(model) / 6 * 5 - 6 * sequences
    assert whole - foretold == pytest.approx(spared, rel=0.02)


def test_evaluation_recomputes_nothing():
    model = a_model()
    block, calls = model.transformer.h[0], []
    block.attn.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_activations(block, preserve_rng=False)
    x = torch.zeros(1, 32, 32)
    with torch.no_grad():
        block(x)
    assert calls == [1]
    block(x.requires_grad_()).sum().backward()
    assert calls == [1, 1, 1]
