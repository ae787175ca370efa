"""Steps that would spoil a run: a loss or a gradient that is no number, or a gradient too long.

The host reads a step's numbers where it waits for the device anyway; a step that is to be left out
is so on the device.
"""

import math
from dataclasses import dataclass

import torch

HISTORY = 128  # norms of the gradient, the newest, whose median is the usual one
ENOUGH = 32  # of them, before there is a usual one
PATIENCE = 20  # steps skipped in a row, or ways back in one start of a run, before it gives up


@dataclass
class Spike:
    """A step whose numbers are odd, and where its batch begins in the data."""

    step: int
    position: int  # of the batch's first window
    loss: float
    grad_norm: float
    times: float  # the median of the norms before that is

    def __str__(self):
        if not math.isfinite(self.loss):
            what = f"the loss is {self.loss}"
        elif not math.isfinite(self.grad_norm):
            what = f"the norm of the gradient is {self.grad_norm}"
        else:
            times = f"{self.times:.3g} times the usual"
            what = f"the norm of the gradient is {self.grad_norm:.4g}, {times}"
        return f"step {self.step}: {what} (its batch is at position {self.position:,} of the data)"


class SpikeWatch:
    """Looks at the loss and the norm of the gradient of every step.

    A step is a spike if one of them is not finite, or, with a `factor`, if the norm is more than
    `factor` times the median of the last `HISTORY` finite ones. Norms that were too long are in
    that history like any other: the median does not feel a few of them, and where most are long,
    that is what is usual now.

    `on_spike` says what becomes of one. "stop": the run ends. "skip": the step is not taken; after
    `PATIENCE` in a row the run ends. "rewind": back to the last checkpoint and on with the batches
    after the spike's, as PaLM was trained (Chowdhery et al. 2022, section 5.1); after `PATIENCE`
    ways back the run ends. "ignore": nothing is looked at.

    With a gradient scaler at work (`scaled`) gradients that are not finite are no spikes: the
    scaler leaves those steps out and tries a smaller scale.
    """

    def __init__(self, device, on_spike="stop", factor=0.0, scaled=False):
        self.on_spike, self.factor, self.scaled = on_spike, factor, scaled
        self.norms = torch.full((HISTORY,), float("nan"), device=device) if factor else None
        self.no_limit = torch.full((), float("inf"), device=device)
        self.unread = []  # (step, position, (loss, norm, largest norm that is none))
        self.in_a_row = 0  # spikes, up to the last step that was read
        self.ways_back = 0

    @torch.no_grad()
    def record(self, step, position, loss, grad_norm):
        """Take down a step's `loss` and `grad_norm`, tensors () on the device.

        Returns, for "skip" only, a tensor (): 1 where the step is not to be taken, else 0.
        """
        if self.on_spike == "ignore":
            return None
        limit = self.no_limit
        if self.factor:
            enough = self.norms.isfinite().sum() >= ENOUGH
            limit = torch.where(enough, self.factor * median(self.norms), self.no_limit)
            finite = torch.where(grad_norm.isfinite(), grad_norm, float("nan"))
            self.norms = torch.cat((self.norms[1:], finite[None]))
        self.unread.append((step, position, (loss, grad_norm, limit)))
        if self.on_spike == "skip":
            return (~torch.isfinite(loss + grad_norm) | (grad_norm > limit)).float()

    def poll(self):
        """The spikes among the steps since the last reading, which waits for the device."""
        if not self.unread:
            return []
        numbers = iter(torch.stack([n for *_, three in self.unread for n in three]).tolist())
        spikes = []
        for step, position, _ in self.unread:
            loss, grad_norm, limit = next(numbers), next(numbers), next(numbers)
            finite = math.isfinite(loss) and (self.scaled or math.isfinite(grad_norm))
            too_long = math.isfinite(grad_norm) and grad_norm > limit
            if finite and not too_long:
                self.in_a_row = 0
                continue
            self.in_a_row += 1
            times = self.factor * grad_norm / limit if limit else math.inf
            spikes.append(Spike(step, position, loss, grad_norm, times))
        self.unread = []
        return spikes

    def load(self, norms):
        """Go on with the `norms` of a checkpoint, where it has any."""
        if self.factor and norms is not None:
            self.norms = norms.to(self.no_limit.device)

    def respond(self, saver, ranks, log):
        """Handle the spikes among the steps since the last poll, which waits for the device.

        Returns None to train on, a `Path` to rewind to that checkpoint, or, as a str, why the run
        has to end.
        """
        spikes = self.poll()
        for spike in spikes:
            log.say(str(spike) + (", left out" if self.on_spike == "skip" else ""))
        if not spikes or (self.on_spike == "skip" and self.in_a_row < PATIENCE):
            return None
        path = ranks.broadcast(saver.newest() if ranks.is_main else None)
        self.ways_back += 1
        if path and self.on_spike == "rewind" and self.ways_back <= PATIENCE:
            log.say(f"back to {path}, and on with other batches")
            return path
        return last_words(spikes[-1], path)


def median(norms):
    """`norms.nanmedian()`, which waits for a GPU to count the numbers: a tensor ()."""
    middle = (norms.isfinite().sum() - 1).clamp(min=0) // 2
    return norms.sort().values.gather(0, middle[None])[0]  # those that are NaN come last


def last_words(spike, path):
    """Why a run ends at a `spike`, and what there is to go on from: `path`, or None."""
    if path is None:
        return f"{spike}; nothing is saved yet: try a lower --learning_rate, or --on_spike=skip"
    mend = "--init_from=resume --on_spike=skip goes on from it without such steps"
    return f"{spike}; {path} is the last good checkpoint: {mend}"
