"""The number of steps that fit into a time budget."""

import time
from statistics import median

from brisk.reporting.forecast import duration

MAX_EVALUATIONS = 20  # in a run; fewer where the time is short
MAX_LOG_LINES = 100  # of the training loss
EVALUATION_FRACTION = 0.1  # of the time, for all evaluations together
MIN_BATCHES, MAX_BATCHES = 5, 200  # of each split in an evaluation
WARM_UP_STEPS, TIMED_STEPS, TIMED_SECONDS = 2, 5, 2.0


def seconds_per_step(step, device, ranks):
    """Median seconds of a call of `step`, over `TIMED_STEPS` calls or `TIMED_SECONDS`, whichever is
    longer, after `WARM_UP_STEPS` calls. All ranks make the same number of calls."""

    def timed(calls):
        times = []
        for _ in range(calls):
            t0 = time.perf_counter()
            step()
            device.synchronize()
            times.append(time.perf_counter() - t0)
        return ranks.broadcast(median(times))

    estimate = timed(WARM_UP_STEPS + 1)
    return timed(max(TIMED_STEPS, round(TIMED_SECONDS / estimate)))


def fit_to_minutes(config, plan, step_seconds, say):
    """Settings, {key: value}, with which a run from `plan.first_step` takes about `config.minutes`
    minutes: the number of steps, and with it decay, warm-up and evaluations. Keys given after
    `minutes` are not among them.

    Args:
        step_seconds: duration of a training step.
        say: prints a line, the chosen settings.
    """
    seconds = 60 * config.minutes
    # A backward pass costs about two forward passes; an evaluation reads two splits.
    batch_seconds = step_seconds / len(plan.micro_batches) / 3
    affordable = EVALUATION_FRACTION * seconds / (2 * batch_seconds)  # batches of each split
    evaluations = min(max(1, int(affordable / MIN_BATCHES)), MAX_EVALUATIONS)
    batches = round(min(max(affordable / evaluations, MIN_BATCHES), MAX_BATCHES))
    later = config.given[config.given.index("minutes") :] if "minutes" in config.given else ()
    batches = config.eval_iters if "eval_iters" in later else batches
    steps = max(1, round((seconds - 2 * evaluations * batches * batch_seconds) / step_seconds))
    last_step = plan.first_step + steps - 1
    values = {
        "eval_iters": batches,
        "eval_interval": -(-steps // evaluations),
        "log_interval": max(1, round(steps / MAX_LOG_LINES)),
        "warmup_iters": min(100, steps // 20),
        "lr_decay_iters": last_step,
        "max_iters": last_step,
    }
    values = {key: value for key, value in values.items() if key not in later}
    chosen = " ".join(f"--{key}={value}" for key, value in values.items())
    say(f"for --minutes={config.minutes:g} at {duration(step_seconds)} per step: {chosen}")
    return values
