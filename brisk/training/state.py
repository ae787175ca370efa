"""The training state, saved and loaded in nanoGPT's checkpoint format."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from brisk.distributed.parallelize import load_weights
from brisk.training.optim import load_optimizer, load_scaler


@dataclass
class TrainState:
    """Everything that a training step changes. Optimizer, scaler and spikes are set after the model
    has moved to its device."""

    model: nn.Module
    step: int = 0
    position: int = 0  # windows or documents of the training data consumed
    best_val_loss: float = math.inf
    evals_since_best: int = 0
    ddp_model: nn.Module | None = None  # `model`, or DDP around it
    optimizer: Any = None
    scaler: Any = None  # gradient scaler, enabled for float16 only
    spikes: Any = None  # a `SpikeWatch`
    graphs: Any = None  # `StepGraphs`, or None to launch kernels one by one

    def state_dict(self):
        """The entries of a checkpoint that a step changes."""
        return {
            "model": self.model.state_dict(keep_vars=True),  # keeps tied weights one tensor
            "optimizer": self.optimizer.state_dict(),
            "iter_num": self.step,
            "best_val_loss": self.best_val_loss,
            "evals_since_best": self.evals_since_best,
            "position": self.position,
            "scaler": self.scaler.state_dict(),
            "grad_norms": self.spikes.norms,
        }

    def load_state_dict(self, checkpoint):
        """Load everything except weights and position from a checkpoint."""
        load_optimizer(self.optimizer, checkpoint["optimizer"])
        if self.scaler.is_enabled() and checkpoint.get("scaler"):
            load_scaler(self.scaler, checkpoint["scaler"])
        self.spikes.load(checkpoint.get("grad_norms"))
        self.step = checkpoint["iter_num"]
        self.best_val_loss = float(checkpoint["best_val_loss"])
        self.evals_since_best = checkpoint.get("evals_since_best", 0)

    def rewind(self, checkpoint, ranks):
        """Return to a checkpoint of this run, except for the position: training continues with new
        batches."""
        load_weights(self.model, checkpoint["model"], ranks)
        self.load_state_dict(checkpoint)
        if self.graphs:
            self.graphs.reset()


def checkpoint_header(config, plan, state, data):
    """The entries of a checkpoint that do not change during a run."""
    settings = asdict(config)
    return {
        "model_args": state.model.config.to_args(),
        "given": settings.pop("given"),
        "config": settings,
        "resolved": plan.resolved,
        "data": data.identity,
        "tokenizer": data.tokenizer_dict,
    }
