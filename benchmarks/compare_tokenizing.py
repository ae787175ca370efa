"""Compare the speed of tokenizing documents for GPT-2: this repository, nanoGPT and tiktoken.

    $ python benchmarks/compare_tokenizing.py --peer=path/to/nanoGPT --megabytes=240

Each side is a whole process, from a file of JSON lines to train.bin, in alternating rounds:

    brisk     python data/openwebtext/prepare.py --source=…
    nanogpt   data/openwebtext/prepare.py of the checkout, unmodified, on the same documents
    tiktoken  a single process: encode_ordinary on each document, ids written to a file

The documents are the Python files of this machine's packages. Prints the median time of each side
relative to brisk, with the lowest and highest ratio of a round; and the speed of our tokenizing and
writing alone, relative to tiktoken in one process.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import tiktoken

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from brisk.data.bpe import gpt2
from brisk.data.dataset import write_dataset
from brisk.errors import UserError, one_line_errors
from configurator import PositiveInt, configure

ROOT = Path(__file__).resolve().parents[1]
PAGE = 5000  # characters in a document, about a web page
VAL_SHARE = 0.1
TIKTOKEN = """
import json, sys
import numpy as np, tiktoken
encoder = tiktoken.get_encoding("gpt2")
with open(sys.argv[1], encoding="utf-8") as lines, open("train.bin", "wb") as file:
    for line in lines:
        ids = encoder.encode_ordinary(json.loads(line)["text"]) + [encoder.eot_token]
        file.write(np.array(ids, dtype=np.uint16).tobytes())
"""
# Runs nanoGPT's script on a file instead of the hub. Its validation fraction of 0.0005 fails for
# fewer than 1,024 validation documents, so both sides use VAL_SHARE.
NANOGPT = """
import runpy, sys
import datasets
load, split = datasets.load_dataset, datasets.Dataset.train_test_split
def load_dataset(name, num_proc=None):
    return load("json", data_files=sys.argv[1])
def train_test_split(self, test_size, **options):
    return split(self, test_size=float(sys.argv[2]), **options)
datasets.load_dataset, datasets.Dataset.train_test_split = load_dataset, train_test_split
runpy.run_path("prepare.py", run_name="__main__")
"""


@dataclass(frozen=True)
class CompareConfig:
    peer: str = ""  # checkout of nanoGPT; if empty, it is not measured
    megabytes: PositiveInt = 240  # size of the text
    rounds: PositiveInt = 3  # each side runs once in a round
    json: bool = False  # print one JSON object instead of text


def write_documents(path, megabytes):
    """Write Python files, split into pages, as JSON lines. Returns the bytes of their text."""
    size = 0
    folders = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")])
    with open(path, "w", encoding="utf-8") as lines:
        for file in (file for folder in folders for file in sorted(Path(folder).rglob("*.py"))):
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            for start in range(0, len(text), PAGE):
                lines.write(json.dumps({"text": text[start : start + PAGE]}) + "\n")
            size += len(text.encode())
            if size >= megabytes * 1e6:
                break
    return size


def sides(config, documents):
    """{name: (arguments of Python, folder to run in a copy of, or None)}"""
    prepare = ROOT / "data" / "openwebtext" / "prepare.py"
    ours = [str(prepare), f"--source={documents}", "--data_dir=.", f"--test_size={VAL_SHARE}"]
    found = {"brisk": (ours, None), "tiktoken": (["-c", TIKTOKEN, str(documents)], None)}
    if config.peer:
        folder = Path(config.peer, "data", "openwebtext")
        if not (folder / "prepare.py").exists():
            raise UserError(f"--peer={config.peer} is not a checkout of nanoGPT")
        found["nanogpt"] = (["-c", NANOGPT, str(documents), str(VAL_SHARE)], folder)
    return found


def timed(command, folder):
    """Run a process in a temporary folder with an empty cache. Returns (seconds, tokens)."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary, "work")
        shutil.copytree(folder, work) if folder else work.mkdir()
        environment = {**os.environ, "HF_HOME": str(Path(temporary, "cache"))}
        began = time.perf_counter()
        done = subprocess.run(
            [sys.executable, *command], cwd=work, env=environment, capture_output=True, text=True
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise UserError(f"{command[0]} failed: {done.stderr.strip()[-500:]}")
        files = [work / "train.bin", work / "val.bin"]
        return seconds, sum(file.stat().st_size for file in files if file.exists()) // 2


def rate_ratio(documents):
    """The speed of our tokenizing and writing relative to tiktoken in one process. Documents are in
    memory; the start of our workers is included."""
    encoder, tokenizer = tiktoken.get_encoding("gpt2"), gpt2()
    with open(documents, encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        with open(Path(folder, "alone.bin"), "wb") as file:
            for text in texts:
                ids = [*encoder.encode_ordinary(text), encoder.eot_token]
                file.write(np.array(ids, dtype=np.uint16).tobytes())
        alone = time.perf_counter() - began
        began = time.perf_counter()
        write_dataset(folder, tokenizer, {"train": texts}, "", end_documents=True)
        return alone / (time.perf_counter() - began)


def main(config):
    with tempfile.TemporaryDirectory() as temporary:
        documents = Path(temporary, "documents.jsonl")
        size = write_documents(documents, config.megabytes)
        runs = {name: [] for name in sides(config, documents)}
        for number in range(config.rounds):
            for name, (command, folder) in sides(config, documents).items():
                seconds, tokens = timed(command, folder)
                runs[name].append(seconds)
                print(f"round {number + 1}: {name} {seconds:.1f} s, {tokens:,} tokens")
        rates = [rate_ratio(documents) for _ in range(config.rounds)]
    result = {"megabytes": size / 1e6, "cores": os.cpu_count()}
    result["tokenizing_alone"] = {
        "ratio": median(rates),
        "lowest": min(rates),
        "highest": max(rates),
    }
    for name, seconds in runs.items():
        ratios = [other / ours for other, ours in zip(seconds, runs["brisk"], strict=True)]
        figures = {"ratio": median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        result[name] = {"seconds": median(seconds), **figures}
    if config.json:
        print(json.dumps(result))
    else:
        for name in runs:
            of = result[name]
            spread = f"{of['lowest']:.2f} to {of['highest']:.2f}"
            print(f"{name:<10} {of['ratio']:.2f} times brisk's time ({spread})")
        alone = f"{median(rates):.2f} ({min(rates):.2f} to {max(rates):.2f})"
        print(f"tokenizing and writing alone: {alone} times the speed of tiktoken in one process")


if __name__ == "__main__":
    with one_line_errors():
        main(configure(CompareConfig, sys.argv[1:]))
