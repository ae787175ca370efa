"""How long a run will take, from the first timings of its steps."""

import math
import time


class Forecast:
    """Says how long a run will take, as soon as a few timings allow it and before the waiting.

    The first timing of a kind is slow (kernels are chosen, memory is touched), so it speaks after
    the third, or at once where one alone takes longer than `PATIENCE` seconds. In a compiled run
    the first of a kind is the compilation, and does not count.
    """

    PATIENCE = 10.0

    def __init__(
        self, say, device, steps, micro_batches, evaluations, eval_batches, compiled=False
    ):
        """`steps` of `micro_batches` each and `evaluations` of `eval_batches` are to come."""
        self.say, self.device, self.steps, self.micro_batches = say, device, steps, micro_batches
        self.eval_batches, self.all_eval_batches = eval_batches, evaluations * eval_batches
        self.timings = {"evaluation": [], "micro-batch": []}
        self.compiling = set(self.timings if compiled else ())  # whose first timing is to come
        self.told = set()

    @classmethod
    def of(cls, config, plan, run):
        """Of the steps and evaluations that are to come in a run."""
        steps = 0 if config.eval_only else plan.last_step + 1 - plan.first_step
        evaluations = 1 if config.eval_only else steps // config.eval_interval + 2
        batches = math.ceil(2 * config.eval_iters / run.ranks.world_size)
        per_step = len(plan.micro_batches)
        return cls(run.say, plan.device, steps, per_step, evaluations, batches, plan.compile)

    @property
    def is_complete(self):
        """Whether all is said, so that nobody need wait for the device to take a timing."""
        return "micro-batch" in self.told or ("evaluation" in self.told and not self.steps)

    def timed(self, kind, items):
        """Iterate over `items`, and take the time of each pass through the loop while it is
        needed: of a batch of an "evaluation", or of a "micro-batch" in training."""
        for item in items:
            if self.is_complete:
                yield item
                continue
            began = time.perf_counter()
            yield item
            self.device.synchronize()
            self.took(kind, time.perf_counter() - began)

    def took(self, kind, seconds):
        """Take a timing, and say what follows from it once there are enough."""
        if kind in self.compiling:
            self.compiling.remove(kind)
            return
        if not self._ready(kind, seconds):
            return
        one = min(self.timings[kind])
        if kind == "micro-batch":
            whole, number = self._whole_run(one), self.micro_batches
            text = f"a step takes about {duration(number * one)}, the whole run {duration(whole)}"
            self.say(text + self._hint(whole))
            return
        text = f"an evaluation takes about {duration(self.eval_batches * one)}"
        if self.steps:  # a backward pass costs about two forward passes
            whole = self._whole_run(3 * one)
            text += f", the whole run at a first guess {duration(whole)}{self._hint(whole)}"
        self.say(text)

    def _hint(self, whole):
        number = self.micro_batches
        if number < 8 or whole < 3600:
            return ""
        less = f"--gradient_accumulation_steps=1 makes it {number} times shorter"
        return f" (a step is {number} micro-batches: {less})"

    def _evaluation(self):
        return min(self.timings["evaluation"], default=0.0)

    def _whole_run(self, micro_batch):
        training = self.steps * self.micro_batches * micro_batch
        return training + self.all_eval_batches * self._evaluation()

    def _ready(self, kind, seconds):
        timings = self.timings[kind]
        timings.append(seconds)
        if kind in self.told or (len(timings) < 3 and seconds < self.PATIENCE):
            return False
        self.told.add(kind)
        return True


def duration(seconds):
    """`seconds` in the unit a person would use."""
    if seconds < 1:
        return f"{max(1, seconds * 1000):.0f} ms"
    for unit, length, limit in (("s", 1, 100), ("min", 60, 6000), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:,.0f} days"
