"""Shared fixtures: a small data set, tiny runs, and scripts in subprocesses."""

import importlib.util
import io
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from tqdm import tqdm

hypothesis.settings.register_profile("any machine", deadline=None)  # a machine may be slow
hypothesis.settings.load_profile("any machine")
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job; children inherit
    signal.signal(signal.SIGINT, signal.default_int_handler)
# For such small models several threads are slower. The variable is for child processes.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # deterministic products on a GPU

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # `python -m pytest` does this, `pytest` does not

import train  # noqa: E402
from brisk.checkpoint import load_checkpoint  # noqa: E402 (found by the line above)
from brisk.data.bpe import gpt2  # noqa: E402
from brisk.data.dataset import load_tokenizer, read_meta, write_dataset  # noqa: E402
from brisk.data.tokenizer import CharTokenizer  # noqa: E402
from brisk.device import open_device  # noqa: E402
from brisk.errors import UserError, one_line_errors  # noqa: E402
from brisk.training.signals import StopRequest  # noqa: E402
from configurator import configure  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

# Shakespeare, sonnets 18 and 116.
TEXT = """Shall I compare thee to a summer's day?
Thou art more lovely and more temperate:
Rough winds do shake the darling buds of May,
And summer's lease hath all too short a date;
Sometime too hot the eye of heaven shines,
And often is his gold complexion dimm'd;
And every fair from fair sometime declines,
By chance or nature's changing course untrimm'd;
But thy eternal summer shall not fade,
Nor lose possession of that fair thou ow'st;
Nor shall death brag thou wander'st in his shade,
When in eternal lines to time thou grow'st:
So long as men can breathe or eyes can see,
So long lives this, and this gives life to thee.

Let me not to the marriage of true minds
Admit impediments. Love is not love
Which alters when it alteration finds,
Or bends with the remover to remove:
O no! it is an ever-fixed mark
That looks on tempests and is never shaken;
It is the star to every wandering bark,
Whose worth's unknown, although his height be taken.
Love's not Time's fool, though rosy lips and cheeks
Within his bending sickle's compass come:
Love alters not with his brief hours and weeks,
But bears it out even to the edge of doom.
If this be error and upon me proved,
I never writ, nor no man ever loved.
"""

# A run of eight steps, 0 to 7, in half a second.
TINY = {
    "device": "cpu",
    "dtype": "float32",
    "compile": False,
    "n_layer": 1,
    "n_head": 2,
    "n_embd": 16,
    "block_size": 16,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "eval_interval": 4,
    "eval_iters": 2,
    "max_iters": 7,
    "lr_decay_iters": 7,
    "warmup_iters": 2,
    "learning_rate": 1e-2,
    "min_lr": 1e-3,
}


