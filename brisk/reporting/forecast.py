"""Estimate the duration of a run from its first steps."""

import math
import time

from brisk.cuda_graph import WARM_UP


class Forecast:
    """Prints an estimate of the duration of a run as early as possible.

    The first timing of a kind is too slow (kernel selection, memory allocation), so the estimate is
    printed after the third, or at once if a single one exceeds `PATIENCE` seconds. In a compiled
    run the first timing includes compilation and is ignored, and so are those before a CUDA graph.
    """

    PATIENCE = 10.0

    def __init__(
        self,
        say,
        device,
        steps,
        micro_batches,
        evaluations,
        eval_batches,
        compiled=False,
        captured=False,
    ):
        """The run has `steps` steps of `micro_batches` each, and `evaluations` evaluations of
        `eval_batches` each. Micro-batches are `captured` as CUDA graphs, or not."""
        self.say, self.device, self.steps, self.micro_batches = say, device, steps, micro_batches
        self.eval_batches, self.all_eval_batches = eval_batches, evaluations * eval_batches
        self.timings = {"evaluation": [], "micro-batch": []}
        # timings of each kind to ignore; the call after a warm-up captures
        self.ignored = dict.fromkeys(self.timings, int(compiled))
        self.ignored["micro-batch"] = WARM_UP + 1 if captured else int(compiled)
        self.reported, self.micro_batch_began = set(), None

    @classmethod
    def of(cls, config, plan, run):
        """A forecast of the remaining steps and evaluations of a run."""
        steps = 0 if config.eval_only else plan.last_step + 1 - plan.first_step
        evaluations = 1 if config.eval_only else steps // config.eval_interval + 2
        batches = math.ceil(2 * config.eval_iters / run.ranks.world_size)
        per_step = len(plan.micro_batches)
        sizes = (steps, per_step, evaluations, batches)
        return cls(run.say, plan.device, *sizes, plan.compile, config.cuda_graph)

    @classmethod
    def off(cls, plan):
        """A forecast that times and prints nothing."""
        forecast = cls(lambda line: None, plan.device, 0, 1, 0, 0)
        forecast.reported.add("micro-batch")
        return forecast

    @property
    def is_complete(self):
        """Whether everything is reported. Timing, which waits for the device, then stops."""
        done = self.reported
        return "micro-batch" in done or ("evaluation" in done and not self.steps)

    def timed(self, kind, items):
        """Iterate over `items` and time each iteration while needed. `kind` is "evaluation", for
        batches of an evaluation, or "micro-batch". A micro-batch lasts until the next one starts,
        so the last of a step includes the optimizer."""
        for item in items:
            if self.is_complete:
                yield item
                continue
            self.device.synchronize()
            now = time.perf_counter()
            if kind == "micro-batch" and self.micro_batch_began is not None:
                self.add_timing(kind, now - self.micro_batch_began)
            self.micro_batch_began = now if kind == "micro-batch" else None
            yield item
            if kind == "evaluation":
                self.device.synchronize()
                self.add_timing(kind, time.perf_counter() - now)

    def add_timing(self, kind, seconds):
        """Add a timing, and print the estimate when there are enough."""
        if self.ignored[kind]:
            self.ignored[kind] -= 1
            return
        if not self._ready(kind, seconds):
            return
        one = min(self.timings[kind])
        if kind == "micro-batch":
            total, n = self._total(one), self.micro_batches
            text = f"a step takes about {duration(n * one)}, the run about {duration(total)}"
            self.say(text + self._hint(total))
            return
        text = f"an evaluation takes about {duration(self.eval_batches * one)}"
        if self.steps:  # a backward pass costs about two forward passes
            total = self._total(3 * one)
            text += f", the run roughly {duration(total)}{self._hint(total)}"
        self.say(text)

    def _hint(self, total):
        n = self.micro_batches
        if n < 8 or total < 3600:
            return ""
        faster = f"--gradient_accumulation_steps=1 makes it {n} times shorter"
        return f" (a step is {n} micro-batches: {faster})"

    def _evaluation(self):
        return min(self.timings["evaluation"], default=0.0)

    def _total(self, micro_batch):
        training = self.steps * self.micro_batches * micro_batch
        return training + self.all_eval_batches * self._evaluation()

    def _ready(self, kind, seconds):
        timings = self.timings[kind]
        timings.append(seconds)
        if kind in self.reported or (len(timings) < 3 and seconds < self.PATIENCE):
            return False
        self.reported.add(kind)
        return True


def duration(seconds):
    """Format `seconds` with a suitable unit."""
    if seconds < 1:
        return f"{max(1, seconds * 1000):.0f} ms"
    for unit, length, limit in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"
