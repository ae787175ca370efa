"""Estimate training on GPUs from their datasheets: nothing here is measured.

    $ python benchmarks/estimate.py
    $ python benchmarks/estimate.py --mfu=0.5 --recipe=config/model/gpt2_xl.py

Tokens per second are `mfu` times the datasheet's dense 16-bit peak, by the model's FLOPs per token
(PaLM, appendix B). Memory is `expected_memory` of a step, of AdamW in bfloat16.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from brisk.device import DATASHEET_PEAKS, Device  # noqa: E402 (found by the line above)
from brisk.errors import format_bytes, one_line_errors  # noqa: E402
from brisk.reporting.forecast import duration  # noqa: E402
from brisk.training.memory import expected_memory  # noqa: E402
from configurator import PositiveInt, UnitFloat, configure  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from train import TrainConfig  # noqa: E402


@dataclass(frozen=True)
class EstimateConfig:
    recipe: str = "config/train_gpt2.py"  # a config file of train.py
    mfu: UnitFloat = 0.4  # assumed model FLOPs utilization
    batch_size: PositiveInt = 12  # sequences in a micro-batch, for the memory
    tokens: PositiveInt = 10**9  # to train on


def main(config):
    settings = configure(TrainConfig, [config.recipe])
    model = GPT.uninitialized(GPTConfig.from_settings(settings, vocab_size=50304))
    device = Device(torch.device("cpu"), "bfloat16")
    memory = format_bytes(expected_memory(model, config.batch_size, device))
    shape = f"{config.batch_size} x {settings.block_size} tokens"
    parameters = f"{model.get_num_params() / 1e6:.0f}M parameters"
    print(f"{config.recipe}: {parameters}, {memory} for {shape}, all estimated\n")
    speed = f"tokens/s at {config.mfu:.0%} MFU"
    print(f"| GPU | datasheet TFLOP/s | {speed} | time for {config.tokens:,} tokens |")
    print("| --- | ---: | ---: | ---: |")
    for name, peak in DATASHEET_PEAKS.items():
        rate = config.mfu * peak / model.flops_per_token()
        print(f"| {name} | {peak / 1e12:.0f} | {rate:,.0f} | {duration(config.tokens / rate)} |")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(EstimateConfig, sys.argv[1:]))