@dataclass
class Run:
    """The files and the console output of a run."""

    out_dir: Path
    console: str

    @property
    def metrics(self):
        lines = (self.out_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def series(self, key):
        """{step: value of `key`} from `metrics.jsonl`."""
        return {line["step"]: line[key] for line in self.metrics if key in line}

    def checkpoint(self, name="last.pt"):
        return load_checkpoint(self.out_dir / name)


@pytest.fixture(scope="session")
def text():
    return TEXT


@pytest.fixture(scope="session")
def char_data(tmp_path_factory):
    """A character data set of about 1,200 tokens, in a folder `data/sonnets`."""
    folder = tmp_path_factory.mktemp("root") / "data" / "sonnets"
    tokenizer = CharTokenizer(sorted(set(TEXT)))
    splits = {"train": [TEXT[:-200]], "val": [TEXT[-200:]]}
    write_dataset(folder, tokenizer, splits, "sonnets")
    return folder


@pytest.fixture(scope="session")
def lines_data(tmp_path_factory):
    """A data set of documents: the words and lines of the text, each followed by end-of-text."""
    folder = tmp_path_factory.mktemp("lines")
    tokenizer = CharTokenizer(sorted(set(TEXT)), eot=True)
    splits = {"train": TEXT.split() + TEXT.splitlines(), "val": TEXT.splitlines()}
    write_dataset(folder, tokenizer, splits, "sonnets", end_documents=True)
    return folder


@pytest.fixture(scope="session")
def shared_memory():
    try:
        multiprocessing.get_context("spawn").Lock()
    except OSError as error:
        pytest.skip(f"needs shared memory, such as /dev/shm: {error}")


@pytest.hookimpl(tryfirst=True)  # before `-m` is applied
def pytest_collection_modifyitems(items):
    """Mark the tests with the fixture `device`, so that `-m device` runs them on a GPU."""
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", ())
        if "device" in getattr(item, "fixturenames", ()) and "device" not in parameters:
            item.add_marker("device")


@pytest.fixture
def device():
    """The device of the numerical tests: BRISK_TEST_DEVICE or the CPU, in float32 without TF32."""
    precision = torch.get_float32_matmul_precision()
    opened = open_device(os.environ.get("BRISK_TEST_DEVICE", "cpu"), "float32")
    torch.set_float32_matmul_precision("highest")
    yield opened
    torch.set_float32_matmul_precision(precision)


@pytest.fixture(scope="session")
def gpt2_tokenizer():
    try:
        return gpt2()
    except UserError as error:
        pytest.skip(f"GPT-2's vocabulary is not available: {error}")


@pytest.fixture
def settings(char_data):
    """`settings(out_dir, **changes)`: the arguments of a tiny run."""

    def argv(out_dir, **changes):
        tiny = {**TINY, "data_dir": char_data, "out_dir": out_dir, **changes}
        return [f"--{key}={value}" for key, value in tiny.items() if value is not None]

    return argv


@pytest.fixture
def resumed_settings(settings):
    """`resumed_settings(out_dir, **changes)`: the arguments that resume a run."""

    def argv(out_dir, init_from="resume", **changes):
        machine = {"device": "cpu", "compile": False}
        given = {"init_from": init_from, "out_dir": out_dir, **machine, **changes}
        return [f"--{key}={value}" for key, value in given.items()]

    return argv


@pytest.fixture
def tapes(monkeypatch):
    """CUDA graphs are tapes on the CPU (tape.py); their counts."""
    from tape import use_tapes

    return use_tapes(monkeypatch)


@pytest.fixture
def main(capsys):
    """`main(argv)`: run train.py in this process. Returns a `Run`."""
    import train

    def main(argv):
        config = configure(train.TrainConfig, argv)
        capsys.readouterr()
        train.main(config)
        return Run(Path(config.out_dir), capsys.readouterr().out)

    return main


@pytest.fixture
def train_tiny(main, settings):
    """`train_tiny(out_dir, **changes)`: train a tiny run. Returns a `Run`."""
    return lambda out_dir, **changes: main(settings(out_dir, **changes))


@pytest.fixture
def resume(main, resumed_settings):
    """`resume(out_dir, **changes)`: resume a run on the CPU without compilation."""
    return lambda out_dir, **changes: main(resumed_settings(out_dir, **changes))


@pytest.fixture
def train_until(settings, monkeypatch):
    """`train_until(out_dir, stop, **changes)`: train a tiny run and interrupt it before `stop`."""

    def run(out_dir, stop, given=None, **changes):
        argv = given or settings(out_dir, **changes)
        request, get_lr = StopRequest(prints=False), train.get_lr

        def count(step, *rest):
            if step == stop - 1:
                request.number = 2
            return get_lr(step, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(train, "get_lr", count)
            with pytest.raises(SystemExit):
                train.main(configure(train.TrainConfig, argv), request)
        assert torch.load(out_dir / "last.pt")["iter_num"] == stop

    return run


@pytest.fixture
def resume_run(main):
    """`resume_run(out_dir, **changes)`: resume a run on the CPU without any other key."""

    def run(out_dir, **changes):
        given = {"init_from": "resume", "out_dir": out_dir, "device": "cpu", **changes}
        return main([f"--{key}={value}" for key, value in given.items()])

    return run


class Prepared:
    """A prepared data set, decoded."""

    def __init__(self, folder, printed):
        self.folder, self.printed = folder, printed
        self.meta, self.tokenizer = read_meta(folder), load_tokenizer(folder)
        self.train, self.val = self.text("train"), self.text("val")

    def ids(self, split):
        return np.fromfile(self.folder / f"{split}.bin", dtype=self.meta["dtype"])

    def text(self, split):
        return self.tokenizer.decode(self.ids(split))

    def documents(self, split):
        ids = self.ids(split)  # split the ids, as a text may contain a literal <|endoftext|>
        *documents, rest = np.split(ids, np.flatnonzero(ids == self.tokenizer.eot) + 1)
        assert len(rest) == 0 and len(documents) == self.meta["splits"][split]["documents"]
        return [self.tokenizer.decode(document[:-1]) for document in documents]

    def all_documents(self):
        return sorted(self.documents("train") + self.documents("val"))

    def bins(self):
        return [(self.folder / f"{split}.bin").read_bytes() for split in ("train", "val")]


@pytest.fixture
def prepare_here(tmp_path, capsys, monkeypatch):
    """`prepare_here(name, **settings)`: run data/<name>/prepare.py in this process, in an empty
    folder. Returns a `Prepared`, or with `fails=True` the line of the error."""
    monkeypatch.chdir(tmp_path)

    def run(name, *argv, fails=False, **settings):
        path = ROOT / "data" / name / "prepare.py"
        spec = importlib.util.spec_from_file_location(f"prepare_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        folder = Path(settings.setdefault("data_dir", tmp_path / "data"))
        argv = [*argv, *(f"--{key}={value}" for key, value in settings.items())]
        capsys.readouterr()
        if not fails:
            module.main(configure(module.PrepareConfig, argv))
            return Prepared(folder, capsys.readouterr().out)
        with pytest.raises(SystemExit) as ended, one_line_errors():
            module.main(configure(module.PrepareConfig, argv))
        lines = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and len(lines) == 1
        assert not (folder / "train.bin").exists() and not (folder / ".writing").exists()
        return lines[0]

    return run


def run_script(script, *argv, cwd=None, env=None, launcher=(), root=ROOT):
    """Run a script in a subprocess. Returns a `subprocess.CompletedProcess` with text."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "BRISK_DATA")}
    clean |= {"PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1", **(env or {})}
    command = [sys.executable, *launcher, str(Path(root, script)), *map(str, argv)]
    return subprocess.run(
        command, cwd=cwd, env=clean, capture_output=True, text=True, encoding="utf-8", timeout=300
    )


def exit_line(call, *arguments):
    """Call the `main` of a script. Returns None if it succeeds, else the line of the error. Fails
    for anything else, such as a traceback or a second error line."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in "oe")
    try:
        with redirect_stdout(out), redirect_stderr(err), one_line_errors():
            call(*arguments)
        return None
    except SystemExit as left:
        err.seek(0)
        lines = err.read().splitlines()
        assert left.code == 2 and [line.startswith("error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith("error: ") and lines[-1] != "error: "
        return lines[-1]


def run_forked(script, argv, cwd, seconds=60, memory=2**32):
    """Like `run_script`, in a forked process, which has all modules loaded and starts in a tenth of
    a second. `seconds` and `memory` (bytes more than are in use) are its limits. The status is
    negative if a signal ended it."""
    import resource

    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if child == 0:
            os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
            sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
            # tqdm's lock is shared between processes: a killed process would keep it
            tqdm.set_lock(threading.RLock())
            os.chdir(cwd)
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + memory, used + memory))
            sys.argv, status = [script, *map(str, argv)], 0
            signal.alarm(seconds)
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as left:
                status = left.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        texts = (file.read().decode("utf-8") for file in (out, err))
        return subprocess.CompletedProcess([script, *argv], status, *texts)


@pytest.fixture(scope="session")
def forked():
    """`forked("train.py", argv, cwd)`: `run_forked`, skipped if the system cannot fork."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs fork and /proc")
    import sample, train  # noqa: E401, F401, I001 (loaded once, before forking)

    return run_forked


@pytest.fixture(scope="session")
def script():
    """`script("train.py", *argv, cwd=…, env=…)`: see `run_script`."""
    return run_script


@pytest.fixture(scope="session")
def quick_script(request):
    """`quick_script("train.py", *argv, cwd=…)`: like `script`, but forked if possible."""
    if not Path("/proc/self/statm").exists():
        return run_script
    forked = request.getfixturevalue("forked")
    return lambda script, *argv, cwd=ROOT: forked(script, argv, cwd)


@pytest.fixture(scope="session")
def torchrun():
    """`torchrun("train.py", *argv, processes=2)`: like `script`, in several processes."""

    def run(name, *argv, processes=2, **more):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        return run_script(name, *argv, launcher=launcher, **more)

    return run


@pytest.fixture
def engine():
    """`engine(model, rows=8, queue=99, **options)`: an `Engine`, closed at the end of the test."""
    from brisk.serving.scheduler import Engine

    opened = []

    def engine(model, rows=8, queue=99, **options):
        opened.append(Engine(model, rows, queue, **{"vocab_size": 61, **options}))
        return opened[-1]

    yield engine
    for one in opened:
        one.close()


@pytest.fixture
def serve(engine, tmp_path):
    """`serve(rows=8, queue=99, **options)`: serve a random model of 61 characters on a free port.
    Returns its engine and the port. It shows the runs in `tmp_path`."""
    from networks import random_model

    from brisk.serving.api import make_app
    from brisk.serving.completions import Served
    from brisk.serving.http import Server

    running, tokenizer = [], CharTokenizer(map(chr, range(48, 48 + 61)))

    def serve(rows=8, queue=99, **options):
        bound = socket.create_server(("127.0.0.1", 0))
        one = engine(random_model(), rows, queue)
        served = Served("tiny", tokenizer, False, rows, max_tokens=10_000)
        server = Server(make_app(one, served, runs_dir=tmp_path, **options), one)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        running.append((server, thread))
        while not server.started:
            time.sleep(0.01)
        return one, bound.getsockname()[1]

    yield serve
    for server, thread in running:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def free_port():
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        return some.getsockname()[1]


def make_checkpoint(step=10, seed=0):
    """A complete checkpoint of a tiny model after one step."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=1, n_embd=8))
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
    idx = torch.zeros((1, 8), dtype=torch.int64)
    model(idx, idx)[1].backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": model.config.to_args(),
        "iter_num": step,
        "best_val_loss": 1.5,
        "config": {"dataset": "sonnets", "learning_rate": 1e-3, "compile": "auto"},
        "tokenizer": {"kind": "char", "characters": "\nabc…", "eot": False},
        "precision": ("cpu", "float32"),
        "scaler": {},
    }


def same(a, b):
    """Whether nested values are equal, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b
