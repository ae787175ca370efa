"""Training speed and memory of this machine, next to its measured ceilings.

    $ python bench.py
    $ python bench.py config/train_shakespeare_char.py
    $ python bench.py --n_layer=6 --n_head=6 --n_embd=384 --block_size=256 --batch_size=64
    $ torchrun --standalone --nproc_per_node=8 bench.py
    $ python bench.py --profile=True

It times train.py's own steps, one micro-batch each, on prepared data or random ids. The ceilings
are a large matrix product in the precision of training, and a copy of memory.
"""

import sys
import time
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from statistics import median
from typing import Literal

import torch
from tqdm import tqdm

from brisk.data.dataset import load_tokenizer, read_meta
from brisk.data.loader import TokenFile
from brisk.device import matmul_flops
from brisk.distributed.process_group import clean_end
from brisk.errors import format_bytes, one_line_errors
from brisk.training.inputs import vocabulary_rows, without_tokens
from brisk.training.memory import peak_memory
from brisk.training.resume import Start
from brisk.training.run import open_run
from configurator import PositiveInt, Seed, configure
from model import GPTConfig
from train import TrainConfig, throwaway_step


@dataclass(frozen=True)
class BenchConfig(GPTConfig):
    batch_size: PositiveInt | Literal["auto"] = "auto"  # sequences in a step: 12, on a CPU 1
    bias: bool = False  # biases in linear layers and layer norms
    real_data: bool = True  # batches of data/<dataset> if it is prepared, else random ids
    dataset: str = "openwebtext"  # the data set of real_data
    steps: PositiveInt | Literal["auto"] = "auto"  # timed steps: 20, on a CPU 3
    seed: Seed = 1337  # of weights and data
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: Muon for the blocks' matrices
    device: str = "auto"  # cpu, cuda, cuda:1, mps or auto
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # precision of autocast
    compile: bool | Literal["auto"] = "auto"  # torch.compile the model
    parallel: Literal["ddp", "fsdp"] = "ddp"  # under torchrun: replicate the state, or shard it
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    profile: bool = False  # write a trace of two steps to bench_log/

    given: tuple = field(default=(), compare=False)  # names of the keys that were set, in order


class RandomTokens:
    """Random ids, in place of a `TokenFile`."""

    rows, tokens = 0, ()

    def __init__(self, batch_size, block_size, vocab_size):
        generator = torch.Generator().manual_seed(0)
        shape = (2, batch_size, block_size)
        self.ids = torch.randint(vocab_size, shape, generator=generator)

    def batch(self, position, count):
        return tuple(self.ids)

    def targets(self, position, count):
        return count * self.ids.size(2)


def main(config):
    values = {
        f.name: getattr(config, f.name) for f in fields(TrainConfig) if hasattr(config, f.name)
    }
    one_step = {"gradient_accumulation_steps": 1, "eval_only": True, "out_dir": "bench_log"}
    settings = TrainConfig(**{**values, **one_step, "batch_size": 1})
    with open_run(settings) as run:  # eval_only: it locks no folder and writes no file
        on_cpu, ranks = run.device.type == "cpu", run.ranks
        batch_size = (1 if on_cpu else 12) if config.batch_size == "auto" else config.batch_size
        steps = (3 if on_cpu else 20) if config.steps == "auto" else config.steps
        global_batch = batch_size * ranks.world_size
        sizes = {"batch_size": batch_size, "gradient_accumulation_steps": ranks.world_size}
        settings = replace(settings, **sizes)
        settings, source, tokens = open_tokens(settings, config.real_data)
        data = replace(without_tokens(settings, Start()), train=tokens)
        plan, state, train_step = throwaway_step(settings, Start(), run, data)
        device = plan.device
        run.say(f"device        {device}, PyTorch {torch.__version__}")
        run.say(f"data          {source}")
        count = f"{state.model.get_num_params() / 1e6:.1f}M parameters"
        if config.ngrams > 1:
            rows = state.model.transformer.ngrams.weight.numel()
            count += f" and {rows / 1e6:.1f}M of n-grams"
        shape = f"{global_batch}x{config.block_size} tokens a step"
        run.say(f"model         {count}, {shape}, {'' if plan.compile else 'not '}compiled")
        seconds = time_steps(train_step, device, warm_up=2 if on_cpu else 5, steps=steps)
        peak = peak_memory(device)  # before the ceilings, whose tensors are larger than most models
        step = median(seconds)
        spread = f"{seconds[0] * 1000:.4g} to {seconds[-1] * 1000:.4g} over {steps} steps"
        run.say(f"step          {step * 1000:.4g} ms ({spread})")
        run.say(f"speed         {global_batch * config.block_size / step:,.0f} tokens/s")
        if peak:
            run.say(f"peak memory   {format_bytes(peak)}")
        report_ceilings(state.model, batch_size, step, device, run.say)
        if config.profile:
            path = write_trace(train_step, device, ranks.rank)
            run.say(f"trace         {path} (open in ui.perfetto.dev)")


