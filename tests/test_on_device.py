"""Results on the device match a CPU in float64. Run on a GPU with BRISK_TEST_DEVICE=cuda.

The relative error ‖difference‖ / ‖expected‖ must be at most 1e-4 in float32, and 2e-2 with bfloat16
products, whose unit roundoff is 4e-3.
"""

import copy
import shutil
import sys

import pytest
import torch
from conftest import ROOT, Run, same
from networks import SIZES, VARIANTS, random_ids, random_model
from torch.nn import functional as F

from brisk import cuda_graph
from brisk.device import Device
from brisk.generation import decode_graph
from brisk.generation.kv_cache import KVCache, decode_step, prefill
from brisk.training.optim import step_if_finite
from model import GPT, GPTConfig

sys.path.insert(0, str(ROOT / "benchmarks"))
from trainer import open_trainer

ALL_VARIANTS = pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
FLOAT32, BFLOAT16 = 1e-4, 2e-2
BOTH = pytest.mark.parametrize("dtype, limit", [("float32", FLOAT32), ("bfloat16", BFLOAT16)])


@pytest.fixture
def gpu(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU; test_cuda_graph.py and test_decode_graph.py have it on tapes")
    return device


def error(found, expected):
    """‖actual - expected‖ / ‖expected‖ for tensors or lists of tensors."""
    listed = isinstance(expected, list | tuple)
    found, expected = (
        torch.cat([t.detach().double().cpu().flatten() for t in (x if listed else [x])])
        for x in (found, expected)
    )
    return ((found - expected).norm() / expected.norm()).item()


def in_double(model):
    """A copy of a model on the CPU, in float64."""
    return copy.deepcopy(model).cpu().double()


def loss_and_grads(model, idx, dtype="float32"):
    with Device(idx.device, dtype).autocast():
        _, loss = model(idx, idx.roll(-1, 1), return_logits=False)
    loss.backward()
    return loss, [p.grad for p in model.parameters()]


# ----------------------------------------------------------------------------- the network


@BOTH
@ALL_VARIANTS
def test_loss_and_gradients(device, variant, dtype, limit):
    """From fresh weights, as at the start of a run."""
    torch.manual_seed(0)
    model, idx = GPT(GPTConfig(**{**SIZES, **variant, "zero_init": False})), random_ids(B=8)
    expected, expected_grads = loss_and_grads(in_double(model), idx)
    model.to(device.device)
    loss, grads = loss_and_grads(model, idx.to(device.device), dtype)
    assert loss.item() == pytest.approx(expected.item(), rel=limit)
    assert error(grads, expected_grads) < limit


@BOTH
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention(device, kv_heads, dtype, limit):
    model = random_model(n_kv_head=kv_heads, block_size=256)
    attention = model.transformer.h[0].attn.train()
    x = torch.randn(2, 256, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v = in_double(attention).queries_keys_values(x)
    k, v = (t.repeat_interleave(4 // kv_heads, 1) for t in (k, v))
    future = torch.ones(256, 256, dtype=torch.bool).triu(1)
    scores = (q @ k.mT / 8**0.5).masked_fill(future, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(2, 256, 32)
    expected = F.linear(mixed, attention.c_proj.weight.double(), attention.c_proj.bias.double())
    attention.to(device.device)
    with Device(device.device, dtype).autocast():
        found = attention(x.float().to(device.device))
    assert error(found, expected) < limit


# ----------------------------------------------------------------------------- generation


@ALL_VARIANTS
def test_decoded_logits(device, variant):
    """For rows of different lengths, with the cache and with the step of a CUDA graph."""
    model, idx = random_model(**variant), random_ids(B=2)
    expected = in_double(model)
    model.to(device.device)
    idx_there, cache = idx.to(device.device), KVCache(model, 2, 24)
    prefill(model, [idx_there[0, :3], idx_there[1, :9]], cache, [0, 1])
    for i in range(3, 15):
        ids = torch.stack((idx_there[0, i], idx_there[1, i + 6]))[:, None]
        if i % 2:
            found = decode_step(model, ids, cache)
        else:
            positions = cache.lengths[:, None].to(device.device)
            with torch.no_grad():
                found = model(ids, cache=cache.static_step(ids, positions))[0][:, -1]
            cache.lengths += 1
        texts = (idx[0, : i + 1], idx[1, : i + 7])
        logits = torch.cat([expected.predict(t[None], targets=False)[:, -1] for t in texts])
        assert error(found, logits) < FLOAT32


@pytest.mark.parametrize("top_k, top_p", [(None, None), (7, None), (None, 0.8)])
def test_samples(device, top_k, top_p):
    """The same random numbers give the same text, also past the block size."""
    model, prompts = random_model(), [[1, 2, 3], [5], [7] * 20]
    options = {"temperature": 0.7, "top_k": top_k, "top_p": top_p, "seed": 3}
    expected = in_double(model).generate(prompts, 30, **options)
    found = model.to(device.device).generate(prompts, 30, **options)
    same_tokens = torch.cat([a.cpu() == b for a, b in zip(found, expected, strict=True)])
    assert same_tokens.double().mean() > 0.9  # rounding may change a sample and all that follow


def test_static_step_is_a_cuda_graph(gpu):
    model, idx = random_model().to(gpu.device), random_ids(B=2).to(gpu.device)
    cache, positions = KVCache(model, 2, 24), idx.new_zeros(2, 1)
    pool = cuda_graph.GraphPool(gpu.device)
    ids, expected = idx[:, :1].clone(), in_double(model)

    def step():
        return model(ids, cache=cache.static_step(ids, positions))[0][:, -1]

    with torch.no_grad():
        pool.call(step)
        replay, logits = pool.capture(step)
        for i in range(24):
            ids.copy_(idx[:, i : i + 1])
            positions.fill_(i)
            replay()
            assert error(logits, expected.predict(idx.cpu()[:, : i + 1], targets=False)) < FLOAT32


# ----------------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_steps(device, optimizer):
    """Three steps with given gradients, and a fourth that is skipped."""
    muon = (0.02, 0.95) if optimizer == "muon" else None
    moved = []
    for where in (device.device, torch.device("cpu")):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES))
        before = [p.detach().clone() for p in model.parameters()]
        model.to(where)
        steps = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), where.type, muon)
        for seed in range(4):
            generator = torch.Generator().manual_seed(seed)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator).to(where)
            skipped = torch.tensor(float(seed == 3), device=where)
            step_if_finite(skipped, steps)
        moved.append(
            [p.detach().cpu() - b for p, b in zip(model.parameters(), before, strict=True)]
        )
    # Muon's products are in bfloat16 on a GPU: singular values are 0.12 from 1 by its design
    limit = 0.1 if optimizer == "muon" and device.type == "cuda" else FLOAT32
    assert error(*moved) < limit


