"""Non-finite losses and gradient-norm spikes.

The host reads loss and norm of a step when it waits for the device anyway. Skipping a step happens
on the device.
"""

import math
from dataclasses import dataclass

import torch

HISTORY = 128  # recent gradient norms, for the median
MIN_HISTORY = 32  # norms before the median is used
PATIENCE = 20  # skipped steps in a row, or rewinds since the start, before the run ends


@dataclass
class Spike:
    """A step with a non-finite loss or norm, or with a norm far above the median."""

    step: int
    position: int  # of its batch in the training data
    loss: float
    grad_norm: float
    times: float  # grad_norm / the median of recent norms

    def __str__(self):
        if not math.isfinite(self.loss):
            reason = f"the loss is {self.loss}"
        elif not math.isfinite(self.grad_norm):
            reason = f"the gradient norm is {self.grad_norm}"
        else:
            times = f"{self.times:.3g} times the median"
            reason = f"the gradient norm is {self.grad_norm:.4g}, {times}"
        return f"step {self.step}: {reason} (batch at position {self.position:,} of the data)"


class SpikeWatch:
    """Monitors loss and gradient norm of every step.

    A step is a spike if one of them is not finite or, with a `factor`, if the norm exceeds `factor`
    times the median of the last `HISTORY` finite norms. Norms of spikes are part of the history: a
    few do not move the median, and if most are large, that is the new normal.

    `on_spike` is one of
        "stop": end the run.
        "skip": skip the step; end the run after `PATIENCE` spikes in a row.
        "rewind": return to the newest checkpoint and continue with the batches after the spike, as
            in PaLM (Chowdhery et al. 2022, section 5.1); end the run after `PATIENCE` rewinds.
        "ignore": do nothing.

    With a gradient scaler (`scaled`), non-finite gradients are not spikes: the scaler skips those
    steps and lowers its scale.
    """

    def __init__(self, device, on_spike="stop", factor=0.0, scaled=False):
        self.on_spike, self.factor, self.scaled = on_spike, factor, scaled
        self.norms = torch.full((HISTORY,), float("nan"), device=device) if factor else None
        self.no_limit = torch.full((), float("inf"), device=device)
        self.unread = []  # (step, position, (loss, norm, limit of the norm))
        self.consecutive = 0  # spikes up to the newest step polled
        self.rewinds = 0

    @torch.no_grad()
    def check(self, loss, grad_norm):
        """Compare `loss` and `grad_norm` of a step, tensors () on the device, with the history.

        Returns (limit, is_spike): the norm above which a step is a spike, a tensor (); and, for
        "skip", a tensor (): 1 if the step must be skipped, else 0. Otherwise None.
        """
        limit = self.no_limit
        if self.factor and self.on_spike != "ignore":
            enough = self.norms.isfinite().sum() >= MIN_HISTORY
            limit = torch.where(enough, self.factor * median(self.norms), self.no_limit)
            finite = torch.where(grad_norm.isfinite(), grad_norm, float("nan"))
            # in place: a CUDA graph has the address of `norms`
            self.norms.copy_(torch.cat((self.norms[1:], finite[None])))
        if self.on_spike != "skip":
            return limit, None
        return limit, (~torch.isfinite(loss + grad_norm) | (grad_norm > limit)).float()

    def record(self, step, position, loss, grad_norm, limit):
        """Record a step for `poll`, with the `limit` of its norm from `check`."""
        if self.on_spike != "ignore":
            self.unread.append((step, position, (loss, grad_norm, limit)))

    def poll(self):
        """Return the spikes among the steps since the last call. Waits for the device."""
        if not self.unread:
            return []
        numbers = iter(torch.stack([n for *_, three in self.unread for n in three]).tolist())
        spikes = []
        for step, position, _ in self.unread:
            loss, grad_norm, limit = next(numbers), next(numbers), next(numbers)
            finite = math.isfinite(loss) and (self.scaled or math.isfinite(grad_norm))
            too_large = math.isfinite(grad_norm) and grad_norm > limit
            if finite and not too_large:
                self.consecutive = 0
                continue
            self.consecutive += 1
            times = self.factor * grad_norm / limit if limit else math.inf
            spikes.append(Spike(step, position, loss, grad_norm, times))
        self.unread = []
        return spikes

    def load(self, norms):
        """Load the `norms` of a checkpoint, or None."""
        if self.factor and norms is not None:
            self.norms = norms.to(self.no_limit.device, copy=True)  # `check` changes it

    def respond(self, saver, ranks, log):
        """Respond to the spikes since the last call. Waits for the device.

        Returns None to continue, the `Path` of a checkpoint to rewind to, or a str, the reason why
        the run must end.
        """
        spikes = self.poll()
        for spike in spikes:
            log.say(str(spike) + (", skipped" if self.on_spike == "skip" else ""))
        if not spikes or (self.on_spike == "skip" and self.consecutive < PATIENCE):
            return None
        path = ranks.broadcast(saver.newest() if ranks.is_main else None)
        self.rewinds += 1
        if path and self.on_spike == "rewind" and self.rewinds <= PATIENCE:
            log.say(f"rewinding to {path}, continuing with new batches")
            return path
        return end_reason(spikes[-1], path)


def median(norms):
    """`norms.nanmedian()`, a tensor (), without its synchronization with the GPU."""
    middle = (norms.isfinite().sum() - 1).clamp(min=0) // 2
    return norms.sort().values.gather(0, middle[None])[0]  # NaN is sorted to the end


def end_reason(spike, path):
    """Why a run ends at a `spike`, and how to continue from the checkpoint `path` or None."""
    if path is None:
        return f"{spike}; nothing is saved yet: try a lower --learning_rate, or --on_spike=skip"
    hint = "--init_from=resume --on_spike=skip continues from it and skips such steps"
    return f"{spike}; {path} is the last good checkpoint: {hint}"
