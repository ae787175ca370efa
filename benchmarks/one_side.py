"""One side of a comparison with nanoGPT, in a process of its own.

    $ python benchmarks/one_side.py < job.json

A job is a JSON object on one line: `job` (a function below that takes one), `root` (the folder
whose model.py and scripts are meant), `is_brisk` (whether that is this repository) and what the
function reads. Its figures are printed as a JSON object on a line. Where the function has rounds,
every further line of input asks for the figures of one more.

On nanoGPT's side nothing of this repository is imported: neither the memory it takes nor its
settings of the allocator (`brisk.device.keep_freed_memory`) are in nanoGPT's figures.
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
SEED = 1337  # of the order of the windows


def main(job):
    sys.path.insert(0, job["root"])  # `model` is this side's
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
    """The precision that nanoGPT's scripts work in unless told otherwise."""
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    if "cuda" not in job["device"]:
        return nullcontext()
    return torch.amp.autocast("cuda", dtype=torch.bfloat16)


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(work):
    """Seconds that `work()` takes, by CUDA events where there are any."""
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
    """In each round, seconds of a training step, the mean of `steps`, the loss of the last one and
    the peak of memory; before the first of them come `warm_up` steps. `first_s` is the time from
    the start of the job to the end of its first step. Each side does what its train.py does in a
    step, but for the evaluations and for writing the numbers down."""
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
    """(a function that trains step n and returns its loss, the precision): train.py's step."""
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
    """The same after nanoGPT's train.py, which draws random windows. Here it draws them too, but
    then takes those that `starts` gives, so that both sides train on the same batches."""
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

    batch, logits = next_batch(), None  # its logits live on until the next step has its own

    def train_step(number):
        nonlocal batch, logits
        for group in optimizer.param_groups:
            group["lr"] = OPTIMIZER[1]
        with autocast:
            logits, loss = trained(*batch)
            loss = loss / 1  # of one micro-batch
        batch = next_batch()  # while a GPU is at work
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
    """Bytes at the peak: of the GPU's memory, and reserved there, or of this process (None where
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
    """In each round, seconds of `model.generate` for `samples` samples of `tokens` tokens,
    `batch_size` of them side by side (by default ours all, nanoGPT's one). Ours may have its linear
    weights `cast` to the precision of autocast before, and run as a `cuda_graph`. Eight tokens of
    each are drawn before the clock starts."""
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
    """Seconds of the prepare.py `script` without its imports: from its first line to its end,
    with `modules`, all that it imports on its way, imported before. Also their names, which a run
    without `modules` finds out."""
    before = set(sys.modules)
    for name in job["modules"]:
        with suppress(Exception):  # some are made, not imported
            importlib.import_module(name)
    sys.argv = [job["script"], *job["argv"]]
    began = time.perf_counter()
    runpy.run_path(job["script"], run_name="__main__")
    seconds = time.perf_counter() - began
    yield {"seconds": seconds, "modules": [name for name in sys.modules if name not in before]}


class UntilFirstStep:
    """Standard output that ends the script which writes to it at the first step's line."""

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
    """Seconds from after `import torch` until train.py prints its first step's line."""
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
