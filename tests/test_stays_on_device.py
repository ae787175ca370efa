"""Training and decode steps do not use the host: no host tensors, no synchronization, no copies.
Tested on PyTorch's meta device, whose tensors have shapes but no data."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from networks import SIZES, VARIANTS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from brisk.cuda_graph import WARM_UP, GraphPool
from brisk.device import Device
from brisk.distributed.parallelize import checkpoint_activations
from brisk.distributed.process_group import Ranks
from brisk.generation.decode_graph import DecodeGraphs
from brisk.generation.generate import Batch, sample_rows
from brisk.generation.kv_cache import KVCache, decode_step
from brisk.reporting.forecast import Forecast
from brisk.training.cuda_graph import StepGraphs
from brisk.training.optim import get_lr
from brisk.training.spikes import SpikeWatch
from brisk.training.state import TrainState
from model import GPT, GPTConfig

META = Device(torch.device("meta"), "float32")


class OnDeviceOnly(TorchDispatchMode):
    """Fails if an operation reads or creates a tensor on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        in_place = func is torch.ops.aten._fused_adamw_.tensor_lr  # has no kernel for meta
        out = None if in_place else func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, torch.Tensor):
                on_host = tensor.numel() and not tensor.is_meta  # checkpoint has an empty one
                assert not on_host, f"{func} has a tensor on the host"
        return out


@pytest.fixture
def on_meta(monkeypatch):
    """Create tensors on the meta device by default. Batches are on it already."""
    monkeypatch.setattr(train, "to_device", lambda batch, device: batch)
    module = sys.modules["torch.optim.optimizer"]  # use the fused kernel, as on a GPU
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # meta has none
    monkeypatch.setattr(torch, "autocast", lambda kind, **settings: nullcontext())
    with META.device:
        yield


def a_model(**variant):
    return GPT(GPTConfig(**{**SIZES, **variant}))


class Batches:
    """Random ids on the device."""

    def targets(self, position, count):
        return count * SIZES["block_size"]

    def batch(self, position, count):
        shape, kind = (count, SIZES["block_size"]), {"dtype": torch.int64, "device": "meta"}
        return [torch.zeros(shape, **kind) for _ in "xy"]


def one_step(model, calls=2, **settings):
    """Run `train.train_step` with two micro-batches. Returns its loss and gradient norm."""
    config = train.TrainConfig(**settings)
    ranks, steps = Ranks(), 0
    state = TrainState(model, ddp_model=model, scaler=META.scaler())
    muon = (0.02, 0.95) if config.optimizer == "muon" else None
    rates = (config.weight_decay, config.learning_rate, (config.beta1, config.beta2))
    state.optimizer = model.configure_optimizers(*rates, "cuda", muon)
    state.optimizer.device = META.device  # where Muon computes
    state.spikes = SpikeWatch(META.device, config.on_spike, config.spike_factor)
    plan = SimpleNamespace(device=META, global_batch=4, micro_batches=((0, 0, 2), (1, 2, 2)))
    data, run = SimpleNamespace(train=Batches()), SimpleNamespace(ranks=ranks)
    forecast = Forecast(None, META, steps, 2, 0, 0)
    forecast.reported.add("micro-batch")  # until reported, it synchronizes
    assert forecast.is_complete
    for group in state.optimizer.param_groups:
        group["lr"] = get_lr(0, config, 10)
    state.graphs = StepGraphs(state.optimizer, META) if config.cuda_graph else None
    for _ in range(calls):
        with torch.device("cpu"), OnDeviceOnly():  # a tensor without a device is on the host
            loss, norm = train.train_step(config, plan, state, data, run, forecast)
    return loss, norm


