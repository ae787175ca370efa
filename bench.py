"""Benchmark training, relative to the measured limits of this machine.

    $ python bench.py
    $ python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64
    $ python bench.py --profile=True

Needs no data. Measures the limits first: the speed of a large matrix product in the same precision,
and the memory bandwidth. Then times training steps; MFU is relative to the matrix product.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from tqdm import tqdm

from brisk.data.dataset import read_meta
from brisk.data.loader import TokenFile, to_device
from brisk.device import (
    cpu_training_dtype,
    matmul_flops,
    open_device,
    resolve_compile,
)
from brisk.errors import UserError, format_bytes, one_line_errors
from brisk.training.compilation import compile_model
from brisk.training.memory import check_fits, peak_memory
from configurator import PositiveInt, Seed, configure
from model import GPT, GPTConfig


@dataclass(frozen=True)
class BenchConfig(GPTConfig):
    batch_size: PositiveInt | Literal["auto"] = "auto"  # sequences in a step; auto: 12, on a CPU 1
    bias: bool = False  # biases in linear layers and layer norms
    real_data: bool = True  # use data/<dataset> if it is prepared, else random tokens
    dataset: str = "openwebtext"  # data set for real_data
    steps: PositiveInt | Literal["auto"] = "auto"  # timed steps; auto: 20, on a CPU 3
    seed: Seed = 1337  # seed of weights and data
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of the products
    compile: bool | Literal["auto"] = "auto"  # compile the blocks with torch.compile
    profile: bool = False  # write a profiler trace of two steps to bench_log/


def main(config):
    device = open_device(config.device, config.dtype)
    on_cpu = device.type == "cpu"
    batch_size = (1 if on_cpu else 12) if config.batch_size == "auto" else config.batch_size
    steps = (3 if on_cpu else 20) if config.steps == "auto" else config.steps
    torch.manual_seed(config.seed)
    try:
        sizes = GPTConfig.from_settings(config)
    except ValueError as error:
        raise UserError(f"cannot build the model: {error}") from error
    check_fits(sizes)
    model = GPT(sizes)
    if on_cpu and config.dtype == "auto":
        device.dtype_name = cpu_training_dtype(batch_size, config.block_size, config.n_embd)
    print(f"device        {device}, PyTorch {torch.__version__}")

    ceiling = matmul_flops(device, size=2048 if on_cpu else 8192, seconds=1.0)
    print(f"products      {ceiling / 1e12:.3g} TFLOP/s, a large {device.dtype_name} product")
    print(f"memory        {copy_bandwidth(device) / 1e9:.3g} GB/s read and written by a copy")

    model.to(device.device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    scaler = device.scaler()
    if compiling := resolve_compile(config.compile, device):
        compile_model(model, config.batch_size * config.block_size, print)
    sizes = f"{model.get_num_params() / 1e6:.1f}M parameters, {batch_size}x{config.block_size}"
    print(f"model         {sizes} tokens a step, {'compiled' if compiling else 'not compiled'}")
    batches = batch_source(config, batch_size, device)

    def train_step(number):
        batch = batches(number)
        with device.autocast():
            _, loss = model(*batch, return_logits=False)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    warm_up = 2 if on_cpu else 5
    seconds = []
    for number in tqdm(range(warm_up + steps), unit="step", leave=False, disable=None):
        device.synchronize()
        start = time.perf_counter()
        train_step(number)
        device.synchronize()
        seconds.append(time.perf_counter() - start)
    seconds = sorted(seconds[warm_up:])
    step, tokens = median(seconds), batch_size * config.block_size
    spread = f"{seconds[0] * 1000:.4g} to {seconds[-1] * 1000:.4g} over {steps} steps"
    print(f"step          {step * 1000:.4g} ms ({spread})")
    print(f"speed         {tokens / step:,.0f} tokens/s")
    mfu = model.estimate_mfu(batch_size, step, ceiling)
    print(f"MFU           {mfu:.1%} of the measured product")
    if not on_cpu and device.peak_flops()[0] != ceiling:
        peak, name = device.peak_flops()
        print(f"MFU           {model.estimate_mfu(batch_size, step, peak):.1%} of {name}")
    if peak := peak_memory(device):
        print(f"peak memory   {format_bytes(peak)}")
    if config.profile:
        print(f"trace         {write_trace(train_step, device)} (open in ui.perfetto.dev)")


def copy_bandwidth(device):
    """Memory bandwidth in bytes/s, read and written, of copying a tensor larger than any cache."""
    source = torch.ones(2**26 if device.type == "cpu" else 2**29, device=device.device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * source.nbytes / best


def batch_source(config, batch_size, device):
    """Return a function from the step to a batch (x, y) on the device."""
    path = Path(__file__).parent / "data" / config.dataset / "train.bin"
    if config.real_data and path.exists():
        meta = read_meta(path.parent) or {"dtype": "uint16"}
        sizes = (config.block_size, config.vocab_size, meta["dtype"])
        data = TokenFile(path, *sizes, config.seed)
        return lambda number: to_device(data.batch(number * batch_size, batch_size), device)
    shape = (batch_size, config.block_size)
    x, y = (torch.randint(config.vocab_size, shape, device=device.device) for _ in "xy")
    return lambda number: (x, y)


def write_trace(train_step, device):
    """Write a Chrome trace of two training steps. Returns its path."""
    folder = Path("bench_log")
    folder.mkdir(exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(2):
            train_step(number)
        device.synchronize()
    profiler.export_chrome_trace(str(folder / "trace.json"))
    return folder / "trace.json"


if __name__ == "__main__":
    with one_line_errors():
        main(configure(BenchConfig, sys.argv[1:]))
