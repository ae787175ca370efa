"""Choice of device, precision and compilation, and memory estimates."""

import shutil

import pytest
import torch
from networks import VARIANTS, random_ids, random_model

from brisk.device import Device, cpu_training_dtype, matmul_flops, open_device, resolve_compile
from brisk.errors import UserError, format_bytes
from brisk.training.memory import expected_memory, kept_by_block, peak_memory
from brisk.training.optim import get_lr
from model import GPT, GPTConfig

CPU = Device(torch.device("cpu"), "float32")
SMALL = GPTConfig(block_size=32, vocab_size=65, n_layer=2, n_head=2, n_embd=64, dropout=0.1)


def test_auto_without_gpu_is_cpu_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    device = open_device()
    assert (device.type, device.dtype_name) == ("cpu", "float32")
    assert not device.scaler().is_enabled()


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps"])
def test_unavailable_device_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=f"--device={name}"):
        open_device(name)
    with pytest.raises(UserError, match="no such device"):
        open_device("gpu")


def test_float16_scales_its_gradients():
    assert open_device("cpu", "float16").scaler().is_enabled()


@pytest.mark.parametrize(
    "units, capability, expected",
    [
        ({"amx_tile"}, "AVX512", "bfloat16"),
        ({"avx512_bf16"}, "AVX512", "bfloat16"),
        ({"avx512_bf16"}, "AVX2", "float32"),  # disabled by ATEN_CPU_CAPABILITY
        (set(), "AVX512", "float32"),
        (set(), "DEFAULT", "float32"),  # Arm, or an old processor
    ],
)
def test_cpu_training_dtype(monkeypatch, units, capability, expected):
    """The threshold is 2^18 activations: 16 × 128 tokens with 128 channels."""
    for name in ("amx_tile", "avx512_bf16"):
        here = name in units
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda here=here: here)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert cpu_training_dtype(16, 128, 128) == expected
    assert cpu_training_dtype(16, 128, 127) == "float32"
    assert cpu_training_dtype(1, 1024, 768) == expected  # GPT-2


def test_cpu_training_dtype_without_cpu_features(monkeypatch):
    for name in ("amx_tile", "avx512_bf16"):
        monkeypatch.delattr(torch.cpu, f"_is_{name}_supported")
    assert cpu_training_dtype(12, 1024, 768) == "float32"


def test_unavailable_compiler_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert resolve_compile(True, CPU) is False
    assert "no C++ compiler" in capsys.readouterr().out
    assert resolve_compile(False, CPU) is False and resolve_compile("auto", CPU) is False
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "name, peak",
    [
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-32GB", 112e12),
        ("Tesla T4", 65e12),
    ],
)
def test_peak_is_from_the_datasheet(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    flops, source = Device(torch.device("cuda"), "bfloat16").peak_flops()
    assert flops == peak and "datasheet" in source


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA L40",
        "NVIDIA A10G",
        "NVIDIA A10M",
        "NVIDIA RTX A1000",
        "NVIDIA RTX A1000 Laptop GPU",
        "NVIDIA A100X",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "GRID A100-10C",
        "NVIDIA T400 4GB",
        "NVIDIA T4G",
        "GRID T4-8Q",
        "Tesla V100S-PCIE-32GB",
        "NVIDIA H100 NVL",
        "NVIDIA H20",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce GTX 1080 Ti",
        "AMD Instinct MI300X",
    ],
)
def test_peak_of_an_unknown_gpu_is_measured(monkeypatch, name):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr("brisk.device.matmul_flops", lambda device: 1e12)
    flops, source = Device(torch.device("cuda"), "bfloat16").peak_flops()
    assert flops == 1e12 and "measured" in source