# ----------------------------------------------------------------------------- whole steps


@pytest.fixture
def run_on(main, settings, tmp_path):
    """Train a tiny run on a device. Returns a `Run`."""

    def run(name, device, **changes):
        changes = {"device": device.type, "n_layer": 2, **changes}
        return main(settings(tmp_path / name, **changes))

    return run


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@BOTH
def test_run_matches_the_cpu(device, run_on, optimizer, dtype, limit):
    """The losses of the first steps match a CPU in float32; later ones diverge by rounding."""
    cpu = Device(torch.device("cpu"), "float32")
    expected = run_on("cpu", cpu, optimizer=optimizer, max_iters=3)
    found = run_on("device", device, optimizer=optimizer, dtype=dtype, max_iters=3)
    if device.type != "cpu":  # Muon's products are in bfloat16 there, and float32's in TF32
        limit = BFLOAT16 if optimizer == "muon" else max(limit, 1e-3)
    for key in ("loss", "val_loss"):
        assert found.series(key) == pytest.approx(expected.series(key), rel=limit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_resume_is_exact(device, run_on, resume, tmp_path, dtype):
    if (device.type, dtype) == ("cpu", "float16"):
        pytest.skip("a CPU takes long for it")
    torch.use_deterministic_algorithms(True)  # otherwise the order of sums in attention varies
    try:
        whole = run_on("whole", device, dtype=dtype, dropout=0.1)
        run_on("part", device, dtype=dtype, dropout=0.1, max_iters=3)
        again = resume(tmp_path / "part", device=device.type, max_iters=7)
    finally:
        torch.use_deterministic_algorithms(False)
    assert again.series("loss") == whole.series("loss")
    assert same(again.checkpoint()["model"], whole.checkpoint()["model"])


def test_float16_with_scaler_learns(device, run_on):
    """The first steps may overflow and be skipped while the scale falls from 65536."""
    if device.type == "cpu":
        pytest.skip("a CPU takes long for it")
    settings = {"max_iters": 60, "lr_decay_iters": 60, "eval_interval": 60}
    found = run_on("float16", device, dtype="float16", **settings)
    expected = run_on("float32", device, **settings)
    assert found.checkpoint()["scaler"]["scale"] > 0
    assert found.series("val_loss")[61] == pytest.approx(expected.series("val_loss")[61], abs=0.15)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@BOTH
def test_torchrun_with_one_process(
    device, run_on, settings, torchrun, tmp_path, parallel, dtype, limit
):
    if device.type == "cpu":
        pytest.skip("test_data_parallel.py does it on a CPU, to the bit")
    changes = {"gradient_accumulation_steps": 2, "n_layer": 2, "dtype": dtype, "max_iters": 3}
    alone = run_on("alone", device, **changes)
    argv = settings(tmp_path / "one", **changes, device=device.type, parallel=parallel)
    done = torchrun("train.py", *argv, processes=1)
    assert done.returncode == 0, done.stderr
    one = Run(tmp_path / "one", done.stdout)
    for key in ("loss", "grad_norm"):
        assert one.series(key) == pytest.approx(alone.series(key), rel=limit)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("on_spike", ["stop", "skip"])
@pytest.mark.parametrize("graphs", [False, True], ids=["kernels", "graphs"])
def test_no_step_synchronizes(device, settings, tmp_path, optimizer, on_spike, graphs):
    if device.type != "cuda":
        pytest.skip("needs a GPU; test_stays_on_device.py looks for the same")
    changes = {"device": "cuda", "optimizer": optimizer, "on_spike": on_spike, "spike_factor": 10.0}
    changes |= {"dtype": None, "gradient_accumulation_steps": 2, "dropout": 0.1}
    with open_trainer(settings(tmp_path / "out", cuda_graph=graphs, **changes)) as trainer:
        for _ in range(cuda_graph.WARM_UP + 1 if graphs else 1):
            trainer.step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ----------------------------------------------------------------------------- CUDA graphs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 3, "dropout": 0.2},
        {"on_spike": "skip", "spike_factor": 10.0},
        {"activation_checkpointing": True},
        {"ngrams": 3, "ngram_rows": 50, "tied": False},
        {"position": "rotary", "norm": "rms", "qk_norm": True, "mlp": "swiglu", "n_kv_head": 1},
        {"rows": "documents"},
    ],
    ids=str,
)
def test_training_as_cuda_graphs(gpu, run_on, lines_data, changes):
    if changes.get("rows") == "documents":
        changes = {**changes, "data_dir": lines_data}
    changes = {"n_head": 2, "max_iters": 12, **changes}
    plain = run_on("plain", gpu, **changes)
    graphs = run_on("graphs", gpu, cuda_graph=True, **changes)
    for key in ("loss", "val_loss", "grad_norm"):
        assert graphs.series(key) == pytest.approx(plain.series(key), rel=1e-3)


