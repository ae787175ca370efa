"""Shared by the sections: sizes, timing, memory, clocks, and alternating processes."""

import gc
import json
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import torch

from brisk.device import open_device
from brisk.errors import UserError
from one_side import seconds_of
from sides import (
    ROOT,
    alternate,
    describe_as_bytes,
    open_ours,
    open_sides,
    save_random_model,
    window_starts,
    write_random_ids,
)

PADDED = 50304  # rows of GPT-2's vocabulary
GPT2 = dict(block_size=1024, vocab_size=PADDED, n_layer=12, n_head=12, n_embd=768, bias=False)
SMALL = dict(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)
TINY = dict(block_size=16, n_layer=2, n_head=2, n_embd=16)


class Job:
    """The settings of a measurement, and a temporary folder."""

    def __init__(self, config):
        self.config, self.tiny = config, config.tiny
        self.rounds, self.minutes = config.rounds, config.minutes
        self.warm_up, self.steps = (2, 2) if config.tiny else (config.warm_up, config.steps)
        self.device = open_device(config.device)
        self.clocks = {}  # of the GPU at the end of the last figure
        if config.tiny:
            self.rounds = 1
        self._folder = tempfile.TemporaryDirectory(prefix="gpu-")
        self.folder = Path(self._folder.name)

    @property
    def on_gpu(self):
        return self.device.type == "cuda"

    def pick(self, full, tiny):
        return tiny if self.tiny else full

    def model_args(self, sizes, dropout=0.0):
        return {**sizes, "dropout": dropout, **(TINY if self.tiny else {})}

    def random_data(self, vocab_size):
        """A folder of random ids."""
        folder = self.folder / f"random-{vocab_size}"
        if not (folder / "train.bin").exists():
            write_random_ids(folder, vocab_size, count=self.pick(5_000_000, 10_000))
            if vocab_size == PADDED:
                describe_as_bytes(folder)
        return folder

    def argv(self, sizes, batch_size, **keys):
        """Arguments of train.py for steps of one micro-batch of random ids; nothing is written."""
        args = self.model_args(sizes)
        keys = {"gradient_accumulation_steps": 1, "batch_size": batch_size, **args, **keys}
        keys |= {"data_dir": self.random_data(args["vocab_size"]), "device": self.config.device}
        keys |= {"out_dir": self.folder / "no-run"}
        return [f"--{key}={value}" for key, value in keys.items()]

    def sides(self):
        """{name: `Side`}, with nanoGPT if its checkout is given."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        if not self.config.peer:
            return {"brisk": open_ours(folder)}
        return open_sides(SimpleNamespace(peer=self.config.peer), folder)

    def time_steps(self, step):
        """Milliseconds of a `step()` in each round."""

        def times(count):
            for _ in range(count):
                step()

        times(self.warm_up)
        rounds = range(self.rounds)
        found = [1000 * seconds_of(lambda: times(self.steps)) / self.steps for _ in rounds]
        self.clocks = clocks()
        return found

    def clean_up(self):
        """Free the memory and the compiled code of a part."""
        gc.collect()
        torch.compiler.reset()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def row(what, unit, values, peer=None, **more):
    """A result: our figure of each round, nanoGPT's if there is one, and further facts."""
    found = {"what": what, "unit": unit, "values": list(values)}
    return found | ({"peer": list(peer)} if peer else {}) | ({"more": more} if more else {})


def peak_gigabytes(device):
    """Peak memory in GB: allocated, and reserved by the allocator."""
    if device.type != "cuda":
        return {}
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    return dict(zip(("allocated GB", "reserved GB"), (peak / 1e9 for peak in peaks), strict=True))


def clocks():
    """Current clocks and power of the GPU, if nvidia-smi is available."""
    if not shutil.which("nvidia-smi"):
        return {}
    keys = {"clocks.sm": "SM MHz", "clocks.mem": "memory MHz", "power.draw": "W"}
    query = ["nvidia-smi", f"--query-gpu={','.join(keys)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    found = re.findall(r"[\d.]+", (done.stdout.splitlines() or [""])[0])
    return dict(zip(keys.values(), map(float, found), strict=False))


def describe_machine(device):
    versions = f"PyTorch {torch.__version__}, Python {platform.python_version()}"
    try:
        import triton

        versions += f", Triton {triton.__version__}"
    except ImportError:
        pass
    cuda = f", CUDA {torch.version.cuda}" if torch.version.cuda else ""
    return f"{device}; {versions}{cuda}"


# ----------------------------------------------------------------------------- taking turns


class Worker:
    """A process of benchmarks/one_side.py that measures a round on request, so that a side compiles
    once for all rounds."""

    def __init__(self, side, job, environment=None):
        job = {**job, "is_brisk": side.is_brisk, "root": str(side.root)}
        self.name, self.errors = side.name, tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "benchmarks" / "one_side.py"],
            cwd=side.folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        self.send(json.dumps(job))
        self.started = False

    def send(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def figures(self):
        """The figures of the next round."""
        if self.started:
            self.send("again")
        self.started = True
        for line in self.process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        said = self.errors.read().strip()
        print(said[-3000:], file=sys.stderr)
        raise UserError(f"{self.name}: {said.splitlines()[-1] if said else 'it ended'}")

    def close(self):
        """End the process, if it is still running."""
        with suppress(OSError):
            self.process.stdin.close()
        self.process.stdout.read()
        self.process.wait()
        self.errors.close()


def take_turns(job, workers):
    """{name: figures of each round}. All workers warm up before the first round is timed."""
    try:
        for worker in workers.values():
            worker.figures()
        rounds = alternate(job, workers, Worker.figures)
        job.clocks = clocks()  # while it is still warm
        return rounds
    finally:
        for worker in workers.values():
            worker.close()


def step_job(job, sizes, batch_size, dropout=0.0, **more):
    """Settings of a "step" job of one_side.py on random ids."""
    args = job.model_args(sizes, dropout)
    folder, weights = job.random_data(args["vocab_size"]), job.folder / "weights.pt"
    save_random_model(args, weights)
    count = job.warm_up + (job.rounds + 1) * job.steps + 1
    return {
        "job": "step",
        "model_args": args,
        "batch_size": batch_size,
        "weights": str(weights),
        "tokens": str(folder / "train.bin"),
        "starts": window_starts(folder, args["block_size"], batch_size, count),
        "warm_up": job.warm_up,
        "steps": job.steps,
        "log_interval": 10,
        "device": str(job.device.device),
        "dtype": "auto",
        **more,
    }


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]