def open_tokens(settings, real_data):
    """(settings, source, tokens): prepared training tokens, with their vocabulary unless one was
    given, if there are any and `real_data` asks for them; else random ids."""
    folder = Path(__file__).parent / "data" / settings.dataset
    if not (real_data and (folder / "train.bin").exists()):
        tokens = RandomTokens(settings.batch_size, settings.block_size, settings.vocab_size)
        return settings, f"random ids, a vocabulary of {settings.vocab_size}", tokens
    meta = read_meta(folder) or {"dtype": "uint16"}
    if "vocab_size" not in settings.given:
        settings = replace(settings, vocab_size=vocabulary_rows(load_tokenizer(folder)))
    sizes = (settings.block_size, settings.vocab_size, meta["dtype"])
    tokens = TokenFile(folder / "train.bin", *sizes, settings.seed)
    return settings, f"{folder.name}, a vocabulary of {settings.vocab_size}", tokens


def time_steps(train_step, device, warm_up, steps):
    """Sorted seconds of `steps` training steps, after `warm_up` others."""
    seconds = []
    for _ in tqdm(range(warm_up + steps), unit="step", leave=False, disable=None):
        t0 = time.perf_counter()
        train_step()
        device.synchronize()
        seconds.append(time.perf_counter() - t0)
    return sorted(seconds[warm_up:])


def report_ceilings(model, batch_size, step, device, say):
    """Print the speed of a matrix product and of a copy, and the MFU of `step` seconds for
    `batch_size` sequences on one device."""
    on_cpu = device.type == "cpu"
    ceiling = matmul_flops(device, size=2048 if on_cpu else 8192, seconds=1.0)
    say(f"products      {ceiling / 1e12:.3g} TFLOP/s, a large {device.dtype_name} product")
    say(f"copy          {copy_bandwidth(device) / 1e9:.3g} GB/s read and written by a copy")
    say(f"MFU           {model.estimate_mfu(batch_size, step, ceiling):.1%} of the product")
    if not on_cpu:
        peak, name = device.peak_flops()
        say(f"MFU           {model.estimate_mfu(batch_size, step, peak):.1%} of {name}")


def copy_bandwidth(device):
    """Bytes a second that a copy of a tensor much larger than any cache reads and writes."""
    source = torch.ones(2**26 if device.type == "cpu" else 2**29, device=device.device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(5):
        device.synchronize()
        t0 = time.perf_counter()
        target.copy_(source)
        device.synchronize()
        best = min(best, time.perf_counter() - t0)
    return 2 * source.nbytes / best


def write_trace(train_step, device, rank):
    """Write a Chrome trace of two training steps. Returns its path."""
    path = Path("bench_log", f"trace-{rank}.json" if rank else "trace.json")
    path.parent.mkdir(exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(2):
            train_step()
        device.synchronize()
    profiler.export_chrome_trace(str(path))
    return path


if __name__ == "__main__":
    with clean_end(), one_line_errors():
        main(configure(BenchConfig, sys.argv[1:]))
