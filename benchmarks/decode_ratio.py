"""Compare a decode step of model.py and of brisk/cpu/decode.py, on one CPU thread.

    $ python benchmarks/decode_ratio.py
    $ python benchmarks/decode_ratio.py --rounds=5 --models=gpt2 --rows=1

Prints a line for each model and number of rows: the least CPU time of each, and the ratio network /
decoder (median, lowest and highest of the rounds). Both run in every round, in alternating order,
at position 64. CPU time excludes other processes.
"""

import platform
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.cpu.decode import Decoder
from brisk.errors import UserError, did_you_mean, one_line_errors
from brisk.generation.kv_cache import KVCache, decode_step
from configurator import PositiveInt, configure
from model import GPT, GPTConfig

MODERN = dict(position="rotary", norm="rms", qk_norm=True, mlp="swiglu", bias=False)
CHARS = dict(vocab_size=65, block_size=256, bias=False)
MODELS = {
    "4x128": dict(n_layer=4, n_head=4, n_embd=128, **CHARS),
    "6x384": dict(n_layer=6, n_head=6, n_embd=384, **CHARS),
    "6x384-modern": dict(n_layer=6, n_head=6, n_embd=384, **{**CHARS, **MODERN}),
    "gpt2": dict(),
}
POSITION = 64


@dataclass(frozen=True)
class DecodeRatioConfig:
    models: str = ",".join(MODELS)  # models to measure
    rows: str = "1,8,64"  # batch sizes
    rounds: PositiveInt = 15  # each side runs once in a round
    steps: PositiveInt = 20  # maximum steps in a round; fewer if a step takes more than 50 ms


def seconds_per_step(model, rows, steps, decoder):
    cache, ids = KVCache(model, rows, POSITION + steps + 1), torch.zeros(rows, 1, dtype=torch.long)
    cache.lengths += POSITION
    decode_step(model, ids, cache, decoder=decoder)
    start = time.thread_time()
    for _ in range(steps):
        decode_step(model, ids, cache, decoder=decoder)
    return (time.thread_time() - start) / steps


@torch.inference_mode()
def compare(model, rows, rounds, steps):
    """Return the seconds per step of each round: a list for the network, one for the decoder."""
    decoder = Decoder.of(model)
    steps = max(1, min(steps, int(0.05 * steps / seconds_per_step(model, rows, 1, None))))
    seconds = {None: [], decoder: []}
    for i in range(rounds):
        for side in (list(seconds), [*seconds][::-1])[i % 2]:
            seconds[side].append(seconds_per_step(model, rows, steps, side))
    return list(seconds.values())


def cpu_name():
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def main(config):
    torch.set_num_threads(1)
    print(f"{cpu_name()}, one thread, PyTorch {torch.__version__}")
    print(f"{'model':<14}{'rows':>5}{'network':>12}{'decoder':>12}   ratio (lowest to highest)")
    for name in config.models.split(","):
        if name not in MODELS:
            raise UserError(
                f"models={name} is not one of {', '.join(MODELS)}{did_you_mean(name, MODELS)}"
            )
        torch.manual_seed(0)
        model = GPT(GPTConfig(**MODELS[name])).eval()
        for rows in map(int, config.rows.split(",")):
            network, decoder = compare(model, rows, config.rounds, config.steps)
            ratios = [n / d for n, d in zip(network, decoder, strict=True)]
            times = "".join(f"{min(side) * 1e3:9.2f} ms" for side in (network, decoder))
            ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            print(f"{name:<14}{rows:>5}{times}   {ratio}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main(configure(DecodeRatioConfig, sys.argv[1:]))
