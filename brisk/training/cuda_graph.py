"""A training step as two CUDA graphs: forward and backward pass of a micro-batch, and the update.

The first `WARM_UP` calls of each run uncaptured. They are normal steps, so no state has to be
restored. Gradients are zeroed in place rather than freed, learning rates are read from the device,
and random numbers follow from the generator's seed at each replay.
"""

from functools import partial

import torch

from brisk.cuda_graph import CapturedFunction, GraphPool, check_device
from brisk.errors import UserError


def check_cuda_graph(config, device, ranks):
    """Raise `UserError` if the steps of a run cannot be CUDA graphs."""
    check_device(device)
    if not ranks.is_alone:
        reason = "supports a single process; start it without torchrun"
    elif device.dtype_name == "float16":
        reason = "does not support the gradient scaler of --dtype=float16"
    elif config.activation_checkpointing and config.dropout:
        reason = "does not support --activation_checkpointing with dropout"  # saves random states
    else:
        return
    raise UserError(f"--cuda_graph {reason}")


class StepGraphs:
    """CUDA graphs of the two functions of a training step.

    Args:
        optimizer: its parameter groups, and so its checkpoints, do not change.
        device: a `Device`.
    """

    def __init__(self, optimizer, device):
        self.optimizer, self.device = optimizer, device.device
        self.rates = [torch.zeros((), device=self.device) for _ in optimizer.param_groups]
        self.reset()

    def reset(self):
        """Capture again, after the optimizer has loaded a state, which replaces its tensors."""
        pool = GraphPool(self.device)
        self.micro_batch, self.update = CapturedFunction(pool), CapturedFunction(pool)

    def of(self, forward_backward, update):
        """Return the two functions as CUDA graphs.

        Args:
            forward_backward: (x, y, weight) → loss. Adds to the gradients of the parameters.
            update: (loss,) → a tuple of tensors. Makes an optimizer step and zeroes the gradients.
        """
        return partial(self.micro_batch, forward_backward), partial(self.call_update, update)

    def call_update(self, update, loss):
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        return self.update(partial(self.with_device_rates, update), loss)

    def with_device_rates(self, update, loss):
        """`update(loss)`, in which the optimizer reads its learning rates from the device."""
        groups = self.optimizer.param_groups
        given = [{**group} for group in groups]
        # PyTorch requires the flag in a capture and warns about it elsewhere.
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        for rate, group in zip(self.rates, groups, strict=True):
            group.update(lr=rate, capturable=capturing)
        try:
            return update(loss)
        finally:
            for group, before in zip(groups, given, strict=True):
                group.clear()
                group.update(before)
