"""Compilation: when it is used, the number of graphs, and failures."""

import shutil

import pytest
import torch
from networks import SIZES, VARIANTS, random_ids
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from brisk import device as module
from brisk.device import Device, compile_failure, resolve_compile
from brisk.distributed.parallelize import checkpoint_activations
from brisk.training.compilation import compile_model
from model import GPT, GPTConfig

CPU = Device(torch.device("cpu"), "float32")
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")


@pytest.fixture(autouse=True)
def fresh():
    """Without earlier compilations and cached trials."""
    torch.compiler.reset()
    counters.clear()
    compile_failure.cache_clear()
    yield
    compile_failure.cache_clear()


@pytest.fixture
def backend(monkeypatch):
    """`torch.compile` with the backend of a test instead of inductor."""
    compile = torch.compile

    def use(backend):
        monkeypatch.setattr(torch, "compile", lambda fn: compile(fn, backend=backend))
        return backend

    return use


def steps(model, count=3, T=24):
    """Run training steps, each followed by an evaluation. Returns the losses."""
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


LARGE = 10**9  # tokens; their logits need several chunks


@pytest.mark.parametrize("variant", [{}, {"dropout": 0.1}, *VARIANTS], ids=str)
@pytest.mark.parametrize(
    "tokens, blocks_only, recomputed, graphs",
    [(32, False, False, 1), (LARGE, False, False, 4), (32, True, False, 1), (32, True, True, 1)],
    ids=["whole", "regions", "blocks", "recomputed blocks"],
)
def test_graphs_are_few(backend, variant, tokens, blocks_only, recomputed, graphs):
    """Two graphs for each region, for training and evaluation, with any number of blocks. More
    would exceed PyTorch's recompilation limit, and then silently run uncompiled."""
    counter = backend(CompileCounter())
    model = a_model(**variant, n_layer=10 if blocks_only else 2)
    if recomputed:
        for block in model.transformer.h:
            checkpoint_activations(block, variant.get("dropout", 0) > 0)
    compile_model(model, tokens, pytest.fail, blocks_only)
    steps(model)
    assert counter.frame_count == 2 * graphs and not counters["graph_break"]


@pytest.mark.parametrize("tokens", [32, LARGE], ids=["whole", "regions"])
@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
def test_compiled_regions_compute_the_same(backend, variant, tokens):
    backend("eager")  # run the traced graphs without a compiler
    model, plain = a_model(**variant), a_model(**variant)
    compile_model(model, tokens, pytest.fail)
    assert steps(model) == pytest.approx(steps(plain), rel=1e-5)


def test_failure_during_a_run_is_one_line(backend):
    said, shapes = [], set()

    def fails_at_another_shape(graph, inputs):
        shapes.add(inputs[0].shape)
        if len(shapes) > 1:
            raise OSError("no space left on device\nand a second line")
        return graph.forward

    backend(fails_at_another_shape)
    model, plain = a_model(), a_model()
    compile_model(model, 32, said.append, blocks_only=True)
    assert steps(model) == steps(plain) and not said
    assert steps(model, T=16) == steps(plain, T=16)
    assert said == ["compilation failed, continuing uncompiled: OSError: no space left on device"]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_error_in_a_block_is_not_hidden(backend):
    backend("eager")
    model = a_model()
    compile_model(model, 32, print, blocks_only=True)
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
def test_compile_failure_is_one_line(backend, capsys, monkeypatch, error):
    def broken(graph, inputs):
        raise error

    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    backend(broken)
    for _ in range(2):  # the second is cached
        assert resolve_compile(True, CPU) is False
    lines = capsys.readouterr().out.splitlines()
    reason = str(error).splitlines()[0]
    assert lines == [f"not compiling: {type(error).__name__}: {reason}"] * 2


def test_unsupported_python(capsys, monkeypatch):
    def refuses(fn):
        raise RuntimeError("torch.compile is not supported on Python 3.99+")

    monkeypatch.setattr(module.shutil, "which", lambda name: name)
    monkeypatch.setattr(torch, "compile", refuses)
    assert resolve_compile(True, CPU) is False
    assert capsys.readouterr().out.count("Python 3.99") == 1


@compiler
@pytest.mark.slow
def test_trial_compiles_once(monkeypatch):
    trials, compile = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn: trials.append(fn) or compile(fn))
    assert resolve_compile(True, CPU) and resolve_compile(True, CPU) and len(trials) == 1