@pytest.mark.parametrize(
    "variant",
    [{}, {"dropout": 0.1}, {"ngrams": 3, "ngram_rows": 50, "ngram_dropout": 0.5}, *VARIANTS],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_step(on_meta, variant, optimizer):
    loss, norm = one_step(a_model(**variant), optimizer=optimizer)
    assert loss.shape == norm.shape == () and loss.device == norm.device == META.device


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize(
    "settings",
    [
        {"on_spike": "skip"},
        {"on_spike": "skip", "spike_factor": 10.0},
        {"grad_clip": 0.0},
        {"activation_checkpointing": True},
        {"freeze_layers": 1},
    ],
    ids=str,
)
def test_training_step_with_settings(on_meta, settings, optimizer):
    model = a_model()
    if settings.get("activation_checkpointing"):
        for block in model.transformer.h:
            checkpoint_activations(block, False)
    model.freeze_layers(settings.get("freeze_layers", 0))
    one_step(model, optimizer=optimizer, **settings)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("on_spike", ["stop", "skip"])
def test_training_step_as_graphs(on_meta, monkeypatch, optimizer, on_spike):
    """What is captured, and what is around it: static inputs, learning rates, results."""
    replays = []
    monkeypatch.setattr(GraphPool, "__init__", lambda pool, device: setattr(pool, "device", device))
    monkeypatch.setattr(GraphPool, "call", lambda pool, function: function())
    replayed = (lambda: replays.append(1),)
    monkeypatch.setattr(GraphPool, "capture", lambda pool, function: (*replayed, function()))
    settings = {"optimizer": optimizer, "on_spike": on_spike, "spike_factor": 10.0}
    one_step(a_model(), calls=WARM_UP + 2, cuda_graph=True, **settings)
    assert len(replays) == 2 + 2 * (WARM_UP + 2) - WARM_UP


@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
@pytest.mark.parametrize("how", [(1.0, None, None), (0.0, None, None), (0.8, 20, 0.9)], ids=str)
def test_decode_step(on_meta, variant, how):
    """The step for a CUDA graph, and sampling after it."""
    model = a_model(**variant).eval()
    cache = KVCache(model, 2, 24)
    ids, positions = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    uniforms = torch.zeros(2)
    with torch.device("cpu"), torch.no_grad(), OnDeviceOnly():
        logits = model(ids, cache=cache.static_step(ids, positions))[0][:, -1]
        assert sample_rows(logits, uniforms, [how] * 2).shape == (2,)


@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
def test_decode_step_as_graph(on_meta, monkeypatch, variant):
    """What is captured: the network, the draw, and the next positions."""
    monkeypatch.setattr(GraphPool, "__init__", lambda pool, device: None)
    model, prompts = a_model(**variant).eval(), [torch.zeros(5, dtype=torch.int64) for _ in "ab"]
    batch, uniforms = Batch(model, prompts, 9), torch.zeros(2, 9)
    own = [(0.8, 20, 0.9)] * 2
    graphs = DecodeGraphs(batch, lambda logits, u: sample_rows(logits, u, own), uniforms)
    with torch.device("cpu"), torch.no_grad(), OnDeviceOnly():
        assert graphs.step(8).shape == (2,)


class Copies(TorchDispatchMode):
    """Counts the copies between host and device, and fails if one synchronizes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if len({t.is_meta for t in tensors if t.dim()}) == 2:
            self.count += 1
            assert (kwargs or {}).get("non_blocking"), f"{func} waits for the device"
        return out


@pytest.mark.parametrize("lengths, copies", [((5, 5, 5), 0), ((5, 9, 7), 1)], ids=str)
@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
def test_ragged_decode_step_sends_positions_only(on_meta, variant, lengths, copies):
    """The lengths of the rows are on the host, for the scheduler."""
    model = a_model(**variant).eval()
    with torch.device("cpu"):
        cache = KVCache(model, 3, 24)
        cache.lengths = torch.tensor(lengths)
    ids = torch.zeros(3, 1, dtype=torch.int64)
    with torch.device("cpu"), Copies() as seen:
        decode_step(model, ids, cache)
    assert seen.count == copies


@pytest.mark.parametrize("read", [torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.cpu])
def test_host_access_is_detected(on_meta, read):
    """Reading a number and copying a tensor are detected."""
    x = torch.ones(())
    with OnDeviceOnly(), pytest.raises((RuntimeError, NotImplementedError, AssertionError)):
        read(x)
