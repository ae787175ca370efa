"""Compiled blocks: when they are, how few graphs they make, and what happens where it fails."""

import shutil

import pytest
import torch
from networks import SIZES, VARIANTS, random_ids
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from brisk import device as module
from brisk.device import Device, compile_blocks, compile_failure, resolve_compile
from brisk.distributed.parallelize import checkpoint_activations
from model import GPT, GPTConfig

CPU = Device(torch.device("cpu"), "float32")
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled before, and no trial remembered."""
    torch.compiler.reset()
    counters.clear()
    compile_failure.cache_clear()
    yield
    compile_failure.cache_clear()


@pytest.fixture
def backend(monkeypatch):
    """`torch.compile` with a backend that a test gives, in place of inductor."""
    compile = torch.compile

    def use(backend):
        monkeypatch.setattr(torch, "compile", lambda fn: compile(fn, backend=backend))
        return backend

    return use


def steps(model, count=3, T=24):
    """Training steps, each with an evaluation after it; the losses."""
    losses, idx = [], random_ids(T=T)
    for _ in range(count):
        model.train()
        _, loss = model(idx, idx, return_logits=False)
        loss.backward()
        model.eval()
        with torch.no_grad():
            losses += [loss.item(), model(idx, idx, return_logits=False)[1].item()]
    return losses


def a_model(**settings):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SIZES, **settings}))


@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("variant", [{}, {"dropout": 0.1}, *VARIANTS], ids=str)
def test_blocks_share_two_graphs(backend, variant, recomputed):
    """One to train and one to evaluate, whole and for blocks of any number: more would end in
    PyTorch's limit of compilations, and run uncompiled without a word."""
    counter = backend(CompileCounter())
    model = a_model(**variant, n_layer=10)
    if recomputed:
        for block in model.transformer.h:
            checkpoint_activations(block, variant.get("dropout", 0) > 0)
    compile_blocks(model.transformer.h, pytest.fail)
    steps(model)
    assert counter.frame_count == 2 and not counters["graph_break"]


def test_a_failure_in_mid_run_is_one_line(backend):
    said, shapes = [], set()

    def fails_at_another_shape(graph, inputs):
        shapes.add(inputs[0].shape)
        if len(shapes) > 1:
            raise OSError("no space left on device\nand a second line")
        return graph.forward

    backend(fails_at_another_shape)
    model, plain = a_model(), a_model()
    compile_blocks(model.transformer.h, said.append)
    assert steps(model) == steps(plain) and not said
    assert steps(model, T=16) == steps(plain, T=16)
    assert said == ["compiling failed, going on without it: OSError: no space left on device"]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_an_error_of_the_block_stays_its_own(backend):
    backend("eager")
    model = a_model()
    compile_blocks(model.transformer.h, print)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        model.transformer.h[0](torch.zeros(1, 4, 7), None, None)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\n  "),
        ImportError("Cannot find a working triton installation."),
        SystemError("Dynamo is not supported on Python 3.99+"),
        FileNotFoundError(2, "fatal error: Python.h: No such file or directory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_cannot_compile_is_one_line(backend, capsys, monkeypatch, error):
    def broken(graph, inputs):
        raise error

    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    backend(broken)
    for _ in range(2):  # the second asks nobody
        assert resolve_compile(True, CPU) is False
    lines = capsys.readouterr().out.splitlines()
    reason = str(error).splitlines()[0]
    assert lines == [f"not compiling: {type(error).__name__}: {reason}"] * 2


def test_dynamo_that_knows_no_such_python(capsys, monkeypatch):
    def refuses(fn):
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", refuses)
    assert resolve_compile(True, CPU) is False
    assert capsys.readouterr().out.count("Python 3.99") == 1


@compiler
@pytest.mark.slow
def test_a_trial_compiles_once(monkeypatch):
    trials, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn: trials.append(fn) or compile(fn))
    assert resolve_compile(True, CPU) and resolve_compile(True, CPU) and len(trials) == 1