@pytest.mark.parametrize(
    "optimizer, compiling, dtype",
    [
        ("adamw", False, "bfloat16"),
        ("muon", False, "float32"),
        ("muon", False, "bfloat16"),
        ("adamw", True, "bfloat16"),
    ],
)
def test_cuda_graphs_of_kinds(gpu, run_on, optimizer, compiling, dtype):
    changes = {"dtype": dtype, "compile": compiling, "optimizer": optimizer, "max_iters": 12}
    plain = run_on("plain", gpu, **changes)
    graphs = run_on("graphs", gpu, cuda_graph=True, **changes)
    assert graphs.series("loss") == pytest.approx(plain.series("loss"), rel=BFLOAT16)


@pytest.mark.parametrize("before, after", [(True, False), (False, True)])
def test_cuda_graphs_and_resume(gpu, run_on, resume, tmp_path, before, after):
    changes = {"dropout": 0.1, "lr_decay_iters": 14}
    whole = run_on("whole", gpu, max_iters=14, **changes)
    run_on("part", gpu, max_iters=6, cuda_graph=before, **changes)
    again = resume(tmp_path / "part", device="cuda", max_iters=14, cuda_graph=after)
    assert again.series("loss") == pytest.approx(whole.series("loss"), rel=1e-3)


@BOTH
@ALL_VARIANTS
def test_sampling_as_cuda_graphs(gpu, monkeypatch, variant, dtype, limit):
    """Ragged rows, windows that move, several graphs: the ids of the same steps uncaptured, to the
    bit. Other steps may tip a draw by their rounding."""
    monkeypatch.setattr(decode_graph, "SHORTEST", 8)
    model, prompts = random_model(**variant).to(gpu.device), [[1, 2, 3], [5], [7] * 20]
    with Device(gpu.device, dtype).autocast():
        options = {"seed": 1, "top_k": 20}
        plain = torch.cat(model.generate(prompts, 60, **options))
        graphs = torch.cat(model.generate(prompts, 60, cuda_graph=True, **options))
        monkeypatch.setattr(cuda_graph, "WARM_UP", 10**9)
        uncaptured = torch.cat(model.generate(prompts, 60, cuda_graph=True, **options))
    assert graphs.equal(uncaptured)
    if dtype == "float32":
        assert (graphs == plain).double().mean() > 0.9


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_no_compilation_after_the_first_steps(device, settings, tmp_path, recomputed):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    changes = {"device": device.type, "compile": True, "n_layer": 10, "dropout": 0.1}
    changes |= {"gradient_accumulation_steps": 2, "activation_checkpointing": recomputed}
    with open_trainer(settings(tmp_path / "out", **changes)) as trainer:
        assert trainer.plan.compile
        trainer.step()
        compiled = dict(counters["stats"]), dict(counters["inductor"])
        for _ in range(5):
            trainer.step()
        assert (dict(counters["stats"]), dict(counters["inductor"])) == compiled
        assert not counters["graph_break"]
