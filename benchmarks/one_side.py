"""Measure one side of a comparison with nanoGPT, in a separate process.

    $ python benchmarks/one_side.py < job.json

A job is a JSON object on one line: `job` (the name of a function below), `root` (the folder with
model.py and the scripts), `is_brisk` (whether that is this repository) and the arguments of the
function. Prints the figures as a JSON object on one line. Each further line of input requests
another round.

The process of nanoGPT does not import this repository, whose memory and allocator settings
(`brisk.device.keep_freed_memory`) would affect its figures.
"""

import importlib
import itertools
import json
import runpy
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import numpy as np
import torch

OPTIMIZER = (0.1, 6e-4, (0.9, 0.95))  # train.py's weight decay, learning rate and betas
SEED = 1337  # seed of the order of the windows


def main(job):
    sys.path.insert(0, job["root"])  # for `import model`
    jobs = {"step": step, "generate": generate, "prepare": prepare, "start": start}
    for figures in jobs[job["job"]](job):
        print("\n" + json.dumps(figures), flush=True)
        if not sys.stdin.readline():
            break


def load_model(job):
    from model import GPT, GPTConfig

    model = GPT(GPTConfig(**job["model_args"]))
    model.load_state_dict(torch.load(job["weights"], mmap=True)["model"])
    return model


