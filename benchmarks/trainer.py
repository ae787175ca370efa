"""Run train.py up to its loop, so that benchmarks measure the real training step."""

import sys
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402 (found by the line above)
from brisk.reporting.forecast import Forecast  # noqa: E402
from brisk.training.inputs import open_data  # noqa: E402
from brisk.training.plan import make_plan  # noqa: E402
from brisk.training.resume import load_start, resolve  # noqa: E402
from brisk.training.run import open_run  # noqa: E402
from configurator import configure  # noqa: E402


@dataclass
class Trainer:
    """A run before its first step."""

    config: Any
    plan: Any
    state: Any
    data: Any
    run: Any
    forecast: Forecast

    @property
    def device(self):
        return self.plan.device

    @property
    def tokens(self):
        """Tokens in a step, over all ranks."""
        return self.plan.global_batch * self.config.block_size

    def step(self):
        """Do one training step at the maximum learning rate. Returns loss and gradient norm, scalar
        tensors on the device."""
        parts = (self.config, self.plan, self.state, self.data, self.run, self.forecast)
        return train.train_step(*parts)


@contextmanager
def open_trainer(argv):
    """A context with the `Trainer` for arguments of train.py. It leaves no files."""
    given = configure(train.TrainConfig, argv)
    with open_run(given) as run:
        start = load_start(given, run.ranks)
        config = resolve(given, start, train.SHAPE_KEYS, run.log)
        data = open_data(config, start, run)
        state = train.initial_state(config, start, data, run)
        plan = make_plan(config, start, state, data, run)
        train.parallelize(state, config, plan, run)
        forecast = Forecast.of(config, plan, run)
        forecast.reported.add("micro-batch")  # until reported, it synchronizes every micro-batch
        yield Trainer(config, plan, state, data, run, forecast)
