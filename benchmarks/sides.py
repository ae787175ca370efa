"""The two sides of a comparison: this repository, and a copy of a checkout of nanoGPT.

Each side has a working folder with config/ and data/, as nanoGPT's scripts expect. Each run is a
separate process. This module also writes the common inputs.
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
    """One side of a comparison."""

    name: str
    root: Path  # folder of the scripts
    folder: Path  # working folder

    @property
    def is_brisk(self):
        return self.root == ROOT


def open_sides(config, temporary):
    """Return {name: `Side`}, with new working folders in `temporary`."""
    for name in ("model.py", "train.py", "sample.py", f"data/{DATASET}/prepare.py"):
        if not config.peer or not Path(config.peer, name).exists():
            raise UserError(f"--peer={config.peer} is not a checkout of nanoGPT: it has no {name}")
    theirs = temporary / "nanogpt"
    leave_out = shutil.ignore_patterns(".git", "out*", "*.bin", "*.pkl", "*.pt")
    shutil.copytree(config.peer, theirs, ignore=leave_out)
    return {"brisk": open_ours(temporary), "nanogpt": Side("nanogpt", theirs, theirs)}


def open_ours(temporary):
    """Our `Side`, with a new working folder."""
    folder = temporary / "brisk"
    shutil.copytree(ROOT / "config", folder / "config")
    (folder / "data" / DATASET).mkdir(parents=True)
    return Side("brisk", ROOT, folder)


@contextmanager
def fresh(side):
    """A context with a temporary copy of the side."""
    with TemporaryDirectory() as temporary:
        folder = shutil.copytree(side.folder, Path(temporary, side.name))
        yield Side(side.name, ROOT if side.is_brisk else folder, folder)


def run(command, side, **options):
    """Run a process in the side's folder. Returns (seconds, standard output)."""
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
        script = f"{side.name}'s {Path(command[0]).name}"
        raise UserError(f"{script} failed: {done.stderr.strip()[-500:]}")
    return seconds, done.stdout


def work(side, job, environment=None):
    """Run a job (see one_side.py) for a side. Returns its figures."""
    job = {**job, "is_brisk": side.is_brisk, "root": str(side.root)}
    script, environment = ROOT / "benchmarks" / "one_side.py", {**os.environ, **(environment or {})}
    _, printed = run([script], side, input=json.dumps(job), env=environment)
    return json.loads(printed.splitlines()[-1])


def alternate(config, sides, measure):
    """Call `measure(side)` for each side in alternating rounds. Returns {name: [figures, …]}."""
    runs = {name: [] for name in sides}
    for number in range(config.rounds):
        for name in list(sides)[:: -1 if number % 2 else 1]:
            runs[name].append(measure(sides[name]))
    return runs


def lay_out_text(config, sides):
    """Copy the raw text to input.txt in the folders of both sides."""
    path = find_file(config.input, ROOT / "data" / DATASET, "tinyshakespeare.txt", None, None)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    for side in sides.values():
        shutil.copy(path, side.folder / "data" / DATASET / "input.txt")


def prepare_command(side):
    """The command that prepares the input.txt in the side's folder."""
    folder = side.folder / "data" / DATASET
    script = side.root / "data" / DATASET / "prepare.py"
    more = [f"--input={folder / 'input.txt'}", f"--data_dir={folder}"]
    return [script, *(more if side.is_brisk else [])]


def prepared_files(folder):
    """{name: contents} of the files that nanoGPT reads. meta.pkl is unpickled, as equal objects may
    be pickled differently."""
    found = {name: (folder / name).read_bytes() for name in ("train.bin", "val.bin")}
    return found | {"meta.pkl": pickle.loads((folder / "meta.pkl").read_bytes())}


def save_random_model(model_args, path):
    """Save a checkpoint of random weights in nanoGPT's format."""
    torch.manual_seed(1337)
    checkpoint = {"model": GPT(GPTConfig(**model_args)).state_dict(), "model_args": model_args}
    checkpoint |= {"iter_num": 0, "best_val_loss": 0.0, "config": {"dataset": "random"}}
    torch.save(checkpoint, path)


def write_random_ids(folder, vocab_size, count=1_000_000):
    """Write train.bin and val.bin with random ids to `folder`, and meta.pkl for characters."""
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
    """Write a meta.json for random ids, so that train.py does not download GPT-2's vocabulary."""
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
    """Start positions of the windows in the first batches of train.bin, (batches, batch_size), as
    lists. They are read from a file in which each id is its own position."""
    count = Path(folder, "train.bin").stat().st_size // 2
    np.arange(count, dtype="<u4").tofile(Path(folder, "positions.bin"))
    positions = TokenFile(Path(folder, "positions.bin"), block_size, count, "uint32")
    x, _ = positions.batch(0, batches * batch_size)
    return x[:, 0].view(batches, batch_size).tolist()
