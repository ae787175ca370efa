"""A step of train_shakespeare_char, so small that the host limits its speed."""

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
    """Ours with --compile=False."""
    keys = {**KEYS, "dropout": 0.2, "compile": False}
    with open_trainer(job.argv(SMALL, job.pick(64, 2), **keys)) as trainer:
        times = job.time_steps(trainer.step)
    yield row_of("eager", times, job)


def graphs(job):
    """Ours with CUDA graphs, compiled and not."""
    for how, compiling in (("eager", False), ("compiled", "auto")):
        job.clean_up()
        keys = {**KEYS, "dropout": 0.2, "compile": compiling, "cuda_graph": job.on_gpu}
        with open_trainer(job.argv(SMALL, job.pick(64, 2), **keys)) as trainer:
            yield row_of(f"{how}, as CUDA graphs", job.time_steps(trainer.step), job)


def row_of(how, times, job):
    rate = {"steps/s": 1000 / sorted(times)[len(times) // 2]}
    return row(f"step, shakespeare_char, {how}", "ms", times, **rate, **job.clocks)


PARTS = {"compiled": compiled, "eager": eager, "graphs": graphs}
