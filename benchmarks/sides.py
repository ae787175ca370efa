"""The two sides of a comparison: this repository, and a copy of a checkout of nanoGPT.

Each has a folder to run its scripts in, with config/ and data/ as nanoGPT's scripts expect them;
every run is a process of its own. What both work on is written here too.
"""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from brisk.data.dataset import FORMAT
from brisk.data.loader import TokenFile
from brisk.data.text_files import find_file
from brisk.data.tokenizer import ByteTokenizer
from brisk.errors import UserError
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parents[1]
DATASET = "shakespeare_char"
CHARACTERS = "\n !$&',-.3:;?" + "ABCDEFGHIJKLMNOPQRSTUVWXYZ" + "abcdefghijklmnopqrstuvwxyz"


@dataclass
class Side:
    """Where a side's scripts are, and a folder to run them in that holds config/ and data/."""

    name: str
    root: Path
    folder: Path

    @property
    def is_brisk(self):
        return self.root == ROOT


def open_sides(config, temporary):
    """Name → `Side`: ours in a folder of its own, nanoGPT in a copy of the checkout."""
    for name in ("model.py", "train.py", "sample.py", f"data/{DATASET}/prepare.py"):
        if not config.peer or not Path(config.peer, name).exists():
            raise UserError(f"--peer={config.peer} is no checkout of nanoGPT: it has no {name}")
    theirs = temporary / "nanogpt"
    leave_out = shutil.ignore_patterns(".git", "out*", "*.bin", "*.pkl", "*.pt")
    shutil.copytree(config.peer, theirs, ignore=leave_out)
    return {"brisk": open_ours(temporary), "nanogpt": Side("nanogpt", theirs, theirs)}


def open_ours(temporary):
    """Our `Side`, in a folder of its own."""
    folder = temporary / "brisk"
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "data" / DATASET).mkdir(parents=True)
    return Side("brisk", ROOT, folder)


@contextmanager
def fresh(side):
    """A copy of the side, to run in and to leave files in that go away with it."""
    with TemporaryDirectory() as temporary:
        folder = shutil.copytree(side.folder, Path(temporary, side.name))
        yield Side(side.name, ROOT if side.is_brisk else folder, folder)


def run(command, side, **options):
    """(seconds of a whole process in the side's folder, its standard output)."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=side.folder,
        capture_output=True,
        text=True,
        encoding="utf-8",
        **options,
    )
    seconds = time.perf_counter() - began
    if done.returncode:
        what = f"{side.name}'s {Path(command[0]).name}"
        raise UserError(f"{what} failed: {done.stderr.strip()[-500:]}")
    return seconds, done.stdout


def work(side, job, environment=None):
    """The figures of a job (see one_side.py) done by a side."""
    job = {**job, "is_brisk": side.is_brisk, "root": str(side.root)}
    script, environment = ROOT / "benchmarks" / "one_side.py", {**os.environ, **(environment or {})}
    _, printed = run([script], side, input=json.dumps(job), env=environment)
    return json.loads(printed.splitlines()[-1])


def alternate(config, sides, measure):
    """Name → the figures of each round, where `measure(side)` gives a dict of them."""
    runs = {name: [] for name in sides}
    for number in range(config.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            runs[name].append(measure(sides[name]))
    return runs


def lay_out_text(config, sides):
    """The raw text as input.txt in both sides' folders."""
    path = find_file(config.input, ROOT / "data" / DATASET, "tinyshakespeare.txt", None, None)
    if not path.exists():
        raise UserError(f"there is no text {path}")
    for side in sides.values():
        shutil.copy(path, side.folder / "data" / DATASET / "input.txt")


def prepare_command(side):
    """The prepare.py of a side, on the input.txt in its folder."""
    folder = side.folder / "data" / DATASET
    script = side.root / "data" / DATASET / "prepare.py"
    more = [f"--input={folder / 'input.txt'}", f"--data_dir={folder}"]
    return [script, *(more if side.is_brisk else [])]


def prepared_files(folder):
    """What is in the files that nanoGPT reads; of the pickle, which can be written in several
    ways, what it means."""
    found = {name: (folder / name).read_bytes() for name in ("train.bin", "val.bin")}
    return found | {"meta.pkl": pickle.loads((folder / "meta.pkl").read_bytes())}


def save_random_model(model_args, path):
    """A checkpoint of random weights, as nanoGPT writes it."""
    torch.manual_seed(1337)
    checkpoint = {"model": GPT(GPTConfig(**model_args)).state_dict(), "model_args": model_args}
    checkpoint |= {"iter_num": 0, "best_val_loss": 0.0, "config": {"dataset": "random"}}
    torch.save(checkpoint, path)


def write_random_ids(folder, vocab_size, count=1_000_000):
    """train.bin and val.bin of random ids in `folder`, and for characters a meta.pkl."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ids = np.random.default_rng(0).integers(min(vocab_size, 50257), size=count)
    for name in ("train.bin", "val.bin"):
        ids.astype("<u2").tofile(folder / name)
    (folder / "meta.pkl").unlink(missing_ok=True)
    if vocab_size == len(CHARACTERS):
        itos = dict(enumerate(CHARACTERS))
        meta = {"vocab_size": len(itos), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
        (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def describe_as_bytes(folder):
    """A meta.json beside random ids: train.py would ask the network for GPT-2's vocabulary."""
    counts = {"bytes": 0, "characters": 0}
    splits = {
        name: {**counts, "tokens": Path(folder, f"{name}.bin").stat().st_size // 2}
        for name in ("train", "val")
    }
    tokenizer = ByteTokenizer()
    meta = {"format": FORMAT, "dtype": "uint16", "vocab_size": tokenizer.vocab_size}
    meta |= {"source": "random ids", "splits": splits, "tokenizer": tokenizer.to_dict()}
    Path(folder, "meta.json").write_text(json.dumps(meta), encoding="utf-8")


def window_starts(folder, block_size, batch_size, batches):
    """Where the windows of the first batches of train.bin start, (batches, batch_size) in lists:
    in a file whose ids are their own positions, a window's first id says so."""
    count = Path(folder, "train.bin").stat().st_size // 2
    np.arange(count, dtype="<u4").tofile(Path(folder, "positions.bin"))
    positions = TokenFile(Path(folder, "positions.bin"), block_size, count, "uint32")
    x, _ = positions.batch(0, batches * batch_size)
    return x[:, 0].view(batches, batch_size).tolist()
