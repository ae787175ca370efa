"""train_shakespeare_char's step: so small that it is the host's speed that counts."""

from gpu_sections.gpt2 import rows_of_steps
from gpu_sections.job import SMALL, Worker, row, step_job, take_turns
from trainer import open_trainer

KEYS = {"learning_rate": 1e-3, "beta2": 0.99}  # of config/train_shakespeare_char.py


def compiled(job):
    """Both sides, compiled, with dropout."""
    settings = step_job(job, SMALL, job.pick(64, 2), dropout=0.2)
    workers = {name: Worker(side, settings) for name, side in job.sides().items()}
    rounds = take_turns(job, workers)
    yield from rows_of_steps(job, "shakespeare_char, compiled", rounds, settings)


def eager(job):
    """Ours as train.py runs it with --compile=False."""
    keys = {**KEYS, "dropout": 0.2, "compile": False}
    with open_trainer(job.argv(SMALL, job.pick(64, 2), **keys)) as trainer:
        times = job.time_steps(trainer.step)
    rate = 1000 / sorted(times)[len(times) // 2]
    yield row("step, shakespeare_char, eager", "ms", times, **{"steps/s": rate}, **job.clocks)


PARTS = {"compiled": compiled, "eager": eager}