def autocast_of_nanogpt(job):
    """The default precision of nanoGPT's scripts."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if "cuda" not in job["device"]:
        return nullcontext()
    return torch.amp.autocast("cuda", dtype=torch.bfloat16)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work):
    """Time `work()` in seconds, with CUDA events if available."""
    synchronize()
    if not torch.cuda.is_available():
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    synchronize()
    return began.elapsed_time(ended) / 1000


# ------------------------------------------------------------------------------- training steps


def step(job):
    """Yield for each round: the mean time of `steps` training steps in seconds, the last loss, and
    the peak memory. `warm_up` steps run before the first round. `first_s` is the time from the
    start of the job to the end of the first step. A step is that of train.py, without evaluation
    and logging."""
    began, numbers, first = time.perf_counter(), itertools.count(), None
    trainer = brisk_trainer if job["is_brisk"] else nanogpt_trainer
    with trainer(job) as (train_step, precision):
        for _ in range(job["warm_up"]):
            train_step(next(numbers))
            synchronize()
            first = first or time.perf_counter() - began

        def steps():
            nonlocal loss
            for _ in range(job["steps"]):
                loss = train_step(next(numbers))

        while True:
            loss = None
            seconds = seconds_of(steps) / job["steps"]
            figures = {"seconds": seconds, "loss": loss.item(), "precision": precision}
            yield {**figures, "first_s": first, **peak_memory(job)}


@contextmanager
def brisk_trainer(job):
    """A context with (function that trains step n and returns the loss, precision)."""
    from trainer import open_trainer

    args, folder = job["model_args"], Path(job["tokens"]).parent
    keys = {"init_from": job["weights"], "data_dir": folder, "out_dir": folder / "no-run"}
    keys |= {"block_size": args["block_size"], "dropout": args["dropout"]}
    keys |= {"batch_size": job["batch_size"], "gradient_accumulation_steps": 1, "seed": SEED}
    keys |= {"device": job["device"], "dtype": job["dtype"]}
    with open_trainer([f"--{key}={value}" for key, value in keys.items()]) as trainer:

        def train_step(number):
            loss, grad_norm = trainer.step()
            if number % job["log_interval"] == 0:
                _ = loss.item(), grad_norm.item()
                trainer.state.spikes.poll()
            return loss

        yield train_step, trainer.device.dtype_name


@contextmanager
def nanogpt_trainer(job):
    """The same, following nanoGPT's train.py. It draws random windows, to spend the same time, but
    uses those in `starts`, so that both sides train on the same batches."""
    autocast, on_cuda = autocast_of_nanogpt(job), "cuda" in job["device"]
    model = load_model(job).to(job["device"])
    optimizer = model.configure_optimizers(*OPTIMIZER, "cuda" if on_cuda else "cpu")
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    trained = torch.compile(model) if on_cuda else model
    block_size, starts = job["model_args"]["block_size"], iter(torch.tensor(job["starts"]))

    def next_batch():
        tokens = np.memmap(job["tokens"], dtype=np.uint16, mode="r")  # opened for every batch
        torch.randint(len(tokens) - block_size, (job["batch_size"],))
        rows = next(starts)
        x, y = (
            torch.stack(
                [torch.from_numpy(tokens[i : i + block_size].astype(np.int64)) for i in first]
            )
            for first in (rows, rows + 1)
        )
        if on_cuda:
            x, y = x.pin_memory(), y.pin_memory()
        return x.to(job["device"], non_blocking=on_cuda), y.to(job["device"], non_blocking=on_cuda)

    batch, logits = next_batch(), None  # as in train.py, logits stay in memory until replaced

    def train_step(number):
        nonlocal batch, logits
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER[1]
        with autocast:
            logits, loss = trained(*batch)
            loss = loss / 1  # gradient_accumulation_steps
        batch = next_batch()  # while the GPU computes
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if number % job["log_interval"] == 0:
            loss.item()
        return loss.detach()

    yield train_step, "bfloat16" if on_cuda else "float32"


def peak_memory(job):
    """Peak memory in bytes: allocated and reserved on the GPU, or of this process (None if
    unknown)."""
    if "cuda" in job["device"]:
        reserved = torch.cuda.max_memory_reserved()
        return {"bytes": torch.cuda.max_memory_allocated(), "reserved": reserved}
    try:
        import resource  # not on Windows
    except ImportError:
        return {"bytes": None, "reserved": None}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": peak if sys.platform == "darwin" else peak * 1024, "reserved": None}


# ------------------------------------------------------------------------------------- sampling


def generate(job):
    """Yield for each round the seconds of `model.generate` for `samples` samples of `tokens` tokens
    in batches of `batch_size` (default: all for ours, 1 for nanoGPT), after a warm-up of eight
    tokens. Ours optionally `cast`s linear weights to the dtype of autocast first, and replays a
    `cuda_graph`."""
    if job["is_brisk"]:
        from brisk.device import open_device

        device = open_device(job["device"], "auto")
        autocast = device.autocast()
        options = {key: job.get(key, False) for key in ("exact_window", "cuda_graph")}
    else:
        autocast, options = autocast_of_nanogpt(job), {}
    batch_size = job.get("batch_size") or (job["samples"] if job["is_brisk"] else 1)
    model = load_model(job).to(job["device"]).eval()
    if job.get("cast"):
        device.cast_linear_weights(model)
    idx = torch.zeros(batch_size, 1, dtype=torch.long, device=job["device"])

    def draw(tokens, times=1):
        with torch.no_grad(), autocast:
            for _ in range(times):
                model.generate(idx, tokens, temperature=0.8, top_k=200, **options)

    draw(8)
    while True:
        yield {"seconds": seconds_of(lambda: draw(job["tokens"], job["samples"] // batch_size))}


# -------------------------------------------------------------------------------- whole scripts


def prepare(job):
    """Time the prepare.py `script` in seconds, after importing `modules`. Also yields the names of
    the modules that it imported itself, for use as `modules` in the next run."""
    before = set(sys.modules)
    for name in job["modules"]:
        with suppress(Exception):  # some are created at run time
            importlib.import_module(name)
    sys.argv = [job["script"], *job["argv"]]
    began = time.perf_counter()
    runpy.run_path(job["script"], run_name="__main__")
    seconds = time.perf_counter() - began
    yield {"seconds": seconds, "modules": [name for name in sys.modules if name not in before]}


class UntilFirstStep:
    """A standard output that ends the script when it prints the first step."""

    def __init__(self, stream):
        self.stream, self.has_seen_it = stream, False

    def write(self, text):
        if "iter 0:" in text:
            self.has_seen_it = True
            raise SystemExit
        return self.stream.write(text)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def start(job):
    """Seconds from after `import torch` until train.py prints its first step."""
    sys.argv = [job["script"], *job["argv"]]
    sys.stdout = watched = UntilFirstStep(sys.stdout)
    began = time.perf_counter()
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as ended:
        if not watched.has_seen_it:
            sys.exit(ended.code or "train.py ended before its first step")
    seconds = time.perf_counter() - began
    sys.stdout = watched.stream
    yield {"seconds": seconds}


if __name__ == "__main__":
    main(json.loads(sys.stdin.readline()))