def test_mps_is_float32_without_fused_adamw(monkeypatch):
    """bfloat16 is not faster there, and the fused kernel ignores `found_inf`."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    device = open_device()
    assert (device.type, device.dtype_name) == ("mps", "float32")
    model = GPT(SMALL)
    for muon in (None, (0.02, 0.95)):
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "mps", muon)
        assert not any(group.get("fused") for group in optimizer.param_groups)


def test_matmul_flops_is_plausible():
    assert 1e8 < matmul_flops(CPU, 256, 0.02) < 1e15


def test_expected_memory_of_weights_and_batch():
    two, four, eight = (expected_memory(GPT(SMALL), b, CPU) for b in (2, 4, 8))
    parameters = sum(p.numel() for p in GPT(SMALL).parameters())
    row = (four - two) / 2
    assert eight - four == pytest.approx(4 * row, rel=0.01)
    assert two - 2 * row == pytest.approx(16 * parameters, rel=0.05)
    assert row > 2 * 10 * 32 * 64 * 4  # two blocks that keep ten float32 tensors (T, n_embd) each


def test_frozen_layers_need_weights_only():
    whole, frozen = GPT(SMALL), GPT(SMALL)
    frozen.freeze_layers(1)
    learned = sum(p.numel() for p in frozen.parameters() if p.requires_grad)
    spared = 12 * (sum(p.numel() for p in whole.parameters()) - learned)
    none, one = (expected_memory(model, 2, CPU) for model in (whole, frozen))
    block = (expected_memory(whole, 4, CPU) - none) / 2  # per sequence, for all blocks
    assert none - one > spared
    assert none - one < spared + 2 * block


def test_expected_memory_keeps_the_random_state(monkeypatch, recwarn):
    """Only that of this device: PyTorch warns if it must fork the state of several GPUs."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    model = GPT(SMALL)
    before = torch.get_rng_state()
    expected_memory(model, 1, CPU)
    assert torch.equal(torch.get_rng_state(), before)
    assert not recwarn.list


def test_norms_of_bfloat16_weights_are_float32():
    """As under autocast on a GPU: they save a float32 copy (4 bytes) of their input."""
    model = GPT(GPTConfig(**{**vars(SMALL), "dropout": 0.0, "n_embd": 256}))
    each, _, x = kept_by_block(model, Device(torch.device("cpu"), "bfloat16"), torch.bfloat16)
    assert x == 2 * 32 * 256
    # two norms; in bfloat16, the inputs of four linear layers and GELU, q, k, v and attention's y
    channels = 2 * 4 + 2 * (1 + 3 + 1 + 1 + 4 + 4)
    assert each == pytest.approx(channels * 32 * 256, rel=0.05)


def test_memory_units():
    assert format_bytes(40e6) == "40 MB" and format_bytes(3.44e9) == "3.4 GB"
    assert peak_memory(CPU) is None or peak_memory(CPU) > 1e7


def test_schedule_warms_up_decays_and_stays():
    class Settings:
        learning_rate, min_lr, warmup_iters, decay_lr = 1.0, 0.1, 9, True
        schedule = "cosine"

    rates = [get_lr(step, Settings, 109) for step in range(120)]
    assert rates[:9] == pytest.approx([(step + 1) / 10 for step in range(9)])
    assert rates[9] == 1.0 and rates[59] == pytest.approx(0.55)
    assert rates[9:110] == sorted(rates[9:110], reverse=True)
    assert set(rates[109:]) == {0.1}
    Settings.decay_lr = False
    assert get_lr(0, Settings, 109) == get_lr(500, Settings, 109) == 1.0
    Settings.decay_lr, Settings.warmup_iters = True, 5
    assert get_lr(5, Settings, 5) == 0.1  # without a decay phase: no division by zero


@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
def test_cast_linear_weights_keeps_logits(variant):
    device, idx = Device(torch.device("cpu"), "bfloat16"), random_ids()
    plain, cast = random_model(**variant), random_model(**variant)
    device.cast_linear_weights(cast)
    assert cast.lm_head.weight.dtype == torch.bfloat16
    with torch.inference_mode(), device.autocast():
        assert cast(idx)[0].equal(plain(idx)[0])
        ours, theirs = (model.generate(idx, 12, seed=1) for model in (cast, plain))
    assert ours.equal(theirs)


def test_cast_linear_weights_keeps_float32():
    model = random_model()
    Device(torch.device("cpu"), "float32").cast_linear_weights(model)
    assert model.lm_head.weight is model.transformer.wte.weight
