"""Run train.py up to its loop, so that benchmarks measure the real training step."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402 (found by the line above)
from brisk.training.inputs import open_data  # noqa: E402
from brisk.training.resume import load_start, resolve  # noqa: E402
from brisk.training.run import open_run  # noqa: E402
from configurator import configure  # noqa: E402


@dataclass
class Trainer:
    """A run that is ready for its first step. `step()` trains it by one step at the peak learning
    rate and returns loss and gradient norm, tensors () on the device."""

    config: Any
    data: Any
    run: Any
    plan: Any
    state: Any
    step: Any

    @property
    def device(self):
        return self.plan.device

    @property
    def tokens(self):
        """Tokens in a step, over all processes."""
        return self.plan.global_batch * self.config.block_size


@contextmanager
def open_trainer(argv):
    """The `Trainer` of a command line of train.py. It writes no files."""
    given = configure(train.TrainConfig, argv)
    with open_run(given) as run:
        start = load_start(given, run.ranks)
        config = resolve(given, start, train.SHAPE_KEYS, run.log)
        data = open_data(config, start, run)
        yield Trainer(config, data, run, *train.throwaway_step(config, start, run, data))
